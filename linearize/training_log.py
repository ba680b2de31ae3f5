"""Losses on their way to the reader: a JSON-lines log that survives a resume, plots, trackers, and the NaN abort."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpointing import readable_write_errors, write_file
from linearize.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

SILENT = ("none", "")


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
    """

    def __init__(self, path: str | os.PathLike[str], after_step: int | None = None) -> None:
        self.path = Path(path)
        kept = [] if after_step is None else [r for r in read_log(self.path) if r["step"] <= after_step]
        write_file(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; it must have an integer `step`."""
        with readable_write_errors(self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


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


def start_trackers(accelerator: Accelerator, config: Mapping[str, Any], project: str = "linearize") -> None:
    """Starts the accelerator's trackers (those of its `log_with`) with the settings that they can show."""
    plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in config.items()}
    if accelerator.log_with:
        accelerator.init_trackers(project, config=plain)


def finish_trackers(accelerator: Accelerator) -> None:
    """Ends the trackers. (`accelerator.end_training` would end the process group too, which stage 2 still needs.)"""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()


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
