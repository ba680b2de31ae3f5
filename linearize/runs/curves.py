"""Perplexity over the tokens of all stages of a run, the yardstick beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.runs.directory import YARDSTICK

UNITS = ((2e9, 1e9, ", billions"), (2e6, 1e6, ", millions"), (2e3, 1e3, ", thousands"), (0, 1, ""))
"""From how many tokens on an axis has a unit, the unit, and its name."""


def curves(stages: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Stage -> its points: tokens that the model was trained on in this run, and held-out perplexity.

    Args:
        stages: As `report.json` has them: `tokens`, `steps` and `validation`, steps with their perplexities.
    """
    found, before = {}, 0
    for name, done in stages.items():
        start = 0 if name == YARDSTICK else before
        each = done["tokens"] / max(done.get("steps") or 1, 1)
        points = [(start + step * each, value) for step, value in done.get("validation") or ()]
        if points:
            found[name] = points
        if name != YARDSTICK:
            before += done["tokens"]
    return found


def plot_curves(stages: Mapping[str, Any], path: Path, *, hidden: bool = False) -> None:
    """Draw them as `plots/perplexity.png` of a run directory; nothing without two points.

    Args:
        path: The run directory.
        hidden: The perplexity is that of an encoder's hidden tokens.
    """
    from linearize.training.log import has_matplotlib, write_figure

    lines = curves(stages)
    if sum(map(len, lines.values())) < 2 or not has_matplotlib():
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    most = max(x for points in lines.values() for x, _ in points)
    unit, shown = next((unit, name) for least, unit, name in UNITS if most >= least)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if name == YARDSTICK else {}
        label = "yardstick: the softmax teacher" if name == YARDSTICK else name
        axes.plot([x / unit for x, _ in points], [y for _, y in points], marker=".", label=label, **style)
    what = "perplexity of hidden tokens" if hidden else "perplexity"
    axes.set(xlabel=f"tokens trained on in this run{shown}", ylabel=f"{what}, log scale", yscale="log")
    axes.set_title("Validation text, by stage", fontsize=11)
    axes.set_xlim(left=0)
    values = [y for points in lines.values() for _, y in points]
    if max(values) > 1.5 * min(values):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.grid(alpha=0.3, axis="y")
    axes.legend(frameon=False)
    write_figure(figure, path / "plots" / "perplexity.png")
