"""Checkpoints that are either whole or absent: written beside their place and moved there in one step.

A checkpoint is a directory `step-N` with safetensors files, `optimizer.pt` (read with `weights_only=True`) and
`state.json`. A full disk or a killed process leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from linearize.errors import UserError
from linearize.paths import user_path

STEP_DIRECTORY = re.compile(r"^step-(\d+)$")
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG, errno.ENOTDIR, errno.ENAMETOOLONG)


@dataclass
class Checkpoint:
    """What a `step-N` directory holds."""

    path: Path
    step: int
    """Completed optimiser steps."""
    tensors: dict[str, dict[str, torch.Tensor]]
    """File name without `.safetensors` -> its tensors, on the CPU."""
    optimizer: dict[str, Any]
    state: dict[str, Any]


@contextlib.contextmanager
def readable_write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a full disk or a place that cannot be written into one sentence.

    Args:
        path: what was being written, named in the sentence.

    Raises:
        UserError: from the `OSError`, or from the `SafetensorError` into which safetensors wraps it.
    """
    try:
        yield
    except SafetensorError as error:
        # safetensors reports the system's error only as text: "I/O error: No space left on device (os error 28)".
        number = re.search(r"os error (\d+)", str(error))
        raise _write_error(path, int(number[1]) if number else None, error) from error
    except OSError as error:
        if error.errno not in DISK_FULL + NOT_WRITABLE:
            raise
        raise _write_error(path, error.errno, error) from error


def _write_error(path: str | os.PathLike[str], number: int | None, error: Exception) -> UserError:
    if number in DISK_FULL:
        return UserError(
            f"no space left on the disk while writing {os.fspath(path)}: nothing half-written is left, and what was "
            "there before is untouched; free some space, or choose another output directory, and resume"
        )
    return UserError(f"cannot write {os.fspath(path)}: {error}")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes one file atomically: readers see the old contents or the new, never a part."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with readable_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_bytes(partial, data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives an empty directory to fill, which takes the target's place when the block ends without an exception.

    Args:
        target: the directory to make. One that exists is replaced as a whole, and only at the end.

    Yields:
        The directory to write into, on the same file system as the target.

    Raises:
        UserError: the disk is full or the place cannot be written; the target is as it was.
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    previous = target.with_name(f".{target.name}.old-{os.getpid()}")
    with readable_write_errors(target):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            if target.exists():
                os.replace(target, previous)
            try:
                os.replace(partial, target)
            except OSError:
                if previous.exists():
                    os.replace(previous, target)
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(previous, ignore_errors=True)


def step_directories(root: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints under `root`, oldest step first."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := STEP_DIRECTORY.match(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def latest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the highest step under `root`, or None."""
    directories = step_directories(root)
    return directories[-1] if directories else None


def prune_checkpoints(root: str | os.PathLike[str], limit: int | None) -> None:
    """Deletes the oldest checkpoints beyond `limit` (None keeps all), and what a killed process left half-written."""
    for leftover in Path(root).glob(".step-*.*-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if limit is not None:
        for path in step_directories(root)[: -max(limit, 1)]:
            shutil.rmtree(path)


def save_checkpoint(
    root: str | os.PathLike[str],
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    limit: int | None = None,
) -> Path:
    """Writes `root/step-N` atomically, then deletes the oldest beyond the limit.

    Args:
        root: directory of the stage's checkpoints.
        step: completed optimiser steps, N.
        tensors: file name without `.safetensors` -> its tensors.
        optimizer: `optimizer.state_dict()`.
        state: what JSON can hold; `step` is added.
        limit: checkpoints to keep, None for all. The new one comes first: at no time is there none.

    Returns:
        The directory of the checkpoint.

    Raises:
        UserError: the disk is full; the previous checkpoints are untouched.
    """
    target = Path(root) / f"step-{step}"
    with atomic_directory(target) as directory:
        for name, group in tensors.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            write_bytes(directory / f"{name}.safetensors", safetensors_bytes(contiguous, metadata={"format": "pt"}))
        buffer = io.BytesIO()
        torch.save(dict(optimizer), buffer)
        write_bytes(directory / OPTIMIZER_FILE, buffer.getvalue())
        text = json.dumps({**state, "step": step}, indent=1)
        write_bytes(directory / STATE_FILE, text.encode())
    prune_checkpoints(root, limit)
    return target


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a `step-N` directory; nothing is unpickled beyond tensors and plain values.

    Raises:
        UserError: the directory is missing, is no checkpoint, or is damaged.
    """
    path = Path(path)
    if not (path / STATE_FILE).is_file():
        raise UserError(f"{path} is not a checkpoint (it has no {STATE_FILE}): name a step-N directory")
    try:
        state = json.loads((path / STATE_FILE).read_text())
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        optimizer = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        return Checkpoint(path, int(state["step"]), tensors, optimizer, state)
    except Exception as error:
        raise UserError(
            f"the checkpoint {path} is damaged ({type(error).__name__}): delete it to go on from the one before"
        ) from error


def checkpoint_to_resume(root: str | os.PathLike[str], resume: bool | str | os.PathLike[str]) -> Checkpoint | None:
    """The checkpoint that a stage starts from, or None to start afresh.

    Args:
        root: directory of the stage's checkpoints.
        resume: True takes the latest under `root` (none there yet: start afresh), a path takes that one.

    Raises:
        UserError: checkpoints are there but `resume` is False, or the path holds none.
    """
    latest = latest_checkpoint(root)
    if not resume:
        if latest is not None:
            raise UserError(f"{root} already holds checkpoints (up to {latest.name}): resume, or delete them")
        return None
    if resume is not True:
        path = Path(user_path(resume))
        return load_checkpoint(path if (path / STATE_FILE).is_file() else latest_checkpoint(path) or path)
    return None if latest is None else load_checkpoint(latest)


def require_same_run(checkpoint: Checkpoint, expected: Mapping[str, Any]) -> None:
    """Refuses to continue a run whose data would come in another order.

    Args:
        checkpoint: its `state["run"]` holds the values it was trained with.
        expected: name -> value of this run, such as `sequence_length`, `tokens_per_step`, `num_blocks`, `seed`.

    Raises:
        UserError: a sentence with the values that differ.
    """
    trained = checkpoint.state.get("run", {})
    differing = [
        f"{name} {trained.get(name)} (now {value})" for name, value in expected.items() if trained.get(name) != value
    ]
    if differing:
        raise UserError(
            f"cannot resume from {checkpoint.path}: it was trained with {', '.join(differing)}; "
            "set the values back, or start a new run in another output directory"
        )
