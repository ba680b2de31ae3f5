"""Files and directories that are either whole or absent: written beside their place and moved there in one step."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from linearize.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""What file systems say that cannot flush a directory."""
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG, errno.ENOTDIR, errno.ENAMETOOLONG)


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
        raise _write_error(path, _number_in(error), error) from error
    except OSError as error:
        if error.errno not in DISK_FULL + NOT_WRITABLE:
            raise
        raise _write_error(path, error.errno, error) from error
    except Exception as error:  # of tokenizers, which knows no kinds
        if (number := _number_in(error)) not in DISK_FULL + NOT_WRITABLE:
            raise
        raise _write_error(path, number, error) from error


def _number_in(error: Exception) -> int | None:
    """The system's error, which libraries in Rust report as text: "No space left on device (os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    return int(number[1]) if number else None


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
            sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Waits until the disk has the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Waits until the disk has a directory with all that lies in it."""
    for directory, _, files in os.walk(root):
        for name in files:
            with open(Path(directory, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(directory))


def move_into_place(partial: Path, target: Path) -> None:
    """Gives a complete directory its place in one step, once the disk has it; what lay there goes as a whole."""
    sync_tree(partial)
    previous = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        if target.exists():
            os.replace(target, previous)
        try:
            os.replace(partial, target)
        except OSError:
            if previous.exists():
                os.replace(previous, target)
            raise
        sync_directory(target.parent)
    finally:
        shutil.rmtree(previous, ignore_errors=True)


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
    with readable_write_errors(target):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            move_into_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
