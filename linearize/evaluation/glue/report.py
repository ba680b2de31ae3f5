"""The table of a run on GLUE: mean and deviation over the seeds of each figure, models side by side."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from linearize.evaluation.glue.tasks import TASKS, shown_score
from linearize.tables import Table, markdown_tables, show_tables

WITHOUT_WNLI = "average without WNLI"
AVERAGE = "average"


@dataclass
class Result:
    """One finetuning; a file in `results`."""

    model: str
    source: str
    """Id or path of the checkpoint."""
    revision: str | None
    """Of its repository, as asked for."""
    weights: str
    """The commit of its repository, or a hash of its files: `checkpoint_digest`."""
    architecture: str
    """Class of the model."""
    task: str
    learning_rate: float
    seed: int
    scores: dict[str, float]
    """Figure -> value, a share of 1: see `Task.score_names`."""
    train_examples: int
    validation_examples: int
    steps: int
    seconds: float
    """Duration of the training, of its last part where it was resumed."""
    peak_memory_bytes: int | None
    """Highest number of bytes that tensors held on the GPU; None on a CPU."""
    device: str
    """Name of the GPU, or cpu."""
    fresh: list[str]
    """What started at random beside the head."""
    data: str
    """Hash of the examples."""
    metrics: str
    """What computed the scores."""


@dataclass
class Score:
    """A figure of a model on a task, over the seeds."""

    task: str
    metric: str
    model: str
    learning_rate: float | None
    """The chosen one; None of an average over tasks."""
    mean: float
    spread: float | None
    """Sample standard deviation over the seeds; None of a single one."""
    seeds: dict[int, float]
    """Seed -> value."""


@dataclass
class GlueReport:
    """What a run measured; `report.json`."""

    models: list[str]
    scores: list[Score] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    """What computed the scores."""
    data: dict[str, Any] = field(default_factory=dict)
    """The settings of the data."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries."""
    results: list[Result] = field(default_factory=list)
    """Every finetuning."""

    def score(self, model: str, task: str, metric: str = "") -> Score:
        """A figure that is there; the metric may be left out of a task that has one."""
        return next(s for s in self.scores if (s.model, s.task) == (model, task) and metric in ("", s.metric))

    def table(self) -> Table:
        """Tasks below each other, models side by side; in hundredths."""
        found = {(score.task, score.metric, score.model): score for score in self.scores}
        lines = list(dict.fromkeys((score.task, score.metric) for score in self.scores))
        compared = len(self.models) == 2
        rows = []
        for task, metric in lines:
            cells = [found.get((task, metric, model)) for model in self.models]
            row = [TASKS[task].name if task in TASKS else task, shown_score(metric), *map(_cell, cells)]
            if compared:
                first, second = cells
                row.append(f"{100 * (second.mean - first.mean):+.2f}" if first and second else "-")
            rows.append(row)
        header = ["task", "metric", *self.models, *(["difference"] if compared else [])]
        return Table("GLUE, validation examples (x 100)", header, rows)

    def show(self, console: Any = None) -> None:
        """Print the table."""
        show_tables([self.table()], self.notes, console)

    def markdown(self, heading: str = "###") -> str:
        """The table for a document."""
        return markdown_tables([self.table()], self.notes, heading)

    def to_json(self) -> str:
        """The contents of `report.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{100 * score.mean:.2f}" + ("" if score.spread is None else f" ± {100 * score.spread:.2f}")


def one_table(task: str, scores: Mapping[str, float]) -> Table:
    """The figures of a single finetuning, for the card of its model."""
    rows = [[shown_score(name), f"{100 * value:.2f}"] for name, value in scores.items()]
    return Table(f"{TASKS[task].name}, validation examples (x 100)", ["metric", "value"], rows)


def make_report(results: Sequence[Result], models: Sequence[str], data: Mapping[str, Any]) -> GlueReport:
    """Choose each model's learning rate for each task, and take means over the seeds.

    Args:
        results: Finetunings, in any order.
        models: Names, in the table's order.
        data: Settings of the data, for the report.
    """
    from linearize.config.record import library_versions

    metrics = sorted({result.metrics for result in results})
    report = GlueReport(list(models), metrics=metrics, data=dict(data), versions=library_versions())
    report.results = list(results)
    chosen = {}
    for task in TASKS:
        for model in models:
            of_both = [result for result in results if (result.model, result.task) == (model, task)]
            if of_both:
                chosen[task, model] = best = _best_rate(of_both)
                report.scores += _scores(task, model, best)
    _add_averages(report, chosen)
    report.notes = _notes(report, results)
    return report


def task_score(result: Result) -> float:
    """The mean of a finetuning's figures."""
    return statistics.fmean(result.scores.values())


def _best_rate(results: Sequence[Result]) -> list[Result]:
    """The finetunings at the rate that is best over the seeds, of the rates that have most seeds by now."""
    by_rate: dict[float, list[Result]] = {}
    for result in results:
        by_rate.setdefault(result.learning_rate, []).append(result)
    return max(by_rate.values(), key=lambda group: (len(group), statistics.fmean(map(task_score, group))))


def _scores(task: str, model: str, results: Sequence[Result]) -> list[Score]:
    rate = results[0].learning_rate
    return [
        _over_seeds(task, name, model, rate, {result.seed: result.scores[name] for result in results})
        for name in TASKS[task].score_names
    ]


def _over_seeds(task: str, metric: str, model: str, rate: float | None, seeds: dict[int, float]) -> Score:
    values = [seeds[seed] for seed in sorted(seeds)]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Score(task, metric, model, rate, statistics.fmean(values), spread, dict(sorted(seeds.items())))


def _add_averages(report: GlueReport, chosen: Mapping[tuple[str, str], Sequence[Result]]) -> None:
    """The mean over tasks of a task's mean figure, for each seed that all of them have."""
    tasks = list(dict.fromkeys(task for task, _ in chosen))
    sets = {AVERAGE: tasks, WITHOUT_WNLI: [task for task in tasks if task != "wnli"] if "wnli" in tasks else []}
    for name, members in sets.items():
        for model in report.models:
            if len(members) < 2 or any((task, model) not in chosen for task in members):
                continue
            values = [{result.seed: task_score(result) for result in chosen[task, model]} for task in members]
            seeds = set.intersection(*(set(of_task) for of_task in values))
            means = {seed: statistics.fmean(of_task[seed] for of_task in values) for seed in seeds}
            if means:
                report.scores.append(_over_seeds(name, f"{len(members)} tasks", model, None, means))


def _notes(report: GlueReport, results: Sequence[Result]) -> list[str]:
    seeds = sorted({result.seed for result in results})
    notes = [
        f"Mean and sample standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))})."
        if len(seeds) > 1
        else f"One seed ({seeds[0]})."
        if seeds
        else "Nothing is finished yet."
    ]
    if report.metrics:
        notes.append(f"Metrics by {' and by '.join(report.metrics)}.")
    rates = sorted({result.learning_rate for result in results})
    if len(rates) > 1:
        picked = "; ".join(
            f"{model}: "
            + ", ".join(
                f"{TASKS[score.task].name} {score.learning_rate:g}"
                for score in report.scores
                if score.model == model and score.metric == _first_metric(score.task)
            )
            for model in report.models
        )
        notes.append(
            "For each model and task the learning rate that is best on these same examples, out of "
            f"{', '.join(f'{rate:g}' for rate in rates)} ({picked})."
        )
    if limit := report.data.get("max_examples"):
        notes.append(f"The first {limit:,} examples of each split alone: no figures to compare with published ones.")
    fresh = [model for model in report.models if any(r.fresh for r in results if r.model == model)]
    if fresh:
        others = [model for model in report.models if model not in fresh]
        advice = f", unlike that of {', '.join(others)} (reset_pooler starts all alike)" if others else ""
        notes.append(f"The pooler of {', '.join(fresh)} started at random{advice}.")
    return notes


def _first_metric(task: str) -> str:
    return TASKS[task].score_names[0] if task in TASKS else ""
