"""Safetensors weights of a repository as streams of bytes: no tensor is ever in memory as a whole.

A file is 8 bytes with the length of the header, the header (JSON: for each tensor its dtype, shape and place), and the
tensors one after another. The header comes first, so the sizes are planned before a byte is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from linearize.errors import UserError

CHUNK_BYTES = 4 * 2**20
"""What is read at a time: a tensor is streamed in such pieces."""
LENGTH_BYTES = 8
SAFETENSORS = ".safetensors"
INDEX = ".safetensors.index.json"
FEW = 5


@dataclass(frozen=True)
class Tensor:
    """One tensor's place."""

    name: str
    dtype: str
    """As safetensors names it: `BF16`, `F8_E4M3`."""
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    file: Path | None = None
    """Where it is stored; None for one that is still to be written."""
    offset: int = 0
    """Its first byte, counted from the end of the header in a parsed header and from the start of a file that is
    there."""

    def is_like(self, other: Tensor) -> bool:
        """Whether the two have the same dtype and shape."""
        return (self.dtype, self.shape, self.size) == (other.dtype, other.shape, other.size)

    def chunks(self) -> Iterator[np.ndarray]:
        """The bytes in order, in pieces of at most CHUNK_BYTES; each piece is overwritten by the next.

        Raises:
            UserError: the file ended early.
        """
        assert self.file is not None
        buffer = np.empty(min(CHUNK_BYTES, self.size), np.uint8)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            for first in range(0, self.size, CHUNK_BYTES):
                piece = buffer[: min(CHUNK_BYTES, self.size - first)]
                view = piece.data
                while view:
                    count = stream.readinto(view)
                    if not count:
                        raise UserError(f"{self.file} ended while {self.name} was read: do not change it meanwhile")
                    view = view[count:]
                yield piece


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file: its name, its header to the byte, and its tensors in the order of their bytes."""

    name: str
    header: str
    tensors: list[Tensor]


@dataclass
class Weights:
    """The weights of a repository, in one file or in shards."""

    files: list[WeightFile] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())


def weight_file_names(directory: Path, source: str, stem: str = "model") -> list[str]:
    """Names of the files that hold the weights: `STEM.safetensors`, or those of the index, as transformers chooses.

    Args:
        directory: of the repository.
        source: what the user called it, for the sentences.
        stem: `model`, or that of another set of weights in the same layout.

    Raises:
        UserError: there are neither, or the index cannot be read.
    """
    if (directory / f"{stem}{SAFETENSORS}").is_file():
        return [f"{stem}{SAFETENSORS}"]
    index = directory / f"{stem}{INDEX}"
    if not index.is_file():
        raise UserError(
            f"{source} has no {stem}{SAFETENSORS} and no {stem}{INDEX}: give a repository whose weights are in "
            "safetensors (other formats: load it and save it again with save_pretrained)"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors files: restore it") from error
    if strange := [name for name in names if not is_plain_path(name) or not name.endswith(SAFETENSORS)]:
        raise UserError(f"{index} names {strange[0]!r}, which is no safetensors file: restore the index")
    return names


def read_weights(directory: Path, source: str, stem: str = "model") -> Weights:
    """The headers of a repository's weights; no tensor is read.

    Args:
        directory, source, stem: as in `weight_file_names`.

    Raises:
        UserError: a file is missing or damaged, or two hold the same tensor.
        SafetensorError: a header or a length is wrong (`load_errors.explained` words it).
    """
    from safetensors import safe_open

    weights = Weights()
    names = weight_file_names(directory, source, stem)
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise UserError(f"{source} lacks {some(missing)}, which its {stem}{INDEX} names: complete the repository")
    for name in names:
        path = directory / name
        with safe_open(path, framework="numpy"):  # checks the header against the file's length
            pass
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            header = stream.read(length).decode("utf-8")
        tensors = parse_header(header, path, LENGTH_BYTES + length)
        weights.files.append(WeightFile(name, header, tensors))
        for tensor in tensors:
            if tensor.name in weights.tensors:
                raise UserError(f"{source} holds {tensor.name} in two files: save the model again")
            weights.tensors[tensor.name] = tensor
    return weights


def parse_header(header: str, file: Path | None = None, start: int = 0) -> list[Tensor]:
    """The tensors of a header in the order of their bytes.

    Args:
        header: its text.
        file: the file it was read from.
        start: where the tensors begin in the file.

    Raises:
        ValueError: it is no header, or has gaps.
    """
    tensors = []
    try:
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                (first, end), shape = map(int, entry["data_offsets"]), tuple(map(int, entry["shape"]))
                tensors.append(Tensor(name, str(entry["dtype"]), shape, end - first, file, start + first))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no safetensors header ({error})") from error
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    end = start
    for tensor in tensors:
        if tensor.offset != end or tensor.size < 0:
            raise ValueError(f"a safetensors header with a gap before {tensor.name}")
        end += tensor.size
    return tensors


def make_header(tensors: Iterable[Tensor], metadata: dict[str, str]) -> str:
    """The header of tensors that follow one another, filled up with spaces so that they begin at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.size],
        }
        end += tensor.size
    header = json.dumps(entries, separators=(",", ":"))  # ASCII: as many bytes as characters
    return header + " " * (-len(header) % 8)


def plan_shards(
    tensors: Iterable[Tensor], stem: str, max_shard_size: int
) -> tuple[dict[str, list[Tensor]], bytes | None]:
    """Which file each tensor goes to, as huggingface_hub splits; a tensor above the limit gets a file of its own.

    Args:
        tensors: in the order in which they should be grouped.
        stem: as in `weight_file_names`; one file is `STEM.safetensors`, several are numbered.
        max_shard_size: bytes.

    Returns:
        File name -> its tensors, the widest dtypes first, so that each lies at a multiple of its width; and the
        contents of `STEM.safetensors.index.json` where there are several files.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    named = {tensor.name: tensor for tensor in tensors}
    plan = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern=f"{stem}{{suffix}}{SAFETENSORS}",
        max_shard_size=max_shard_size,
    )
    # Of no tensors the library makes no file.
    files = plan.filename_to_tensors or {f"{stem}{SAFETENSORS}": []}
    shards = {
        file: sorted((named[name] for name in names), key=lambda tensor: -_width(tensor.dtype))
        for file, names in files.items()
    }
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    return shards, json.dumps(index, indent=2).encode() if plan.is_sharded else None


def _width(dtype: str) -> int:
    """Bits of one element, from the dtype's name (`F8_E4M3`, `BF16`); a bool is a byte."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def write_weights(path: Path, header: str, pieces: Iterable[np.ndarray]) -> None:
    """Write a safetensors file piece by piece, and wait until the disk has it.

    Args:
        path: of the file.
        header: its header.
        pieces: the bytes of its tensors in order.
    """
    text = header.encode("utf-8")
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(LENGTH_BYTES, "little"))
        stream.write(text)
        for piece in pieces:
            stream.write(piece.data)
        stream.flush()
        os.fsync(stream.fileno())


def is_plain_path(name: Any) -> bool:
    """Whether a name from a file stays within its folder: relative, forward slashes, no `..`."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and str(path) == name


def some(names: Sequence[str]) -> str:
    """The first few names."""
    shown = ", ".join(names[:FEW])
    return shown if len(names) <= FEW else f"{shown} and {len(names) - FEW} more"
