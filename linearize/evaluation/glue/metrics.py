"""The metrics of GLUE, by scikit-learn and scipy."""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from linearize.errors import UserError
from linearize.evaluation.glue.tasks import TASKS


class GlueMetrics:
    """The metrics of all tasks.

    Attributes:
        source: What computes them, with its version.
    """

    def __init__(self) -> None:
        """Load them.

        Raises:
            UserError: scikit-learn or scipy is not installed.
        """
        try:
            from scipy.stats import pearsonr, spearmanr
            from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
        except ModuleNotFoundError as error:
            raise UserError(
                f"The metrics of GLUE need scikit-learn and scipy, and {error.name} is not installed: "
                "pip install 'linearize[eval]'."
            ) from error
        self._functions: dict[str, Callable[..., float]] = {
            "accuracy": accuracy_score,
            "f1": f1_score,
            "matthews_correlation": matthews_corrcoef,
            "pearson": lambda labels, predictions: pearsonr(predictions, labels)[0],
            "spearmanr": lambda labels, predictions: spearmanr(predictions, labels)[0],
        }
        versions = (f"{package} {importlib.metadata.version(package)}" for package in ("scikit-learn", "scipy"))
        self.source = " and ".join(versions)

    def scores(self, task: str, predictions: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
        """The metrics of a task; a correlation with predictions that are all alike is undefined and counts as 0, and
        so does one of a single example.

        Args:
            task: A key of `TASKS`.
            predictions: A class or a number for each example.
            labels: What is right.
        """
        if TASKS[task].is_regression and len(labels) < 2:
            return dict.fromkeys(TASKS[task].metrics, 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of undefined figures
            values = {name: float(self._functions[name](labels, predictions)) for name in TASKS[task].metrics}
        return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}
