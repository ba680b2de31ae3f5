"""Benchmark tasks through lm-eval (EleutherAI's harness), on a live model.

A saved student also runs in the unmodified harness: `lm_eval run --model hf --model_args pretrained=DIR,...`.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.errors import UserError
from linearize.evaluation.arms import context_tokens, measuring
from linearize.tables import Table, format_number, markdown_tables, show_tables

CLOSE_NAMES = 5


@dataclasses.dataclass
class TaskScore:
    """One metric of one task; filter is lm-eval's way to read the answer ("none": as it is)."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int | None


@dataclasses.dataclass
class TaskReport:
    """Scores by task and metric, and the harness's own record."""

    scores: list[TaskScore]
    record: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def table(self) -> Table:
        rows = [
            [
                score.task,
                score.metric if score.filter == "none" else f"{score.metric} ({score.filter})",
                format_number(score.value),
                "-" if score.stderr is None else f"± {format_number(score.stderr, 2)}",
                "-" if score.samples is None else f"{score.samples:,}",
            ]
            for score in self.scores
        ]
        return Table("Tasks (lm-eval)", ["task", "metric", "value", "stderr", "samples"], rows)

    def show(self, console: Any = None) -> None:
        show_tables([self.table()], (), console)

    def markdown(self, heading: str = "###") -> str:
        return markdown_tables([self.table()], (), heading)

    def to_dict(self) -> dict[str, Any]:
        return {"scores": [dataclasses.asdict(score) for score in self.scores], "record": self.record}


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: float | None = None,
    batch_size: int = 1,
    output_path: str | os.PathLike[str] | None = None,
    arm: str | None = "mixed",
    num_fewshot: int | None = None,
) -> TaskReport:
    """Score a model on tasks of lm-eval.

    Args:
        model: student, stock model (arm None), or peft wrapper.
        tasks: names of tasks, groups or tags.
        include_path: folder with task YAMLs of one's own; with local data files nothing needs a network.
        limit: samples per task, or a fraction below 1; default all.
        batch_size: sequences per forward pass.
        output_path: JSON file for the scores and the harness's record.
        num_fewshot: examples in the prompt; default the task's own.

    Raises:
        UserError: lm-eval is missing, a task is unknown, or its data cannot be had.
    """
    lm_eval = _import_lm_eval()
    if not tasks:
        raise UserError("No task is named: give at least one, such as --tasks piqa,arc_easy.")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"The folder of tasks {str(include_path)!r} does not exist: check include_path.")
    manager = _task_manager(tasks, include_path)
    with _quiet_harness():
        loaded = _load_tasks(manager, tasks)
        with measuring(model, arm) as base:
            context = context_tokens(base.config, arm)  # as lm-eval itself would read it from a config that it knows
            harness = lm_eval.models.huggingface.HFLM(
                pretrained=base, tokenizer=tokenizer, batch_size=batch_size, max_length=context
            )
            record = lm_eval.simple_evaluate(
                model=harness,
                tasks=loaded,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
            )
    report = TaskReport(_scores(record), _plain(record))
    if output_path is not None:
        path = Path(output_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def check_tasks(tasks: Sequence[str], include_path: str | os.PathLike[str] | None = None) -> None:
    """Refuse, before anything is trained, what `run_tasks` would refuse after it.

    Raises:
        UserError: lm-eval is not installed, or a task that it does not know.
    """
    _import_lm_eval()
    _task_manager(tasks, include_path)


def _import_lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ModuleNotFoundError as error:
        raise UserError(
            f"Tasks need lm-eval, and {error.name} is not installed: pip install 'linearize[eval]'."
        ) from error
    return lm_eval


def _task_manager(tasks: Sequence[str], include_path: str | os.PathLike[str] | None) -> Any:
    """The harness's index of tasks; its own thousands are read (6 s) only when the given folder does not do.

    Raises:
        UserError: a name that neither knows.
    """
    import difflib

    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            close = difflib.get_close_matches(name, manager.all_tasks, CLOSE_NAMES)
            hint = f"close names are {', '.join(close)}" if close else "`lm_eval ls tasks` lists them all"
            raise UserError(f"Unknown task {name!r}: {hint}; tasks of your own are found through include_path.")
    return manager


def _load_tasks(manager: Any, tasks: Sequence[str]) -> list[Any]:
    """The tasks with their data, before anything runs: what fails here is the data and not the model."""
    built: list[Any] = []
    try:
        for name in tasks:
            loaded = manager.load([name])
            built += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    except (
        Exception
    ) as error:  # of the network, datasets, or the task's own file: their classes have nothing in common
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The data of {name} cannot be loaded ({reason}): check the network, or name tasks with local data files "
            "through include_path."
        ) from error
    return built


def _scores(record: dict[str, Any]) -> list[TaskScore]:
    scores = []
    for task, metrics in {**record["results"], **record.get("groups", {})}.items():
        samples = record.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            error = float(stderr) if isinstance(stderr, (int, float)) else None
            scores.append(TaskScore(task, metric, filter_name, float(value), error, samples))
    return scores


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """What of the harness's record is worth keeping, as plain JSON."""
    from lm_eval.utils import handle_non_serializable

    kept: dict[str, Any] = {
        key: record[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in record
    }
    kept["lm_eval_version"] = importlib.metadata.version("lm_eval")
    return json.loads(json.dumps(kept, default=handle_non_serializable))


class _quiet_harness:
    """lm-eval's warnings on every live model and its long task listing say nothing to our reader."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("lm_eval")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        self.logger.setLevel(self.level)
