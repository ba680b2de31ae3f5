"""Rows for encoders: one or several whole sentences of a document, between the tokenizer's own marks, padded.

An encoder reads sentences that start with its first mark and end with its last, so text is not packed as for a
decoder (`sequences.py`). Records are read as there, from local files or the Hub, and the rows are cached as there.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from linearize.data import packing as data_packing
from linearize.data.documents import BATCH_RECORDS, resolve_format, tokenizer_identity
from linearize.data.sequences import cache_root, main_process_first, open_data
from linearize.data.sources import Source, open_files, string_field
from linearize.data.vocabulary import vocabulary_size
from linearize.errors import UserError

if TYPE_CHECKING:
    from linearize.config.settings import DataConfig

logger = logging.getLogger(__name__)

SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")
LEAST_WORDS = 4
"""Shorter pieces are headings, numbers and debris rather than sentences."""
ROUND_TO = 8
"""Batches are cut to their longest row, rounded up to this many tokens."""


@dataclass(eq=False, repr=False)
class TextRows(Dataset):
    """Padded rows, a map-style dataset: `rows[i]` is `{"input_ids": (L,), "attention_mask": (L,)}`, int64 tensors."""

    input_ids: Any
    """(N, L) array of token ids, padded on the right."""
    lengths: Any
    """(N,) array: real tokens of each row."""
    identity: str = ""
    """Key of the cache's entry, which text, tokenizer and settings decide."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.array(self.input_ids[index], dtype=np.int64))
        return {"input_ids": ids, "attention_mask": (torch.arange(len(ids)) < int(self.lengths[index])).long()}

    def __repr__(self) -> str:
        return f"TextRows({len(self)} of at most {self.sequence_length} tokens)"

    @property
    def sequence_length(self) -> int:
        """Places in a row."""
        return self.input_ids.shape[1]


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as a batch without the columns that are padding in all of them."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if "attention_mask" not in batch:
        return batch
    longest = int(batch["attention_mask"].sum(1).max())
    kept = -(-longest // ROUND_TO) * ROUND_TO
    return {name: tensor[:, :kept] for name, tensor in batch.items()}


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order; a line break always ends one. Pieces of fewer than four words are left
    out."""
    pieces = (piece.strip() for line in text.splitlines() for piece in SENTENCE_END.split(line.strip()))
    return [piece for piece in pieces if len(piece.split()) >= LEAST_WORDS and re.search("[A-Za-z]", piece)]


def prepare_rows(config: DataConfig, tokenizer: Any) -> tuple[TextRows, TextRows]:
    """The training and the validation rows, from the cache where it has them.

    Raises:
        UserError: The data are missing, unreadable, no plain text, or too few.
    """
    return main_process_first(lambda: _prepare(config, tokenizer))


def held_out_documents(config: DataConfig) -> list[str]:
    """Texts of the validation documents: `data.validation`, or those that are carved off the training data.

    Raises:
        UserError: As `prepare_rows`.
    """
    train, validation = open_data(config)
    if validation is not None:
        return [text for _, text in _texts(validation, config.text_field)]
    chosen = _carved(train, config)
    return [text for number, text in _texts(train, config.text_field) if number in chosen]


def read_documents(paths: str | Path | Sequence[str | Path], text_field: str = "text") -> list[str]:
    """Texts of local files.

    Raises:
        UserError: They are missing, unreadable, or no plain text.
    """
    source = open_files([paths] if isinstance(paths, str | Path) else list(paths), text_field)
    return [text for _, text in _texts(source, text_field)]


def _texts(source: Source, text_field: str) -> Iterator[tuple[int, str]]:
    """The number and the text of each document."""
    resolve_format(source, "text", text_field, "")
    for number, (where, record) in enumerate(source.records()):
        yield number, string_field(record, text_field, where)


def _carved(source: Source, config: DataConfig) -> set[int]:
    """Numbers of the documents carved off for validation: at most a tenth of them, drawn with a fixed seed."""
    count = sum(1 for _ in source.records())
    wanted = min(config.validation_documents, count // 10)
    if config.validation_documents and not wanted:
        raise UserError(
            f"{source.name} holds {count} documents, too few to carve validation off: give data.validation, or set "
            "data.validation_documents to 0."
        )
    order = np.random.default_rng(data_packing.VALIDATION_SEED).permutation(count)
    return set(order[:wanted].tolist())


def _prepare(config: DataConfig, tokenizer: Any) -> tuple[TextRows, TextRows]:
    if config.format not in ("auto", "text") or config.completion_only:
        raise UserError("Encoders train on plain text: set data.format to text, and leave data.completion_only out.")
    train, validation = open_data(config)
    carved = set() if validation is not None else _carved(train, config)
    key = data_packing.cache_key(
        kind="rows",
        train=train.identity,
        validation=validation.identity if validation else len(carved),
        tokenizer=tokenizer_identity(tokenizer),
        marks=tokenizer("a")["input_ids"],
        field=config.text_field,
        sequence_length=config.sequence_length,
        sentences=config.sentences_per_row,
        max_tokens=config.max_tokens,
    )

    def build(folder: Path) -> dict[str, Any]:
        held_out = _texts(validation or train, config.text_field)
        kept = [text for number, text in held_out if validation is not None or number in carved]
        known = {_digest(text) for text in kept}
        rest = (text for _, text in _texts(train, config.text_field) if _digest(text) not in known)
        facts = {"validation": _write(folder, "validation", iter(kept), config, tokenizer)}
        facts["train"] = _write(folder, "train", rest, config, tokenizer)
        if not facts["train"]:
            raise UserError(f"{train.name} holds no sentence to train on: give text with whole sentences.")
        logger.info("%d training and %d validation rows.", facts["train"], facts["validation"])
        return facts

    entry = data_packing.cached(cache_root(config.cache_dir), key, build)
    return _open(entry, "train"), _open(entry, "validation")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _write(folder: Path, split: str, texts: Iterator[str], config: DataConfig, tokenizer: Any) -> int:
    """The rows of some documents; how many there are."""
    length, parts, lengths, total = config.sequence_length, [], [], 0
    dtype = data_packing.id_dtype(vocabulary_size(tokenizer))
    for batch in _batches(_joined(texts, config.sentences_per_row)):
        options = {"split_special_tokens": True, "return_attention_mask": False}
        rows = tokenizer(batch, truncation=True, max_length=length, **options)["input_ids"]
        padded = np.full((len(rows), length), tokenizer.pad_token_id or 0, dtype=dtype)
        for place, row in zip(padded, rows, strict=True):
            place[: len(row)] = row
        parts.append(padded)
        lengths += [len(row) for row in rows]
        total += sum(map(len, rows))
        if config.max_tokens is not None and total >= config.max_tokens:
            break
    np.save(folder / f"{split}_ids.npy", np.concatenate(parts) if parts else np.zeros((0, length), dtype=dtype))
    np.save(folder / f"{split}_lengths.npy", np.array(lengths, dtype=np.int32))
    return len(lengths)


def _joined(texts: Iterator[str], most: int) -> Iterator[str]:
    """One to `most` consecutive sentences at a time, each number as often, the same on every machine."""
    numbers = np.random.default_rng(data_packing.VALIDATION_SEED)
    for text in texts:
        sentences, start = split_sentences(text), 0
        while start < len(sentences):
            stop = start + int(numbers.integers(1, most + 1))
            yield " ".join(sentences[start:stop])
            start = stop


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH_RECORDS:
            yield batch
            batch = []
    if batch:
        yield batch


def _open(entry: Path, split: str) -> TextRows:
    ids, lengths = (entry / f"{split}_{name}.npy" for name in ("ids", "lengths"))
    rows = np.load(ids, mmap_mode="r") if len(np.load(lengths)) else np.load(ids)
    return TextRows(rows, np.load(lengths), entry.name)
