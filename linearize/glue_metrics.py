"""The metrics of GLUE: by `evaluate`, whose script comes from the Hub, or by scikit-learn and scipy; the figures are
the same."""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from linearize.errors import UserError
from linearize.glue_tasks import TASKS

EVALUATE_METRIC = "evaluate-metric/glue"
INSTALL = "pip install 'linearize[eval]'"

Compute = Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]]


class GlueMetrics:
    """The metrics of some tasks.

    Attributes:
        source: What computes them, with its version.
        note: A sentence about the script from the Hub; "" where none was asked for.
    """

    def __init__(self, tasks: Sequence[str], kind: Literal["auto", "evaluate", "sklearn"]) -> None:
        """Load them.

        Args:
            tasks: Keys of `TASKS`.
            kind: auto: evaluate where its script can be had, else scikit-learn and scipy.

        Raises:
            UserError: What was asked for is not installed, or cannot be fetched.
        """
        self.source, self.compute, self.note = _load(tasks, kind)

    def scores(self, task: str, predictions: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
        """The metrics of a task; a correlation with predictions that are all alike is undefined and counts as 0.

        Args:
            task: A key of `TASKS`.
            predictions: A class or a number for each example.
            labels: What is right.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of undefined figures
            found = self.compute[task](list(predictions), list(labels))
        values = {name: float(found[name]) for name in TASKS[task].metrics}
        return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}


def _load(tasks: Sequence[str], kind: str) -> tuple[str, dict[str, Compute], str]:
    if kind == "sklearn":
        return *_load_sklearn(tasks), ""
    try:
        source, compute = _load_evaluate(tasks)
        return source, compute, f"Metrics by the script {EVALUATE_METRIC} of the Hub ({source})"
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed"
        if kind == "evaluate":
            raise UserError(f"metrics is evaluate, but {reason}: {INSTALL}.") from error
    except Exception as error:  # of the network, and of a script that was downloaded
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if kind == "evaluate":
            raise UserError(
                f"metrics is evaluate, but its script for GLUE cannot be loaded ({reason}): check the network, or set "
                "metrics to sklearn, which gives the same figures."
            ) from error
    source, compute = _load_sklearn(tasks)
    return source, compute, f"The metric script of the Hub cannot be had ({reason}): metrics by {source}"


def _load_evaluate(tasks: Sequence[str]) -> tuple[str, dict[str, Compute]]:
    import evaluate

    def load(task: str) -> Compute:
        metric = evaluate.load(EVALUATE_METRIC, task, keep_in_memory=True)
        return lambda predictions, labels: metric.compute(predictions=predictions, references=labels) or {}

    return f"evaluate {_version('evaluate')}", {task: load(task) for task in tasks}


def _load_sklearn(tasks: Sequence[str]) -> tuple[str, dict[str, Compute]]:
    try:
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    except ModuleNotFoundError as error:
        raise UserError(
            f"The metrics of GLUE need scikit-learn and scipy, and {error.name} is not installed: {INSTALL}."
        ) from error
    functions: dict[str, Callable[..., float]] = {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "matthews_correlation": matthews_corrcoef,
        "pearson": lambda labels, predictions: pearsonr(predictions, labels)[0],
        "spearmanr": lambda labels, predictions: spearmanr(predictions, labels)[0],
    }

    def of_task(task: str) -> Compute:
        return lambda predictions, labels: {
            name: math.nan if len(labels) < 2 and TASKS[task].is_regression else functions[name](labels, predictions)
            for name in TASKS[task].metrics
        }

    source = f"scikit-learn {_version('scikit-learn')} and scipy {_version('scipy')}"
    return source, {task: of_task(task) for task in tasks}


def _version(package: str) -> str:
    return importlib.metadata.version(package)
