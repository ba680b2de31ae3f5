"""The difference between a base model and a model made from it, and the model back from base and difference.

A difference publishes a converted or finetuned model to those who have the base: what did not change is not stored.

The difference of a tensor is the XOR of its bits with the base's. A difference of numbers in the tensor's own dtype
does not come back exactly: both `converted - base` and `base + difference` round. XOR undoes itself whatever the bits
mean, so one rule serves every dtype, integers, float8 and those to come, and NaN, infinities and the sign of zero come
back too. Where little changed, sign, exponent and upper mantissa become zeros, which compress well. Subtracting the
bits as integers is as exact and compresses slightly better (`docs/weight_diff.md` has figures), but must know the
width of the elements, which for some dtypes is not even a whole byte.

Everything is streamed in pieces of a few MiB (`linearize/conversion/tensor_files.py`): memory grows neither with the
model nor with its largest tensor. The format is described in `docs/weight_diff.md`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from huggingface_hub import ModelCardData
from tqdm.auto import tqdm

from linearize.config.record import CARD_FILE
from linearize.conversion.sources import Source, check_apart, check_output
from linearize.conversion.tensor_files import (
    INDEX,
    SAFETENSORS,
    Tensor,
    Weights,
    make_header,
    plan_shards,
    read_weights,
    some,
    write_weights,
)
from linearize.errors import UserError
from linearize.files import atomic_directory, write_bytes
from linearize.hub.card import front_matter
from linearize.hub.diff.record import (
    DIFF_FILE,
    DIFFERS,
    EQUAL,
    FORMAT,
    FORMAT_VERSION,
    FROM_BASE,
    NEW,
    OTHER_FORM,
    STORED,
    DiffRecord,
    TensorRecord,
    read_record,
    stored_tensor,
)
from linearize.hub.diff.sources import copy_file, find_source, other_files
from linearize.hub.repository import MAX_SHARD_SIZE
from linearize.load_errors import explained
from linearize.paths import user_path

STEM = "diff"
"""The stored tensors are in `diff.safetensors`, or in shards with an index: nothing takes them for a model's."""
FILES = "files"
"""Folder of the carried files."""


@dataclass(frozen=True)
class DiffSummary:
    """What a difference holds."""

    record: DiffRecord
    base_bytes: int
    converted_bytes: int
    stored_bytes: int
    """Of the tensors in the diff."""

    def sentence(self) -> str:
        """How many tensors are equal, differ or are new, and the sizes."""
        from linearize.tables import format_bytes

        count = {kind: len(self.record.of_kind(kind)) for kind in (EQUAL, DIFFERS, NEW, OTHER_FORM)}
        return (
            f"{len(self.record.tensors)} tensors: {count[EQUAL]} equal, {count[DIFFERS]} differ, {count[NEW]} new, "
            f"{count[OTHER_FORM]} of another shape or dtype; {len(self.record.files)} other files; base "
            f"{format_bytes(self.base_bytes)}, converted {format_bytes(self.converted_bytes)}, difference "
            f"{format_bytes(self.stored_bytes)}"
        )

    def notes(self) -> list[str]:
        """What somebody may not expect, a line each."""
        lists = (
            ("Stored whole, for the base has another shape or dtype", self.record.of_kind(OTHER_FORM)),
            ("Only in the base", self.record.base_only),
            ("Left out, for they hold weights in another format", self.record.not_carried),
        )
        return [f"{title}: {some(names)}" for title, names in lists if names]


def make_diff(
    base: str | os.PathLike[str],
    converted: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    converted_revision: str | None = None,
    token: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> DiffSummary:
    """Write what a model differs by from its base, and all its other files.

    Args:
        base: Directory or Hub id of the base, in safetensors.
        converted: Directory (or run directory) or Hub id of the model made from it, in safetensors.
        out: Directory to write; it is there as a whole or not at all.
        revision, converted_revision: Of the two Hub repositories.
        token: For the Hub.
        max_shard_size: Bytes of one file of the diff, as a number or like `5GB`; a larger tensor has its own file.
        overwrite: Replace `out`.

    Raises:
        UserError: A repository cannot be read or has no safetensors weights, or `out` exists or cannot be written.
    """
    limit = _bytes(max_shard_size)
    base, converted, out = map(user_path, (base, converted, out))
    check_output(out, overwrite)
    first = find_source(base, revision, token, weights_only=True)
    second = find_source(converted, converted_revision, token)
    check_apart(out, first, second)
    old, new = _weights(first), _weights(second)
    record = DiffRecord(
        base=first.origin,
        converted=second.origin,
        tensors=_compare(old, new),
        weights=new.files,
        files={},
        base_only=sorted(old.tensors.keys() - new.tensors.keys()),
    )
    planned = [stored_tensor(new.tensors[name], record.tensors[name].kind) for name in record.of_kind(*STORED)]
    stored_bytes = sum(tensor.size for tensor in planned)
    carried, record.not_carried = other_files(second.path, {file.name for file in new.files})
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    with atomic_directory(out) as partial, _bar("writing", stored_bytes) as bar:
        shards, index = plan_shards(planned, STEM, limit)
        for name, tensors in shards.items():
            write_weights(partial / name, make_header(tensors, metadata), _differences(tensors, record, old, new, bar))
        if index is not None:
            write_bytes(partial / f"{STEM}{INDEX}", index)
        for name in carried:
            record.files[name] = copy_file(second.path / name, partial / FILES / name)
        write_bytes(partial / CARD_FILE, _card(record).encode("utf-8"))
        write_bytes(partial / DIFF_FILE, record.to_json())
    return DiffSummary(record, old.size, new.size, stored_bytes)


def recover(
    base: str | os.PathLike[str],
    diff: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    diff_revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> DiffSummary:
    """Write the repository that a difference was made of, byte for byte.

    Args:
        base: Directory or Hub id of the base.
        diff: Directory or Hub id of what `make_diff` wrote.
        out: Directory to write; it is there as a whole or not at all.
        revision: Of the base; None takes the commit that the diff names, if it names this base, else the latest.
        diff_revision: Of the diff.
        token: For the Hub.
        overwrite: Replace `out`.

    Raises:
        UserError: The base is not the one of the diff, the diff is damaged, a repository cannot be read, or `out`
            exists or cannot be written.
    """
    base, diff, out = map(user_path, (base, diff, out))
    check_output(out, overwrite)
    second = find_source(diff, diff_revision, token)
    record = read_record(second.path, second.name)
    if revision is None and record.base.on_hub and os.fspath(base) == record.base.name:
        revision = record.base.revision
    first = find_source(base, revision, token, weights_only=True)
    check_apart(out, first, second)
    old, stored = _weights(first), _stored_weights(second)
    _check_inputs(record, first, old, second, stored)
    size = sum(tensor.size for file in record.weights for tensor in file.tensors)
    with atomic_directory(out) as partial, _bar("recovering", size) as bar:
        for file in record.weights:
            (partial / file.name).parent.mkdir(parents=True, exist_ok=True)
            pieces = (
                piece
                for tensor in file.tensors
                for piece in _recovered(tensor.name, record, first, old, second, stored, bar)
            )
            write_weights(partial / file.name, file.header, pieces)
        for name, expected in record.files.items():
            if copy_file(second.path / FILES / name, partial / name) != expected:
                raise UserError(f"{FILES}/{name} of {second.name} is damaged: download or make the diff again")
    return DiffSummary(record, old.size, size, stored.size)


def _weights(source: Source) -> Weights:
    with explained(source.name):
        return read_weights(source.path, source.name)


def _stored_weights(source: Source) -> Weights:
    if not any((source.path / f"{STEM}{suffix}").is_file() for suffix in (SAFETENSORS, INDEX)):
        raise UserError(f"{source.name} has no {STEM}{SAFETENSORS}: download or make the diff again")
    with explained(source.name):
        return read_weights(source.path, source.name, STEM)


def _compare(old: Weights, new: Weights) -> dict[str, TensorRecord]:
    """Kind and checksums of every tensor of the new weights; reads both once."""
    records = {}
    with _bar("comparing", new.size) as bar:
        for name, tensor in new.tensors.items():
            before = old.tensors.get(name)
            digest = _digest(tensor)
            if before is None or not tensor.is_like(before):
                records[name] = TensorRecord(NEW if before is None else OTHER_FORM, digest)
            else:
                base_digest = _digest(before)
                records[name] = TensorRecord(EQUAL if digest == base_digest else DIFFERS, digest, base_digest)
            bar.update(tensor.size)
    return records


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for piece in tensor.chunks():
        digest.update(piece.data)
    return digest.hexdigest()


def _differences(
    tensors: list[Tensor], record: DiffRecord, old: Weights, new: Weights, bar: tqdm
) -> Iterator[np.ndarray]:
    """The bytes that a file of the diff holds."""
    for name in (tensor.name for tensor in tensors):
        base = old.tensors[name].chunks() if record.tensors[name].kind == DIFFERS else None
        for piece in new.tensors[name].chunks():
            if base is not None:
                np.bitwise_xor(piece, next(base), out=piece)
            bar.update(len(piece))
            yield piece


def _recovered(
    name: str, record: DiffRecord, first: Source, old: Weights, second: Source, stored: Weights, bar: tqdm
) -> Iterator[np.ndarray]:
    """The bytes of one tensor; its checksums are known, and checked, when the last piece has been taken."""
    expected = record.tensors[name]
    of_base, of_result = hashlib.sha256(), hashlib.sha256()
    source = old.tensors[name] if expected.kind in FROM_BASE else stored.tensors[name]
    differences = stored.tensors[name].chunks() if expected.kind == DIFFERS else None
    for piece in source.chunks():
        if expected.kind in FROM_BASE:
            of_base.update(piece.data)
        if differences is not None:
            np.bitwise_xor(piece, next(differences), out=piece)
        if expected.kind != EQUAL:
            of_result.update(piece.data)
        bar.update(len(piece))
        yield piece
    if expected.kind in FROM_BASE and of_base.hexdigest() != expected.base_sha256:
        raise UserError(_wrong_base(name, record, first))
    if expected.kind != EQUAL and of_result.hexdigest() != expected.sha256:
        raise UserError(f"{name} of {second.name} is damaged (its checksum differs): download or make the diff again")


def _check_inputs(record: DiffRecord, first: Source, old: Weights, second: Source, stored: Weights) -> None:
    """What the headers tell about a wrong base or a damaged diff, before anything is written."""
    for tensor in (tensor for file in record.weights for tensor in file.tensors):
        kind = record.tensors[tensor.name].kind
        if kind in FROM_BASE:
            before = old.tensors.get(tensor.name)
            if before is None or not tensor.is_like(before):
                raise UserError(_wrong_base(tensor.name, record, first))
        if kind in STORED:
            found = stored.tensors.get(tensor.name)
            if found is None or not stored_tensor(tensor, kind).is_like(found):
                raise UserError(
                    f"{second.name} is damaged ({tensor.name} is missing or of another size): download or make the "
                    "diff again"
                )
    if missing := [name for name in record.files if not (second.path / FILES / name).is_file()]:
        raise UserError(f"{second.name} lacks {FILES}/{missing[0]}: download or make the diff again")


def _wrong_base(name: str, record: DiffRecord, first: Source) -> str:
    origin = record.base
    commit = f" at commit {origin.revision}" if origin.revision else ""
    return (
        f"{first.name} is not the base of this diff ({name} is missing or differs): give {origin.name}{commit}, "
        "unchanged"
    )


def _bar(description: str, size: int) -> tqdm:
    return tqdm(total=size, desc=description, unit="B", unit_scale=True, unit_divisor=1024, leave=False)


def _bytes(size: int | str) -> int:
    from accelerate.utils import convert_file_size_to_int

    try:
        count = int(size) if str(size).isdecimal() else convert_file_size_to_int(size)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(f"max_shard_size is {size!r}, but it must be bytes or a size like 5GB")
    return count


def _card(record: DiffRecord) -> str:
    """A page for those who find the diff on the Hub."""
    base = record.base
    base_model = base.name if base.on_hub else None
    metadata = ModelCardData(base_model=base_model, tags=["linearize", "weight-difference"])
    commit = f", commit `{base.revision}`" if base.revision else ""
    return "\n".join(
        [
            front_matter(metadata),
            "",
            f"# {record.converted.name} as a difference from {base.name}",
            "",
            f"This is no model by itself: it is what one differs by from `{base.name}`{commit}. With `pip install "
            "linearize`, the model comes back byte for byte, every tensor checked:",
            "",
            "```bash",
            f"linearize diff recover {base.name} THIS_DIRECTORY_OR_REPOSITORY OUT",
            "```",
            "",
            f"The model's own files and card are in `{FILES}/`; `{DIFF_FILE}` lists tensors and checksums.",
            "",
        ]
    )
