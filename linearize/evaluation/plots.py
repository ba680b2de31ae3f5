"""The report's two pictures: perplexity of the arms, and the linear branch's share by layer."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot_arms(
    perplexities: Mapping[str, float], path: str | os.PathLike[str], *, reference: str | None = None
) -> None:
    """Horizontal bars, one a row, on a logarithmic axis (the linear arm alone is often a hundred times the rest).

    Args:
        perplexities: name of the row -> perplexity.
        path: the PNG.
        reference: row whose value is drawn as a line through all bars.
    """
    figure, axes = _figure(height=1.2 + 0.42 * len(perplexities))
    names, values = list(perplexities), list(perplexities.values())
    colours = ["tab:grey" if "teacher" in n or "control" in n else "tab:blue" for n in names]
    bars = axes.barh(names, values, color=colours, height=0.7)
    axes.bar_label(bars, labels=[f"{value:.4g}" for value in values], padding=3)
    if reference is not None:
        axes.axvline(perplexities[reference], color="black", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.15, max(values) * 1.0 * (max(values) / min(values)) ** 0.15 * 1.1)
    axes.invert_yaxis()
    axes.set_xlabel("held-out perplexity, lower is better (log scale)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if max(values) / min(values) < 10 else "")
    _save(figure, path)


def plot_linear_share(per_layer: Mapping[int, float], path: str | os.PathLike[str], *, mean: float) -> None:
    """Bars of the linear branch's share by layer.

    Args:
        per_layer: layer index -> share in [0, 1].
        path: the PNG.
        mean: drawn as a line.
    """
    figure, axes = _figure(height=3.6)
    axes.bar(list(per_layer), list(per_layer.values()), color="tab:orange")
    axes.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=f"mean {mean:.3f}")
    axes.set(xlabel="layer", ylabel="linear branch's share\nof the denominator", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    _save(figure, path)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
