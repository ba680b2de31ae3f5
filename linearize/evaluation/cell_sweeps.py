"""What a gain-cell model's perplexity does over the leak of its cells and over the levels of a stored voltage.

Nothing is trained: the cells are exchanged at run time, everything else stays as the checkpoint has it.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from linearize.evaluation.arms import gain_cell_layers
from linearize.evaluation.next_token import PerplexityResult, perplexity
from linearize.modeling import GainCell
from linearize.tables import Table, format_number, show_tables

LEAK_FACTORS = (0, 1, 4, 16)
WEIGHT_LEVELS = (4, 8, 16)


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One setting: its label on the axis, the perplexity, nats per token, and whether it is the checkpoint's own."""

    label: str
    perplexity: float
    nll: float
    own: bool


@dataclasses.dataclass(frozen=True)
class SweepReport:
    """Both sweeps.

    Fields: tokens scored at each point; own_perplexity and own_nll (nats per token), of the checkpoint's own cells;
    leak_unit, what 1x of the leak is, in words; leak and weight_levels, the points in ascending order, `off` last.
    """

    tokens: int
    own_perplexity: float
    own_nll: float
    leak_unit: str
    leak: list[SweepPoint]
    weight_levels: list[SweepPoint]

    def table(self) -> Table:
        rows = []
        for name, points in (("leak rate", self.leak), ("weight levels", self.weight_levels)):
            for point in points:
                figures = [point.perplexity, point.perplexity / self.own_perplexity]
                own = "own" if point.own else ""
                rows.append([f"{name} {point.label}", format_number(figures[0]), f"{figures[1]:.3f}", own])
        title = f"Cells exchanged at run time, on {self.tokens:,} tokens"
        return Table(title, ["", "perplexity", "/ the checkpoint's own cells", ""], rows)

    def show(self, console: Any = None) -> None:
        show_tables([self.table()], [f"A leak of 1x is {self.leak_unit}."], console)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write cell_sweeps.json and cell_sweeps.png; returns the paths."""
        from linearize.evaluation.plots import plot_cell_sweeps

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "cell_sweeps.json", folder / "cell_sweeps.png"]
        paths[0].write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        plot_cell_sweeps(self, paths[1])
        return paths


@contextlib.contextmanager
def exchanged_cells(model: Any, change: Callable[[GainCell], GainCell]) -> Iterator[None]:
    """Within the block every gain-cell layer has the changed cell; then its own again."""
    layers = gain_cell_layers(model, "A sweep of the cells")
    before = {layer_idx: mixer.cell for layer_idx, mixer in layers.items()}
    try:
        for mixer in layers.values():
            mixer.cell = change(mixer.cell)
        yield
    finally:
        for layer_idx, mixer in layers.items():
            mixer.cell = before[layer_idx]


def sweep_cells(model: Any, blocks: Any, *, batch_size: int = 1) -> SweepReport:
    """Take the perplexity at every leak rate and at every number of weight levels, the other one as it is.

    The unit of the leak is each layer's own; where no layer leaks, that of the paper's cell. The checkpoint's own
    numbers of levels join the sweep. Settings that come to the same cells are measured once.

    Args:
        model: a student with gain-cell layers, adapters merged.
        blocks: held-out `TokenBlocks`.
        batch_size: blocks per forward pass.

    Raises:
        UserError: no gain-cell layer, or nothing to score.
    """
    own = [mixer.cell for mixer in gain_cell_layers(model, "A sweep of the cells").values()]
    leaks = sorted({cell.leak for cell in own})
    paper = GainCell().leak
    leak_unit = "each layer's own" if len(leaks) > 1 else f"{leaks[0] or paper:g} per token"
    levels: list[int | None] = sorted({*WEIGHT_LEVELS, *(cell.weight_levels for cell in own if cell.weight_levels)})

    def leaking(factor: int) -> Callable[[GainCell], GainCell]:
        return lambda cell: cell.replace(leak=factor * (cell.leak if leaks[-1] else paper))

    def levelled(number: int | None) -> Callable[[GainCell], GainCell]:
        return lambda cell: cell.replace(weight_levels=number)

    settings = [("leak", f"{factor}x" if factor else "0", leaking(factor)) for factor in LEAK_FACTORS]
    settings += [("levels", str(number or "off"), levelled(number)) for number in (*levels, None)]
    results: dict[tuple[GainCell, ...], PerplexityResult] = {}

    def measure(label: str, change: Callable[[GainCell], GainCell]) -> PerplexityResult:
        cells = tuple(map(change, own))
        if cells not in results:
            with exchanged_cells(model, change):
                results[cells] = perplexity(model, blocks, batch_size=batch_size, description=label)
        return results[cells]

    base = measure("own cells", lambda cell: cell)
    points: dict[str, list[SweepPoint]] = {"leak": [], "levels": []}
    for sweep, label, change in tqdm(settings, desc="sweeps", unit="setting", leave=False):
        found = measure(f"{sweep} {label}", change)
        is_own = list(map(change, own)) == own
        points[sweep].append(SweepPoint(label, found.perplexity, found.nll, is_own))
    return SweepReport(base.tokens, base.perplexity, base.nll, leak_unit, points["leak"], points["levels"])
