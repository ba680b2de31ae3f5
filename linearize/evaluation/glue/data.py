"""The examples of a GLUE task: from the Hub, or from local files of the same columns; checked, then tokenised.

A .tsv file is read as GLUE's own are, where a quotation mark is a character like any other; a .csv file has quoted
fields.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from linearize.data.rows import ROUND_TO
from linearize.data.sources import Record, Source, open_files, open_source
from linearize.errors import UserError
from linearize.evaluation.glue.settings import GlueDataConfig
from linearize.evaluation.glue.tasks import LABEL, TASKS, Task

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
BATCH = 1000
"""Examples tokenised together."""


@dataclass
class Split:
    """The examples of a split."""

    texts: list[list[str]]
    """The first texts and, of pairs, the second ones."""
    labels: list[float] | list[int]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class TaskData:
    """The examples of a task."""

    train: Split
    validation: dict[str, Split]
    """Name of the split -> its examples."""

    def identity(self) -> str:
        """Hash of all that was read."""
        parts = [self.train, *self.validation.values()]
        content = json.dumps([[part.texts, part.labels] for part in parts])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_task(name: str, config: GlueDataConfig) -> TaskData:
    """The examples of a task.

    Args:
        name: A key of `TASKS`.
        config: Where they are.

    Raises:
        UserError: They are missing or cannot be read, lack a column, or have labels that are none of the task.
    """
    task = TASKS[name]
    splits = [_read_split(name, split, config) for split in ("train", *task.validation)]
    return TaskData(splits[0], dict(zip(task.validation, splits[1:], strict=True)))


def _read_split(name: str, split: str, config: GlueDataConfig) -> Split:
    task, source = TASKS[name], _open_split(name, split, config)
    columns = [*task.columns, LABEL]
    texts: list[list[str]] = [[] for _ in task.columns]
    labels: list[Any] = []
    for where, record in itertools.islice(source.records(), config.max_examples):
        if missing := [column for column in columns if column not in record]:
            there = ", ".join(str(column) for column in record if column is not None)
            raise UserError(
                f"{source.name} has no column {missing[0]}, but {task.name} needs {_join(columns)}: its columns are "
                f"{there}."
            )
        for column, values in zip(task.columns, texts, strict=True):
            if not isinstance(record[column], str):
                raise UserError(f"The column {column} in {where} holds {record[column]!r}, but it must be text.")
            values.append(record[column])
        label = task.read_label(record[LABEL])
        if label is None:
            raise UserError(
                f"The label in {where} is {record[LABEL]!r}, but a label of {task.name} is {task.label_range()}."
            )
        labels.append(label)
    if not labels:
        raise UserError(f"{source.name} holds no examples: give a file with rows of {_join(columns)}.")
    return Split(texts, labels)


def _open_split(name: str, split: str, config: GlueDataConfig) -> Source:
    if config.folder is not None:
        return _open_file(_find_file(config.folder / name, split, TASKS[name]))
    if config.dataset.startswith((".", "/", "~")):
        raise UserError(f"There is no folder {config.dataset}: check data.dataset.")
    try:
        return open_source(config.dataset, dataset_config=name, split=split, revision=config.revision)
    except UserError as error:
        local = f"set data.dataset to a folder that holds {name}/{split}{KINDS[0]} and the like"
        if isinstance(error.__cause__, ConnectionError | TimeoutError):
            raise UserError(
                f"The Hub cannot be reached for {config.dataset}, which is not in the local cache: check the network, "
                f"or {local}."
            ) from error
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise UserError(f"{config.dataset} is read by datasets: pip install datasets, or {local}.") from error
        raise


def _find_file(folder: Path, split: str, task: Task) -> Path:
    found = [folder / f"{split}{kind}" for kind in KINDS if (folder / f"{split}{kind}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has {found[0].name} and {found[1].name}: keep one of them.")
    if not found:
        what = "training" if split == "train" else "validation"
        kinds = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise UserError(
            f"There is no {what} file of {task.name}: give {folder / split} as {kinds}, with the columns "
            f"{_join([*task.columns, LABEL])}."
        )
    return found[0]


def _open_file(path: Path) -> Source:
    if path.suffix in (".csv", ".tsv"):
        return Source(str(path), "", lambda: _table_rows(path))
    return open_files([path])


def _table_rows(path: Path) -> Iterator[Record]:
    """The rows of a .csv or .tsv file, whose first row names the columns."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8.") from error
    except OSError as error:
        raise UserError(f"The data file {path} cannot be read: {error.strerror}.") from error
    is_tsv = path.suffix == ".tsv"
    quoting: Any = csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if is_tsv else ",", quoting=quoting)
    try:
        for row in reader:
            where = f"line {reader.line_num} of {path}"
            if None in row or None in row.values():
                count = len(reader.fieldnames or ())
                raise UserError(f"There are not {count} fields in {where}, as there are columns: mend or remove it.")
            yield where, dict(row)
    except csv.Error as error:
        raise UserError(f"Line {reader.line_num} of {path} cannot be read ({error}): write the file again.") from error


def _join(columns: Sequence[str]) -> str:
    return f"{', '.join(columns[:-1])} and {columns[-1]}"


# --- tokens


@dataclass(eq=False, repr=False)
class GlueRows(Dataset):
    """Tokenised examples of different lengths, a map-style dataset of dictionaries."""

    input_ids: list[list[int]]
    token_type_ids: list[list[int]]
    labels: list[float] | list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids[index],
            "token_type_ids": self.token_type_ids[index],
            "labels": self.labels[index],
        }


def tokenize(split: Split, tokenizer: Any, sequence_length: int) -> GlueRows:
    """The examples between the tokenizer's own marks, pairs cut where they are longest.

    Segments are what the tokenizer gives by itself, all 0 where it gives none: whoever uses the finetuned model calls
    it so too.
    """
    ids: list[list[int]] = []
    types: list[list[int]] = []
    for start in range(0, len(split), BATCH):
        texts = [column[start : start + BATCH] for column in split.texts]
        encoded = tokenizer(*texts, truncation=True, max_length=sequence_length)
        ids += encoded["input_ids"]
        types += encoded.get("token_type_ids") or [[0] * len(row) for row in encoded["input_ids"]]
    return GlueRows(ids, types, split.labels)


def collate(rows: Sequence[dict[str, Any]], padding: int) -> dict[str, Tensor]:
    """Examples as a batch, padded on the right to the longest; `labels` are int64, or float32 of a regression."""
    longest = -(-max(len(row["input_ids"]) for row in rows) // ROUND_TO) * ROUND_TO
    batch = {
        name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
        for name, filler in (("input_ids", padding), ("token_type_ids", 0))
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch
