"""The report's two pictures: perplexity of the arms, and the linear branch's share by layer."""

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def plot_arms(
    perplexities: Mapping[str, float],
    path: str | os.PathLike[str],
    *,
    reference: str | None = None,
    untrained: Collection[str] = (),
) -> None:
    """Bars from the reference's perplexity to each row's, on a logarithmic axis: to the right is worse.

    Args:
        perplexities: name of the row -> perplexity; what is not finite is left out.
        path: the PNG.
        reference: the row that the bars start from; default the best.
        untrained: rows to draw in grey.
    """
    perplexities = {name: value for name, value in perplexities.items() if math.isfinite(value)}
    if not perplexities:
        return
    reference = reference if reference in perplexities else min(perplexities, key=perplexities.__getitem__)
    figure, axes = _figure(height=1.2 + 0.42 * len(perplexities))
    names, values, start = list(perplexities), list(perplexities.values()), perplexities[reference]
    colours = ["tab:grey" if name in untrained else "tab:blue" for name in names]
    axes.barh(names, [value - start for value in values], left=start, color=colours, height=0.7)
    axes.axvline(start, color="black", linewidth=0.8)
    axes.set_xscale("log")
    room = max(max(values) / min(values), 1.1)
    axes.set_xlim(min(values) / room**0.08, max(values) * room**0.15)
    for place, value in enumerate(values):
        offset = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{value:.4g}", (max(value, start), place), **offset)
    axes.invert_yaxis()
    axes.set_xlabel(f"held-out perplexity, bars from {start:.4g} ({reference}), log scale")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if room < 10 else "")
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
