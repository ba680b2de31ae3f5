"""Losses on their way to the reader: a JSON-lines log that survives a resume, plots, trackers, and the NaN abort."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.errors import UserError
from linearize.files import readable_write_errors, write_file

logger = logging.getLogger(__name__)

SILENT = ("none", "")
PROJECT = "linearize"
TRACKED_RUN = "trackers.json"


class TrainingDiverged(UserError):
    """A loss or a gradient is not finite; the sentence names the layer and the step."""


def check_finite(stage: str, step: int, values: Mapping[str, float], advice: str) -> None:
    """Stops the training at the first value that is not finite.

    Args:
        stage: name of the stage for the sentence.
        step: the step, counted from 1.
        values: what was measured, by name ("the loss of layer 7" -> value).
        advice: what to change.

    Raises:
        TrainingDiverged: before the optimiser has taken the value in.
    """
    wrong = [(name, value) for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        name, value = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise TrainingDiverged(
            f"{stage} stopped: {name} is {value} at step {step}{more}; {advice}. "
            "The last checkpoint holds the state before it"
        )


class TrainingLog:
    """One JSON object a line, one line per `logging_steps`.

    Args:
        path: the file, made with its directory.
        after_step: None starts an empty log; a number keeps the records up to that step, so that a resumed run
            leaves the log of an uninterrupted one.
        report_to: trackers that get the figures too; for them the path is RUN/logs/STAGE.jsonl.
        settings: of the stage, for the trackers.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        after_step: int | None = None,
        report_to: str | Sequence[str] = "none",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        names = tracker_names(report_to)
        kept = [] if after_step is None else [r for r in read_log(self.path) if r["step"] <= after_step]
        write_file(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.trackers = _Trackers(names, self.path, settings or {}) if names else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; it must have an integer `step`."""
        with readable_write_errors(self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.track(record["step"], record)

    def track(self, step: int, figures: Mapping[str, Any]) -> None:
        """Gives figures to the trackers alone; what is no number is left out."""
        if self.trackers is not None:
            self.trackers.log(step, figures)

    def close(self) -> None:
        """Ends the trackers."""
        if self.trackers is not None:
            self.trackers.finish()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a log, without a last line that a kill cut short; empty when there is no file."""
    records = []
    if Path(path).is_file():
        for line in Path(path).read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("%s: a line that was cut short is left out", path)
    return records


def tracker_names(report_to: str | Sequence[str]) -> list[str]:
    """The trackers asked for, without "none".

    Raises:
        UserError: one that accelerate does not know, or whose package is not installed (accelerate would be silent).
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    names = [report_to] if isinstance(report_to, str) else list(report_to)
    names = [name for name in names if name not in SILENT]
    known = [str(kind) for kind in LoggerType]
    available = [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(f"report_to: unknown tracker {name!r}; known are none, {', '.join(known)}")
        if name != "all" and name not in available:
            raise UserError(f"report_to: {name} is not installed; install it, or set report_to to none")
    return names


class _Trackers:
    """accelerate's trackers for one stage. All stages of a run directory are one run of one project: a stage's figures
    are called STAGE/figure, and its steps follow those of the stages before it.

    Args:
        names: of `tracker_names`.
        log: the stage's log, RUN/logs/STAGE.jsonl.
        settings: of the stage.
    """

    def __init__(self, names: list[str], log: Path, settings: Mapping[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

        logs = next(folder for folder in log.parents if folder.name == "logs")
        self.stage = log.relative_to(logs).with_suffix("").as_posix()
        run, self.first_step = _tracked_run(logs, self.stage)
        # Both go on with the run of that name; tensorboard with what lies in the folder.
        same_run: dict[str, dict[str, Any]] = {
            "wandb": {"id": run, "name": run, "resume": "allow"},
            "trackio": {"name": run, "resume": "allow"},
        }
        self.trackers = []
        for name in map(str, filter_trackers(names, str(logs))):
            kind, options = LOGGER_TYPE_TO_CLASS[name], same_run.get(name, {})
            if kind.requires_logging_directory:
                options = {**options, "logging_dir": str(logs)}
            self.trackers.append(kind(PROJECT, **options))
        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}
        for tracker in self.trackers:
            tracker.start()
            if tracker.name != "tensorboard":  # which would show the settings as another run
                tracker.store_init_configuration({f"{self.stage}/{key}": value for key, value in plain.items()})

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        numbers = {f"{self.stage}/{key}": x for key, x in figures.items() if isinstance(x, (int, float))}
        for tracker in self.trackers:
            tracker.log(numbers, step=self.first_step + step)

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()
        self.trackers.clear()


def _tracked_run(logs: Path, stage: str) -> tuple[str, int]:
    """The trackers' name of the run in a directory, and the steps of the stages before this one; kept for a resume."""
    path = logs / TRACKED_RUN
    if path.is_file():
        run = json.loads(path.read_text(encoding="utf-8"))
    else:
        run = {"name": f"{logs.resolve().parent.name}-{uuid.uuid4().hex[:8]}", "first_steps": {}}
    first_steps = run["first_steps"]
    if stage not in first_steps:
        ends = [first + _last_step(logs / f"{name}.jsonl") for name, first in first_steps.items()]
        first_steps[stage] = max(ends, default=0)
        write_file(path, json.dumps(run, indent=1).encode())
    return run["name"], first_steps[stage]


def _last_step(log: Path) -> int:
    return max((record["step"] for record in read_log(log)), default=0)


def has_matplotlib() -> bool:
    """Whether plots can be drawn; without it training goes on and says so once."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("matplotlib is not installed: no plots")
        return False
    return True


def plot_transfer(records: Sequence[Mapping[str, Any]], layers: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Draws stage 1: the mean losses over the steps, and the last losses of each layer.

    Args:
        records: the log, as `read_log` gives it.
        layers: index in the model of each logged layer.
        path: the PNG.
    """
    if not records or not has_matplotlib():
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curve_axes, layer_axes = figure.subplots(1, 2, width_ratios=(3, 4))
    last = records[-1]
    shown = [arm for arm in ("mixed", "linear") if _has(last, f"{arm}_layer_losses")]
    for arm, label, colour in (("mixed", "mixed output", "tab:blue"), ("linear", "linear arm alone", "tab:orange")):
        for prefix, style in (("", "-"), ("validation_", "--")):
            points = [(r["step"], r[f"{prefix}{arm}_loss"]) for r in records if _has(r, f"{prefix}{arm}_loss")]
            if points:
                name = f"{label}, validation" if prefix else label
                marker = "o" if prefix or len(points) == 1 else ""
                curve_axes.plot(
                    *zip(*points, strict=True), style, color=colour, label=name, marker=marker, markersize=4
                )
        if arm in shown:
            width = 0.8 / len(shown)
            places = [place + width * (shown.index(arm) + 0.5) - 0.4 for place in range(len(layers))]
            layer_axes.bar(places, last[f"{arm}_layer_losses"], width, color=colour, label=label)
    curve_axes.set(title="Attention transfer: mean over layers", xlabel="step", ylabel="loss", yscale="log")
    curve_axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    curve_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    curve_axes.yaxis.set_minor_locator(NullLocator())
    curve_axes.xaxis.get_major_locator().set_params(integer=True)
    layer_axes.set(title=f"By layer at step {last['step']}", xlabel="layer", ylabel="loss")
    every = math.ceil(len(layers) / 16)
    layer_axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    for axes in (curve_axes, layer_axes):
        axes.grid(alpha=0.3, which="both", axis="y")
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    write_figure(figure, path)


def _has(record: Mapping[str, Any], key: str) -> bool:
    return record.get(key) is not None


def write_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a plot as a PNG, whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format="png")
    write_file(path, image.getvalue())
