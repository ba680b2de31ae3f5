"""From documents to sequences on disk: the token cache, the split, and the packing.

A cache entry is a folder named by its key. It is written under another name, its manifest last, and renamed into
place, so that an entry which can be found is complete. Two kinds of entry lie side by side: the tokenised documents of
a source, and the packed sequences of one length made from them; another length or split needs no second tokenisation.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from linearize.data.documents import Segment
from linearize.data.texts import CHUNK_ROWS, FittedRows, Places, row_positions
from linearize.errors import UserError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
"""Raised with any change of what the files of a cache entry mean."""
VALIDATION_SEED = 2357
"""Chooses the documents carved off for validation. Not the run's seed, so that all runs are measured on the same."""
_MANIFEST = "manifest.json"
_SCRATCH_NAME = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{12}\.tmp")
_STALE_SECONDS = 24 * 3600

Ranges = list[tuple[int, int]]
"""Half-open stretches (start, stop) of a token stream, in order."""


# ---- cache entries


def cache_key(**facts: Any) -> str:
    """Name of the entry that these facts decide."""
    text = json.dumps({"schema": SCHEMA_VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """Return the folder of a complete cache entry, building it if there is none.

    Args:
        build: Writes the entry's files into the folder it is given and returns facts for the manifest.
    """
    entry = root / key
    if read_manifest(entry) is not None:
        return entry
    scratch = root / f"{key}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        scratch.mkdir()
        facts = build(scratch)
        _write_manifest(scratch, key, facts)
        _move_into_place(scratch, entry)
    except OSError as error:
        raise UserError(
            f"The tokenised data cannot be written to {root} ({error.strerror or error}): free some space, or set "
            "data.cache_dir to another folder."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return entry


def read_manifest(entry: Path) -> dict[str, Any] | None:
    """The manifest of a complete entry, or None: no such entry, or a file is missing or holds something else."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_text())
        found = {name: _facts(entry / name, known["size"]) for name, known in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if found == manifest["files"] and manifest["key"] == entry.name else None


def read_facts(entry: Path) -> dict[str, Any]:
    """What the manifest of a complete entry says."""
    return json.loads((entry / _MANIFEST).read_text())


def _facts(file: Path, expected_size: int | None = None) -> dict[str, int]:
    """Size and checksum of a file; the checksum only where the size is the expected one.

    CRC-32 finds every flipped byte and reads gigabytes in seconds; nobody forges this cache.
    """
    size, checksum = file.stat().st_size, 0
    if expected_size in (None, size):
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                checksum = zlib.crc32(chunk, checksum)
    return {"size": size, "crc32": checksum}


def _write_manifest(folder: Path, key: str, facts: dict[str, Any]) -> None:
    files = sorted(folder.iterdir())
    for file in files:
        _flush_to_disk(file)
    manifest = {
        **facts,
        "key": key,
        "schema": SCHEMA_VERSION,
        "files": {file.name: _facts(file) for file in files},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))
    _flush_to_disk(folder / _MANIFEST)


def _flush_to_disk(file: Path) -> None:
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def _move_into_place(scratch: Path, entry: Path) -> None:
    try:
        os.replace(scratch, entry)
    except OSError:
        if read_manifest(entry) is not None:  # another process was faster
            return
        if not entry.exists():
            raise
        logger.warning("The cache entry %s is damaged and is replaced.", entry)
        damaged = entry.with_name(f"{entry.name}.{uuid.uuid4().hex[:12]}.tmp")
        os.replace(entry, damaged)
        os.replace(scratch, entry)
        shutil.rmtree(damaged, ignore_errors=True)


def _remove_stale(root: Path) -> None:
    """Remove what killed builds left, once it is too old to belong to a running one."""
    for folder in root.iterdir():
        if not _SCRATCH_NAME.fullmatch(folder.name):
            continue
        try:
            newest = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
        except OSError:  # gone meanwhile
            continue
        if time.time() - newest > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


# ---- tokenised documents


@dataclass(frozen=True)
class Documents:
    """The documents of a source, end to end."""

    ids: np.ndarray
    """(tokens,)"""
    supervised: np.ndarray | None
    """(tokens,) bool; none: every token."""
    ends: np.ndarray
    """(documents,) int64: where each document stops in `ids`."""

    @cached_property
    def starts(self) -> np.ndarray:
        """(documents,) int64: where each document begins."""
        return np.concatenate([[0], self.ends[:-1]])

    def content(self, index: int) -> bytes:
        """The tokens of one document, for comparison with another's."""
        return self.ids[self.starts[index] : self.ends[index]].tobytes()


def id_dtype(vocabulary_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)


def write_documents(
    folder: Path, segments: Iterable[Segment], dtype: np.dtype, max_tokens: int | None = None
) -> dict[str, Any]:
    """Write documents to a folder as they come, the last one cut at `max_tokens`; return facts for the manifest."""
    total = 0
    ends = array("q")
    with open(folder / "ids.bin", "wb") as ids_file, open(folder / "supervised.bin", "wb") as supervised_file:
        for segment in segments:
            room = len(segment.ids) if max_tokens is None else max_tokens - total
            ids = segment.ids[:room]
            ids_file.write(ids.astype(dtype).tobytes())
            if segment.supervised is not None:
                supervised_file.write(segment.supervised[:room].tobytes())
            total += len(ids)
            full = total == max_tokens
            if segment.ends_document or full:
                ends.append(total)
            if full:
                break
    np.save(folder / "ends.npy", np.array(ends, dtype=np.int64))
    if not (folder / "supervised.bin").stat().st_size:
        (folder / "supervised.bin").unlink()
    return {"tokens": total, "documents": len(ends), "dtype": dtype.name}


def read_documents(folder: Path) -> Documents:
    """Open documents without reading them into memory."""
    manifest = read_facts(folder)
    ids = np.memmap(folder / "ids.bin", dtype=manifest["dtype"], mode="r")
    mask = folder / "supervised.bin"
    supervised = np.memmap(mask, dtype=bool, mode="r") if mask.exists() else None
    return Documents(ids, supervised, np.load(folder / "ends.npy"))


# ---- split


def split_documents(documents: Documents, sequence_length: int, wanted: int) -> tuple[Ranges, Ranges]:
    """Choose the tokens of training and of validation; no document's tokens are in both.

    Validation takes `wanted` documents, drawn with `VALIDATION_SEED`, but at most a tenth of them, and more where
    these would not fill one sequence; both splits keep their documents' order. Documents equal to one of them leave
    the training split. With too few documents for that (one long file), validation is the end of the stream: the last
    tenth of its sequences, at most `wanted` and at least one.
    """
    total = len(documents.ids)
    count = len(documents.ends)
    if wanted == 0:
        return [(0, total)], []
    lengths = documents.ends - documents.starts
    order = np.random.default_rng(VALIDATION_SEED).permutation(count)
    drawn = min(wanted, count // 10)
    if drawn:
        one_sequence = int(np.searchsorted(np.cumsum(lengths[order]), sequence_length)) + 1
        drawn = max(drawn, one_sequence)
    if 0 < drawn <= count // 2:
        held_out = np.zeros(count, dtype=bool)
        held_out[order[:drawn]] = True
        validation = _ranges(documents, held_out)
        train = without(documents, ~held_out, documents, held_out)
        if sum(stop - start for start, stop in train) >= sequence_length:
            return train, validation
    sequences = total // sequence_length
    if sequences < 2:
        raise UserError(
            f"The data hold {total} tokens, fewer than the {2 * sequence_length} that one training and one validation "
            f"sequence of {sequence_length} tokens take: give more text, or lower data.sequence_length."
        )
    cut = total - sequence_length * max(1, min(wanted, sequences // 10))
    return [(0, cut)], [(cut, total)]


def without(documents: Documents, chosen: np.ndarray, others: Documents, excluded: np.ndarray) -> Ranges:
    """The stretches of the chosen documents, less those with the same tokens as an excluded document of `others`.

    Args:
        chosen: (documents,) bool.
        excluded: (documents of `others`,) bool.
    """
    known = {others.content(index) for index in np.flatnonzero(excluded).tolist()}
    lengths = documents.ends - documents.starts
    other_lengths = (others.ends - others.starts)[excluded]
    kept = chosen.copy()
    for index in np.flatnonzero(chosen & np.isin(lengths, other_lengths)).tolist():
        kept[index] = documents.content(index) not in known
    dropped = int(chosen.sum() - kept.sum())
    if dropped:
        logger.info("%d training documents equal a validation document and are left out.", dropped)
    return _ranges(documents, kept)


def _ranges(documents: Documents, kept: np.ndarray) -> Ranges:
    """Stretches of the kept documents, neighbours joined."""
    edges = np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8))
    first, last = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    return [(int(documents.starts[i]), int(documents.ends[j])) for i, j in zip(first, last, strict=True)]


# ---- packing


class StreamRows:
    """One stream of tokens cut into rows; only the rest of it that does not fill a row is left over.

    Args:
        ends: (documents,) where they stop in the stream. ranges: the stretches of it to take. length: tokens of a row.

    Attributes:
        count: rows. left_over: tokens that are in none. lengths: None, for no row is padded.
    """

    lengths = None

    def __init__(self, ends: np.ndarray, ranges: Ranges, length: int) -> None:
        self.ends, self.ranges, self.length = ends, ranges, length
        tokens = sum(stop - start for start, stop in ranges)
        self.count, self.left_over = divmod(tokens, length)

    def of(self, stream: Any) -> Iterator[np.ndarray]:
        """The rows of a stream, some (n, length) at a time."""
        return _blocks(stream, self.ranges, self.length)

    def positions(self) -> Iterator[np.ndarray]:
        """Positions that start again with each document and each row, alike."""
        return map(row_positions, self.of(Places(self.ends)))


def write_blocks(
    folder: Path, split: str, documents: Documents, rows: StreamRows | FittedRows, isolate: bool = False
) -> dict[str, Any]:
    """Write the rows that have a token to learn from.

    The first token of a row does not count: nothing in the row predicts it.

    Args:
        isolate: Documents are kept apart: positions are written that start again with each, and the first token of a
            document does not count either.
    """
    labelled = isolate or documents.supervised is not None or rows.lengths is not None
    kept = np.ones(rows.count, dtype=bool)
    if labelled:
        masks = (mask[:, 1:].any(axis=1) for mask in _counted(documents, rows, isolate))
        kept = np.concatenate([np.zeros(0, dtype=bool), *masks])
    count = int(kept.sum())

    def write(name: str, dtype: Any, chunks: Iterator[np.ndarray]) -> None:
        _write_rows(folder / f"{split}_{name}.npy", np.dtype(dtype), (count, rows.length), kept, chunks)

    if count:
        write("ids", documents.ids.dtype, rows.of(documents.ids))
        if labelled:
            pairs = zip(rows.of(documents.ids), _counted(documents, rows, isolate), strict=True)
            write("labels", np.int32, (np.where(mask, ids.astype(np.int32), np.int32(-100)) for ids, mask in pairs))
        if isolate:
            write("positions", np.int32, rows.positions())
        if rows.lengths is not None:
            np.save(folder / f"{split}_lengths.npy", rows.lengths[kept])
    return {
        "tokens": rows.left_over + (rows.count * rows.length if rows.lengths is None else int(rows.lengths.sum())),
        "sequences": count,
        "tokens_left_over": rows.left_over,
        "sequences_without_loss": len(kept) - count,
    }


def _counted(documents: Documents, rows: StreamRows | FittedRows, isolate: bool) -> Iterator[np.ndarray]:
    """Which tokens are learned from, some (n, length) at a time."""
    conditions: list[Iterator[np.ndarray]] = []
    if documents.supervised is not None:
        conditions.append(rows.of(documents.supervised))
    if isolate:
        conditions.append(positions > 0 for positions in rows.positions())
    if isinstance(rows, FittedRows):
        conditions.append(rows.real())
    return (np.logical_and.reduce(masks) for masks in zip(*conditions, strict=True))


def _write_rows(
    file: Path, dtype: np.dtype, shape: tuple[int, int], kept: np.ndarray, chunks: Iterator[np.ndarray]
) -> None:
    """Write the kept rows to an .npy file piece by piece: the pages of a memory map would stay in memory."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    seen = 0
    with open(file, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for chunk in chunks:
            stream.write(chunk[kept[seen : seen + len(chunk)]].astype(dtype, copy=False).tobytes())
            seen += len(chunk)


def _blocks(stream: np.ndarray, ranges: Ranges, sequence_length: int) -> Iterator[np.ndarray]:
    """Cut stretches of a stream, laid end to end, into (up to 1024, sequence_length), dropping the incomplete end."""
    size = CHUNK_ROWS * sequence_length
    parts: list[np.ndarray] = []
    held = 0
    for start, stop in ranges:
        while start < stop:
            part = stream[start : min(stop, start + size - held)]
            parts.append(part)
            held += len(part)
            start += len(part)
            if held == size:
                yield np.concatenate(parts).reshape(-1, sequence_length)
                parts, held = [], 0
    whole = held // sequence_length * sequence_length
    if whole:
        yield np.concatenate(parts)[:whole].reshape(-1, sequence_length)
