"""Checkpoints that are either whole or absent: written beside their place and moved there in one step.

A checkpoint is a directory `step-N` with safetensors files, `optimizer.pt` (read with `weights_only=True`) and
`state.json`, which has the digest of every file. A full disk or a killed process leaves the previous checkpoint as it
was, and one that was damaged later is noticed and left out.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from linearize.errors import UserError
from linearize.files import atomic_directory, write_bytes
from linearize.paths import user_path
from linearize.processes import from_main_process, refuse_together

logger = logging.getLogger(__name__)

STEP_DIRECTORY = re.compile(r"^step-(\d+)$")
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"

CHUNK_BYTES = 1 << 24


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


def step_directories(root: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints under `root`, oldest step first; whether they are whole, `load_checkpoint` tells."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := STEP_DIRECTORY.match(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def latest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the highest step under `root`, or None."""
    directories = step_directories(root)
    return directories[-1] if directories else None


def prune_checkpoints(root: str | os.PathLike[str], limit: int | None, newest: Path) -> None:
    """Deletes the oldest checkpoints beyond `limit` (None keeps all), and what a killed process left half-written.

    Those after the newest, which has just been saved, go too: they are damaged, or of a run that went on from an
    earlier one in another way.
    """
    steps = step_directories(root)
    for path in steps[steps.index(newest) + 1 :]:
        shutil.rmtree(path)
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
        write_state(directory, {**state, "step": step})
    prune_checkpoints(root, limit, target)
    return target


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Completes a checkpoint with `state.json`: the state, and size and digest of each file that lies there."""
    files = {path.relative_to(directory).as_posix(): _fingerprint(path) for path in sorted(_files(directory))}
    write_bytes(directory / STATE_FILE, json.dumps({**state, "files": files}, indent=1).encode())


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and path != directory / STATE_FILE]


def _fingerprint(path: Path) -> list[Any]:
    """Size in bytes, and the start of the SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        return [file.tell(), digest.hexdigest()[:32]]


def load_checkpoint(path: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint:
    """Reads a `step-N` directory; nothing is unpickled beyond tensors and plain values.

    Args:
        path: the directory.
        verify: compare each file with the digest that was written with it.

    Raises:
        UserError: the directory is missing, is no checkpoint, or is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a checkpoint (there is no such directory): name a step-N directory")
    try:
        state = json.loads((path / STATE_FILE).read_text())
        if verify:
            _check_files(path, state.get("files", {}))
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        optimizer = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        return Checkpoint(path, int(state["step"]), tensors, optimizer, state)
    except Exception as error:
        reason = str(error) if isinstance(error, _Damaged) else type(error).__name__
        raise UserError(
            f"the checkpoint {path} is damaged ({reason}): delete it to go on from the one before"
        ) from error


class _Damaged(Exception):
    """What is wrong with a checkpoint's files."""


def _check_files(directory: Path, files: Mapping[str, Any]) -> None:
    for name, written in files.items():
        if not (directory / name).is_file():
            raise _Damaged(f"{name} is missing")
        size, digest = _fingerprint(directory / name)
        if size != written[0]:
            raise _Damaged(f"{name} has {size} bytes of {written[0]}")
        if digest != written[1]:
            raise _Damaged(f"{name} has other bytes than were written")


def checkpoint_to_resume(root: str | os.PathLike[str], resume: bool | str | os.PathLike[str]) -> Checkpoint | None:
    """The checkpoint that a stage starts from, the same in every process, or None to start afresh.

    The main process chooses it, and says which newer ones are damaged.

    Args:
        root: directory of the stage's checkpoints.
        resume: True takes the latest under `root` that is whole (none there yet: start afresh), a path takes that one.

    Raises:
        UserError: checkpoints are there but `resume` is False, the path holds none, all are damaged, or a process
            cannot read what the main process can.
    """
    chosen: list[Checkpoint | None] = [None]

    def choose() -> Path | None:
        chosen[0] = _choose(Path(root), resume)
        return None if chosen[0] is None else chosen[0].path

    path = from_main_process(choose)
    problem = None
    if path is not None and chosen[0] is None:
        try:
            chosen[0] = load_checkpoint(path, verify=False)
        except UserError as error:
            problem = (
                f"the main process resumes from {path}, which another process cannot read ({error}): put the output "
                "directory on a disk that all processes share"
            )
    refuse_together(problem)
    return chosen[0]


def _choose(root: Path, resume: bool | str | os.PathLike[str]) -> Checkpoint | None:
    latest = latest_checkpoint(root)
    if not resume:
        if latest is not None:
            raise UserError(f"{root} already holds checkpoints (up to {latest.name}): resume, or delete them")
        return None
    if resume is not True:
        path = Path(user_path(resume))
        named = STEP_DIRECTORY.match(path.name) or (path / STATE_FILE).is_file()
        return load_checkpoint(path if named else latest_checkpoint(path) or path)
    return None if latest is None else _newest_whole(root)


def _newest_whole(root: Path) -> Checkpoint:
    """The newest checkpoint that can be read; damaged ones after it go when the next is saved."""
    damaged: list[str] = []
    for path in reversed(step_directories(root)):
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            damaged.append(str(error).partition(": delete it")[0])
            continue
        for reason in damaged:
            logger.warning("%s: going on from %s", reason, path.name)
        return checkpoint
    raise UserError(f"{damaged[0]}, and there is no whole one before it: delete {root} to start the stage again")
