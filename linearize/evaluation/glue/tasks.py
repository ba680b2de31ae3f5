"""The nine tasks of GLUE: their columns, labels, validation splits and metrics.

Source: Wang et al. 2018 (arXiv 1804.07461), table 1; column and label names are those of the dataset nyu-mll/glue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from linearize.errors import UserError

LABEL = "label"
LOWEST, HIGHEST = 0.0, 5.0
"""Least and greatest similarity of STS-B."""
METRIC_NAMES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson",
    "spearmanr": "Spearman",
}
"""Metric, as the Hub calls it -> how a table shows it."""


@dataclass(frozen=True)
class Task:
    """One task."""

    name: str
    """As tables show it."""
    columns: tuple[str, ...]
    """Columns of the first text and, of pairs, the second."""
    labels: tuple[str, ...] = ()
    """Names of the classes 0, 1, ...; none: a similarity from 0 to 5 is to be found."""
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)
    """Names of the validation splits."""

    @property
    def is_regression(self) -> bool:
        """Whether a number is to be found, and no class."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return len(self.labels) or 1

    @property
    def score_names(self) -> list[str]:
        """Every figure of the task: the metrics of each validation split."""
        return [score_name(metric, split) for split in self.validation for metric in self.metrics]

    def label_range(self) -> str:
        """What a label may be, in words."""
        if self.is_regression:
            return f"a number from {LOWEST:g} to {HIGHEST:g}"
        return ", ".join(f"{number} ({label})" for number, label in enumerate(self.labels))

    def read_label(self, value: Any) -> float | int | None:
        """A label as a number, from a number, its text or the name of a class; None where it is none of the task."""
        if isinstance(value, str) and value.strip() in self.labels:
            return self.labels.index(value.strip())
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            return None
        if self.is_regression:
            return number if LOWEST <= number <= HIGHEST else None
        return int(number) if number in range(len(self.labels)) else None


TASKS = {
    "cola": Task("CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": Task("SST-2", ("sentence",), ("negative", "positive")),
    "mrpc": Task("MRPC", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), (), ("pearson", "spearmanr")),
    "qqp": Task("QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": Task(
        "MNLI",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": Task("QNLI", ("question", "sentence"), ("entailment", "not_entailment")),
    "rte": Task("RTE", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": Task("WNLI", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def score_name(metric: str, split: str) -> str:
    """`accuracy`, or `accuracy_matched` where a task has several validation splits."""
    return metric + split.removeprefix("validation")


def shown_score(name: str) -> str:
    """How a table shows a figure of `Task.score_names`: `accuracy, matched`."""
    for metric, shown in METRIC_NAMES.items():
        if name.startswith(metric):
            where = name.removeprefix(metric).lstrip("_")
            return f"{shown}, {where}" if where else shown
    return name


def task_names(names: Sequence[str]) -> list[str]:
    """Names as the tasks are listed here: `SST-2` is `sst2`.

    Raises:
        UserError: There is no such task, or one is named twice.
    """
    found = []
    for name in names:
        plain = name.lower().replace("-", "").replace("_", "")
        if plain not in TASKS:
            raise UserError(f"Unknown task {name!r} in tasks: known are {', '.join(TASKS)}.")
        if plain in found:
            raise UserError(f"tasks names {plain} twice: leave one out.")
        found.append(plain)
    return found
