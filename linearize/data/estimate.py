"""How many tokens a text has, from a part of it."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.data.documents import resolve_format, tokenize_records
from linearize.data.sequences import open_training_source
from linearize.data.sources import TextFile, expand, is_local

if TYPE_CHECKING:
    from linearize.config.settings import DataConfig
    from linearize.data.sources import Record, Source

SAMPLE_RECORDS = 2_000
SAMPLE_CHARACTERS = 2_000_000
SAMPLE_PIECES = 4
"""Of a text file, which is one record."""


def estimate_tokens(config: DataConfig, tokenizer: Any) -> tuple[int, bool] | None:
    """Tokens of the training text, and whether they were all counted; None of a Hub dataset, which is not fetched for
    this.

    Args:
        config: Which text, and how its records are read.
        tokenizer: That of the model.

    Raises:
        UserError: The text is missing, or cannot be read as the settings say.
    """
    names = [config.dataset] if isinstance(config.dataset, str) else config.dataset
    if not all(is_local(name) for name in names):
        return None
    source = open_training_source(config)
    sample, characters, ended = _sample(source, config.text_field)
    tokens = _count(sample, source, config, tokenizer)
    if not ended:
        whole = sum(_size(path) for name in names for path in expand(name))
        tokens = int(tokens * max(whole / max(characters, 1), 1.0))
    if config.max_tokens is not None and tokens > config.max_tokens:
        return config.max_tokens, ended
    return tokens, ended


def _sample(source: Source, column: str) -> tuple[list[Record], int, bool]:
    """The first records, the characters that they take in their file, and whether there are no more."""
    sample: list[Record] = []
    characters = 0
    for where, record in source.records():
        if characters >= SAMPLE_CHARACTERS or len(sample) >= SAMPLE_RECORDS:
            return sample, characters, False
        if isinstance(file := record.get(column), TextFile):
            parts = list(itertools.islice(file.pieces(), SAMPLE_PIECES))
            text = "".join(parts)
            sample.append((where, {**record, column: text}))
            characters += len(text)
            if len(parts) == SAMPLE_PIECES:
                return sample, characters, False
            continue
        sample.append((where, record))
        characters += len(json.dumps(record, ensure_ascii=False, default=str))
    return sample, characters, True


def _count(sample: list[Record], source: Source, config: DataConfig, tokenizer: Any) -> int:
    """Tokens of some records."""
    if tokenizer.eos_token_id is None:  # an encoder's rows are sentences of their own
        texts = [str(record.get(config.text_field, "")) for _, record in sample]
        return sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    format = resolve_format(source, config.format, config.text_field, config.messages_field)
    segments = tokenize_records(
        iter(sample),
        tokenizer,
        format,
        text_field=config.text_field,
        messages_field=config.messages_field,
        completion_only=format != "text" if config.completion_only is None else config.completion_only,
    )
    return sum(len(segment.ids) for segment in segments)


def _size(path: Path) -> int:
    """Bytes of a file's contents, unpacked."""
    if path.suffix == ".gz":
        with gzip.open(path) as stream:
            return sum(len(part) for part in iter(lambda: stream.read(1 << 20), b""))
    if path.suffix == ".parquet":
        import pyarrow.parquet

        data = pyarrow.parquet.ParquetFile(path).metadata
        return sum(data.row_group(i).total_byte_size for i in range(data.num_row_groups))
    return path.stat().st_size
