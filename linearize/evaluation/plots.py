"""Pictures: perplexity of the arms, the linear branch's share by layer, gain cells with noise and with other cells,
retrieval and perplexity over the context length.
"""

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearize.evaluation.by_length import LengthReport
    from linearize.evaluation.cell_sweeps import SweepReport
    from linearize.evaluation.context_curve import ContextPerplexityReport
    from linearize.evaluation.noise import NoiseReport
    from linearize.evaluation.retrieval import RetrievalReport


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
    from matplotlib.ticker import LogLocator

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
    grey = ", grey: untrained" if any(name in untrained for name in names if name != reference) else ""
    axes.set_xlabel(f"held-out perplexity, bars from {start:.4g} ({reference}), log scale{grey}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if room > 3:  # labels of all of a decade's lines would run into each other
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if room < 10 else "")
    axes.tick_params(axis="x", which="both", pad=4)
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
    axes.set(xlabel="layer", ylabel="linear branch's share\nof the output", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_noise(report: "NoiseReport", path: str | os.PathLike[str]) -> None:
    """Perplexity of every trial, their mean with one standard deviation to either side, and the noiseless model."""
    from linearize.evaluation.labels import describe

    spread = report.perplexity()
    figure, axes = _figure(height=3.6)
    axes.plot([t.seed for t in report.trials], [t.perplexity for t in report.trials], "o", label="trial")
    axes.axhline(spread.mean, color="tab:blue", linewidth=1.2, label=f"mean {spread.mean:.5g}")
    if spread.deviation is not None and math.isfinite(spread.deviation):
        band = (spread.mean - spread.deviation, spread.mean + spread.deviation)
        axes.axhspan(
            *band, color="tab:blue", alpha=0.15, linewidth=0, label=f"± one deviation, {spread.deviation:.2g}"
        )
    noiseless = report.noiseless_perplexity
    axes.axhline(noiseless, color="black", linewidth=1.2, linestyle="--", label=f"without noise {noiseless:.5g}")
    axes.set(xlabel="seed of the trial", ylabel="held-out perplexity", title=f"noise {describe(report.noise)}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def plot_cell_sweeps(report: "SweepReport", path: str | os.PathLike[str]) -> None:
    """Perplexity over leak rate and over weight levels, each on a scale of its own; the checkpoint's values ringed."""
    figure, panels = _figure(height=3.8, panels=2)
    sweeps = ((f"leak rate, 1x = {report.leak_unit}", report.leak), ("weight levels", report.weight_levels))
    for axes, (name, points) in zip(panels, sweeps, strict=True):
        places = range(len(points))
        line = axes.axhline(report.own_perplexity, color="black", linewidth=0.8, linestyle="--")
        axes.plot(places, [point.perplexity for point in points], "o-")
        own = [place for place, point in enumerate(points) if point.own]
        ring = axes.scatter(
            own, [report.own_perplexity] * len(own), s=160, facecolors="none", edgecolors="black", zorder=3
        )
        axes.set_xticks(places, [point.label for point in points])
        axes.set_xlabel(name)
        axes.margins(0.12)
        axes.ticklabel_format(axis="y", useOffset=False)
    panels[0].set_ylabel("held-out perplexity")
    label = f"the checkpoint's own cells, {report.own_perplexity:.5g}"
    figure.legend([(line, ring)], [label], loc="outside upper center", frameon=False)
    _save(figure, path)


def plot_heat_map(report: "RetrievalReport", path: str | os.PathLike[str]) -> None:
    """Accuracy in percent by length and depth, one cell of each, from red to green; below, over all depths."""
    from linearize.evaluation.labels import depth_label, length_label

    lengths, depths = report.lengths, report.depths
    found = [result.depths() for result in lengths]
    cells = [[100 * column[depth].accuracy for column in found] for depth in range(depths)]
    figure, axes = _figure(height=1.7 + 0.34 * max(depths, 2), width=min(16, 2.4 + 0.85 * max(len(lengths), 3)))
    image = axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            colour = "black" if 12 < value < 90 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    names = [f"{length_label(x.length)}\n{100 * x.score().accuracy:.0f}%" for x in lengths]
    axes.set_xticks(range(len(lengths)), names)
    axes.set_yticks(range(depths), [depth_label(depth, depths) for depth in range(depths)])
    for row in range(1, depths):
        axes.axhline(row - 0.5, color="white", linewidth=1)
    for column in range(1, len(lengths)):
        axes.axvline(column - 0.5, color="white", linewidth=1)
    axes.tick_params(length=0)
    axes.set(xlabel="tokens of the prompt, accuracy over all depths", ylabel="depth of the fact")
    axes.set_title(f"{report.name}: accuracy, %", fontsize=11)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02).outline.set_visible(False)
    _save(figure, path)


def plot_context_perplexity(report: "ContextPerplexityReport", path: str | os.PathLike[str]) -> None:
    """Perplexity of the same tokens over the length of their context, which is on a logarithmic axis."""
    from linearize.evaluation.labels import length_label

    points = [found for found in report.lengths if math.isfinite(found.perplexity)]
    figure, axes = _figure(height=3.8)
    axes.plot([found.length for found in points], [found.perplexity for found in points], "o-")
    for found in points:
        offset = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{found.perplexity:.4g}", (found.length, found.perplexity), **offset)
    axes.set_xscale("log", base=2)
    lengths = [found.length for found in report.lengths]
    axes.set_xticks(lengths, [length_label(length) for length in lengths])
    axes.minorticks_off()
    axes.margins(x=0.06, y=0.2)
    values = [found.perplexity for found in points]
    ratio = max(values) / min(values) if values else 1.0
    logarithmic = ratio > 3
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if ratio < 10 else "")
    else:
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    scale = ", log scale" if logarithmic else ""
    axes.set(xlabel="tokens of the context, log scale", ylabel=f"perplexity of the same tokens{scale}")
    axes.set_title(report.describe(), fontsize=11)
    _save(figure, path)


def plot_by_length(report: "LengthReport", path: str | os.PathLike[str]) -> None:
    """Perplexity of each arm over the length of a piece, both on logarithmic axes; a panel of each text.

    An arm that is far worse than the others, as a memory alone can be, leaves the panel at its top: triangles.
    """
    from linearize.evaluation.labels import length_label

    texts, names = report.texts(), report.names()
    figure, _ = _figure(height=4.2, panels=len(texts), width=3.4 + 3.6 * len(texts))
    for axes, text in zip(figure.axes, texts, strict=True):
        curves = {name: [x for x in report.figures if (x.text, x.name) == (text, name)] for name in names}
        for place, (name, points) in enumerate(curves.items()):
            lengths, values = [x.times * report.trained for x in points], [x.perplexity for x in points]
            control = name.startswith(report.reference)
            style = {"color": f"C{place}", "linestyle": "--" if control else "-", "marker": "s" if control else "o"}
            axes.plot(lengths, values, label=name, **style)
        lengths = sorted({x.times * report.trained for points in curves.values() for x in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [length_label(length) for length in lengths])
        axes.set_yscale("log")
        low, top = _without_outliers([[x.perplexity for x in points] for points in curves.values()])
        axes.set_ylim(low, top)
        for place, points in enumerate(curves.values()):
            beyond = [x.times * report.trained for x in points if x.perplexity > top]
            axes.plot(beyond, [top] * len(beyond), "^", color=f"C{place}", clip_on=False, in_layout=False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if top / low < 12 else "")
        axes.set_title(text, fontsize=11)
        axes.set_xlabel(f"tokens of a piece (trained at {length_label(report.trained)})")
        axes.grid(axis="y", linewidth=0.5, alpha=0.5, which="both")
        axes.minorticks_on()
        axes.tick_params(axis="x", which="minor", length=0)
    figure.axes[0].set_ylabel("perplexity, log scale")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=2, fontsize=9)
    _save(figure, path)


def _without_outliers(curves: list[list[float]]) -> tuple[float, float]:
    """Limits of an axis that hold all values but those more than 4 times above each curve's best, in the median."""
    finite = [value for values in curves for value in values if math.isfinite(value)]
    typical = sorted(min(values) for values in curves if values)[len(curves) // 2]
    kept = [value for value in finite if value <= 4 * typical] or finite
    room = max(max(kept) / min(kept), 1.05) ** 0.08
    return min(kept) / room, max(kept) * room


def _figure(height: float, panels: int = 1, width: float = 8, rows: int = 1) -> tuple[Any, Any]:
    """A figure with its axes; an array of them where there are several, `panels` side by side or `rows` of one."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, panels)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
