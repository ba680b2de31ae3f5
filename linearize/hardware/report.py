"""The hardware estimate as tables and JSON, beside the GPU of this machine."""

import dataclasses
from typing import Any

import torch

from linearize.failures import stage
from linearize.hardware.estimate import (
    DEFAULT_WINDOW,
    Figure,
    HardwareEstimate,
    LayerEstimate,
    constants,
    estimate_hardware,
)
from linearize.hardware.gpu import GpuDecode, measure_gpu
from linearize.modeling.gain_cell import GainCell
from linearize.tables import Table, format_number, ranges, show_tables

MARK = "†"
TITLES = {
    "scores": "QK^T, arrays and converters, nJ",
    "values": "AV, arrays and converters, nJ",
    "digital": "digital and routing, nJ",
    "dac": "DAC, nJ",
}


@dataclasses.dataclass(frozen=True)
class HardwareReport:
    """An estimate and what was measured beside it; gpu is empty where no GPU is visible."""

    model: str
    estimate: HardwareEstimate
    gpu: list[GpuDecode]

    def tables(self) -> list[Table]:
        tables = [self._layer_table(layer) for layer in self.estimate.layers]
        if len(tables) > 1:
            tables.append(self._total_table())
        if self.gpu:
            tables.append(self._gpu_table())
        return tables

    def notes(self) -> list[str]:
        """What the figures cover, where they come from, and why some carry the mark."""
        data, estimate = constants(), self.estimate
        source, published = data["source"], data["published"]
        notes = [
            f"Source: {source['paper']}; published for heads of D = {published['head_dim']}, a window of "
            f"{published['window']:,} tokens and {published['heads']} heads at once; estimated by circuit simulation.",
            data["scope"],
            self._which_layers(),
        ]
        if estimate.heads > estimate.key_value_heads:
            notes.append(data["grouped_heads"])
        if reasons := list(dict.fromkeys(reason for layer in estimate.layers for reason in layer.reasons)):
            notes.append(f"{MARK} Extrapolated: {'; '.join(reasons)}. Rule: {data['scaling']}.")
        return [*notes, self._gpu_note()]

    def show(self, console: Any = None) -> None:
        """Print tables and notes."""
        show_tables(self.tables(), self.notes(), console)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "notes": self.notes()}

    def _layer_table(self, layer: LayerEstimate) -> Table:
        count, heads, groups = len(layer.layers), self.estimate.heads, self.estimate.key_value_heads
        rows = [
            [TITLES[name], *_cells(figure, heads, heads * count)] for name, figure in layer.head_components_nj.items()
        ]
        rows += [
            ["energy per token, nJ", *_cells(layer.head_energy_nj, heads, heads * count)],
            ["latency per token, ns", "-", *_cells(layer.latency_ns, count)],
            ["sub-arrays for K, as many for V", *_cells(layer.head_arrays, groups, groups * count)],
            ["sub-arrays in all", "-", *_cells(layer.layer_arrays, count)],
        ]
        title = (
            f"{self.model} on gain cells: layers {ranges(layer.layers)}, window {layer.window:,}, {heads} heads of "
            f"D = {self.estimate.head_dim}, {groups} key/value heads"
        )
        return Table(title, ["", "a head", "a layer", "one layer" if count == 1 else f"{count} layers"], rows)

    def _total_table(self) -> Table:
        estimate = self.estimate
        rows = [
            ["energy per token, nJ", _cell(estimate.energy_nj)],
            ["latency per token, ns", _cell(estimate.latency_ns)],
            ["sub-arrays in all", _cell(estimate.arrays)],
        ]
        return Table("All these layers", ["", "value"], rows)

    def _gpu_table(self) -> Table:
        rows = [
            [f"gain cells, window {x.window:,}", "1", *[_cell(x.latency_ns)] * 2, _cell(x.energy_nj)]
            for x in self.estimate.layers
        ]
        rows += [
            [
                f"{x.device}, window {x.window:,}",
                str(x.batch),
                *map(format_number, (x.step_ns, x.token_ns, x.token_nj)),
            ]
            for x in self.gpu
        ]
        header = ["", "sequences", "step, ns", "a token, ns", "a token, nJ"]
        return Table("The attention of one layer, one new token a sequence", header, rows)

    def _which_layers(self) -> str:
        estimate = self.estimate
        counted = sum(len(layer.layers) for layer in estimate.layers)
        if estimate.gain_cell_layers:
            return f"Counted are the model's {counted} gain-cell layers of {estimate.num_layers} layers."
        return (
            f"The model has no gain-cell layers: counted are its {counted} attention layers of {estimate.num_layers} "
            "layers, as if each were converted."
        )

    def _gpu_note(self) -> str:
        if not self.gpu:
            return "No GPU was measured: none is visible."
        energy = (
            "its energy is the whole board's by NVML, idle power included"
            if all(x.token_nj is not None for x in self.gpu)
            else "its energy is unknown: that takes nvidia-ml-py and a board with an energy counter"
        )
        return (
            f"GPU: SDPA in {self.gpu[0].dtype}, one query token a sequence over the whole window, CUDA graph, inputs "
            f"not in the L2 cache, median; {energy}."
        )


def hardware_report(
    model: str, config: Any, window: int = DEFAULT_WINDOW, cell: GainCell | None = None
) -> HardwareReport:
    """Estimate a model's attention and, where a GPU is visible, measure softmax attention of the same shape there.

    Args:
        model: its name, for the title.
        config, window, cell: as in `estimate_hardware`.
    """
    found = estimate_hardware(config, window, cell)
    gpu: list[GpuDecode] = []
    if torch.cuda.is_available():
        with stage("timing the GPU", "choose a smaller window"):
            for tokens in dict.fromkeys(layer.window for layer in found.layers):
                gpu += measure_gpu(found.heads, found.key_value_heads, found.head_dim, tokens)
    return HardwareReport(model, found, gpu)


def _cell(figure: Figure, times: int = 1) -> str:
    value = figure.value * times
    shown = f"{value:,}" if isinstance(value, int) else format_number(value)
    return f"{shown} {MARK}" if figure.extrapolated else shown


def _cells(figure: Figure, *times: int) -> list[str]:
    """A figure for one, and for so many."""
    return [_cell(figure), *(_cell(figure, number) for number in times)]
