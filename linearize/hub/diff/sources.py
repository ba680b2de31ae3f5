"""The repositories that a weight difference is made of: local directories, or snapshots of the Hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from linearize.config.record import FINAL, published_name
from linearize.conversion.sources import Origin, Source
from linearize.conversion.tensor_files import CHUNK_BYTES, INDEX, SAFETENSORS, weight_file_names
from linearize.errors import UserError
from linearize.hub.diff.record import FileRecord
from linearize.load_errors import explained

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf")
"""Copies of the weights in formats that are not compared, and the Trainer's pickles: neither is carried."""


def find_source(
    name: str | os.PathLike[str],
    revision: str | None = None,
    token: str | None = None,
    *,
    weights_only: bool = False,
) -> Source:
    """The local directory of a repository; one of the Hub is fetched into the cache.

    Args:
        name: A directory, a run directory (its `final` is taken), or a Hub id.
        revision, token: Of the Hub repository.
        weights_only: Fetch the safetensors weights and nothing else.

    Raises:
        UserError: There is no such repository, or it cannot be read.
    """
    name = os.fspath(name)
    path = Path(name)
    if path.is_file():
        raise UserError(f"{name} is a file: give the directory of the repository")
    if path.is_dir():
        if not (path / "config.json").is_file() and (path / FINAL / "config.json").is_file():
            path = path / FINAL
        return Source(name, path, Origin(published_name(name), on_hub=False, revision=None))
    with explained(name):
        path = _fetch_weights(name, revision, token) if weights_only else _fetch(name, revision, token)
    return Source(name, path, Origin(name, on_hub=True, revision=path.name))


def _fetch(name: str, revision: str | None, token: str | None, files: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    ignored = [f"*{suffix}" for suffix in OTHER_WEIGHTS]
    found = snapshot_download(
        name, revision=revision, token=token, allow_patterns=files, ignore_patterns=ignored, dry_run=False
    )
    return Path(found)


def _fetch_weights(name: str, revision: str | None, token: str | None) -> Path:
    """A repository may hold its weights twice, so its index says which files to fetch."""
    path = _fetch(name, revision, token, [f"model{SAFETENSORS}", f"model{INDEX}"])
    return _fetch(name, path.name, token, [f"model{INDEX}", *weight_file_names(path, name)])


def other_files(path: Path, weights: set[str]) -> tuple[list[str], list[str]]:
    """What a repository holds beside its weights.

    Args:
        path: Of the repository.
        weights: Names of the weight files.

    Returns:
        Relative paths of the files to carry, and of those that hold weights in other formats.
    """
    files = sorted(name for name in _walk(path) if name not in weights)
    left_out = [name for name in files if name.endswith(OTHER_WEIGHTS)]
    return [name for name in files if name not in left_out], left_out


def _walk(path: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for file in (Path(folder, name) for name in files):
            if file.is_file():  # not a link to nowhere
                yield file.relative_to(path).as_posix()


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy a file piece by piece, and return its length and checksum."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reading, target.open("wb") as writing:
        while piece := reading.read(CHUNK_BYTES):
            digest.update(piece)
            writing.write(piece)
            size += len(piece)
        writing.flush()
        os.fsync(writing.fileno())
    return FileRecord(size, digest.hexdigest())
