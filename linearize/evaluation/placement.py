"""Where windows and softmax layers of a model are, and what measuring said of its layers: one line and one plot."""

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from linearize.evaluation.plots import _figure, _save

SOFTMAX_COLOUR, WINDOW_COLOUR, KEPT_COLOUR = "tab:orange", "tab:blue", "tab:cyan"


def selection_sentence(summary: Mapping[str, Any]) -> str:
    """One line of a `stages.select.Selection.summary()`: "windows: 4 x 1024, 10 x 512; softmax layers: 7, 18; ..."; of
    layers that keep tokens beside it "windows + kept tokens: 4 x 512 + 512, ...".
    """
    windows, kept = summary["windows"], summary.get("kept") or [0] * len(summary["windows"])
    counts = Counter(option for option in zip(windows, kept, strict=True) if option[0] is not None)
    sizes = [f"{counts[x]} x {x[0]}" + (f" + {x[1]}" if x[1] else "") for x in sorted(counts, key=sum, reverse=True)]
    parts = [("windows + kept tokens: " if any(kept) else "windows: ") + ", ".join(sizes)]
    if softmax := [str(layer) for layer, window in enumerate(windows) if window is None]:
        parts.append("softmax layers: " + ", ".join(softmax))
    size, bounded, budget = summary["state_bytes"], sum(counts.values()), summary["budget_bytes"]
    spent = f"{size:,} bytes of state, {size // bounded:,} a layer"
    parts.append(spent + (f", of {budget:,}" if budget is not None else "") + (" beside softmax" if softmax else ""))
    return "; ".join([*parts, f"placed by {summary['ranking']}"])


def plot_placement(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Above, each layer's window, softmax layers marked; below, the divergence that each layer alone brings.

    Args:
        summary: of `stages.select.Selection.summary()`.
        path: the PNG.
    """
    windows, kept = summary["windows"], summary.get("kept") or [0] * len(summary["windows"])
    width = min(16.0, max(7.0, 0.3 * len(windows)))
    figure, (above, below) = _figure(height=5.6, width=width, rows=2)
    _draw_windows(above, windows, kept)
    _draw_divergences(below, summary)
    for axes in (above, below):
        axes.set_xlim(-0.8, len(windows) - 0.2)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels()
    _save(figure, path)


def _draw_windows(axes: Any, windows: list[int | None], kept: list[int | None]) -> None:
    bounded = {layer: window for layer, window in enumerate(windows) if window is not None}
    softmax = [layer for layer, window in enumerate(windows) if window is None]
    stores = {layer: tokens for layer, tokens in enumerate(kept) if tokens}
    sizes = sorted({window + stores.get(layer, 0) for layer, window in bounded.items()})
    floor, top = min(bounded.values()) / 2, max(sizes) * (4 if softmax else 1.6)
    axes.bar(
        list(bounded),
        [window - floor for window in bounded.values()],
        bottom=floor,
        color=WINDOW_COLOUR,
        label="window",
    )
    if stores:
        on_top = {"bottom": [bounded[layer] for layer in stores], "color": KEPT_COLOUR, "label": "kept tokens, on top"}
        axes.bar(list(stores), list(stores.values()), **on_top)
    if softmax:
        how = {"facecolor": "white", "edgecolor": SOFTMAX_COLOUR, "hatch": "///", "linewidth": 1.2}
        axes.bar(softmax, [top - floor] * len(softmax), bottom=floor, label="softmax, all tokens", **how)
    if softmax or stores:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    axes.set_yscale("log", base=2)
    axes.set_yticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(floor, top)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    axes.set(ylabel="tokens seen exactly" if stores else "window, tokens", xlabel="layer")


def _draw_divergences(axes: Any, summary: Mapping[str, Any]) -> None:
    """On a logarithmic axis, from which a divergence of nothing is left out."""
    least, windows = summary["least_divergence"], summary["windows"]
    softmax = [layer for layer, window in enumerate(windows) if window is None]
    placed = [layer for layer, window in enumerate(windows) if window is not None]
    label = f"alone with a window of {summary['least_window']:,}"
    axes.plot(range(len(least)), _positive(least), "o", color="tab:grey", markerfacecolor="white", label=label)
    chosen = [summary["divergence"][layer] for layer in placed]
    axes.plot(placed, _positive(chosen), "o", color=WINDOW_COLOUR, markersize=4, label="alone with its own window")
    for layer in softmax:
        axes.axvline(layer, color=SOFTMAX_COLOUR, linewidth=1, linestyle=":", zorder=0)
    if any(value > 0 for value in least):
        axes.set_yscale("log")
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.set(ylabel="divergence from the\nteacher, nats a token", xlabel="layer")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _positive(values: list[float]) -> list[float]:
    return [value if value > 0 else float("nan") for value in values]
