"""Energy, latency and sub-arrays of attention on gain cells, from the published figures in `gain_cell.yaml`."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from linearize.errors import UserError
from linearize.hardware.state_bytes import attention_shape
from linearize.modeling.gain_cell import GainCell

DEFAULT_WINDOW = 1024
COMPONENTS = ("scores", "values", "digital", "dac")
NO_ATTENTION = ("linear_attention", "conv")  # transformers' names of layers without keys and values
OF_THE_SIMULATION = ("output_grid", "surrogate_slope")  # fields of a cell that change no device


@functools.cache
def constants() -> dict[str, Any]:
    """The data file: published figures, their source and the scaling rule."""
    return yaml.safe_load(Path(__file__).with_name("gain_cell.yaml").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number, and whether the scaling rule took it beyond the published shape."""

    value: float
    extrapolated: bool


@dataclasses.dataclass(frozen=True)
class LayerEstimate:
    """One layer's attention per token, for layers with the same window and cell.

    Fields: layers, their indices; head_components_nj, of one query head; head_arrays, sub-arrays for K of one
    key/value head, and as many for V; layer_arrays, for K and V of all heads; reasons, what differs from the
    published shape.
    """

    layers: list[int]
    window: int
    cell: dict[str, Any]
    head_components_nj: dict[str, Figure]
    head_energy_nj: Figure
    energy_nj: Figure
    latency_ns: Figure
    head_arrays: Figure
    layer_arrays: Figure
    reasons: list[str]


@dataclasses.dataclass(frozen=True)
class HardwareEstimate:
    """The attention of a model per token.

    Fields: gain_cell_layers, whether the model has such layers: `layers` are those then, and all attention layers,
    as if converted, otherwise; energy_nj, latency_ns and arrays, sums over `layers`.
    """

    model_type: str
    num_layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    gain_cell_layers: bool
    layers: list[LayerEstimate]
    energy_nj: Figure
    latency_ns: Figure
    arrays: Figure


def estimate_hardware(config: Any, window: int = DEFAULT_WINDOW, cell: GainCell | None = None) -> HardwareEstimate:
    """Estimate the attention of a causal language model on gain cells.

    Args:
        config: of a stock or converted model. Gain-cell layers of a converted one bring window and cell along, and
            its other layers do not count.
        window: tokens whose keys and values a layer holds, a multiple of the cell's tile.
        cell: default the paper's.

    Raises:
        UserError: the model has no attention of this kind, or the window does not fit the tile; one sentence.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, key_value_heads, head_dim = _checked_shape(config)
    own = gain_cell_layers(config)
    chosen = own or dict.fromkeys(_attention_layers(config), (window, cell or GainCell()))
    if not chosen:
        raise UserError(f"This {config.model_type} model has no attention layers, so there is nothing to estimate.")
    alike: dict[tuple[int, GainCell], list[int]] = {}
    for index, settings in chosen.items():
        alike.setdefault(settings, []).append(index)
    layers = [_layer(heads, key_value_heads, head_dim, indices, *settings) for settings, indices in alike.items()]
    return HardwareEstimate(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        gain_cell_layers=bool(own),
        layers=layers,
        energy_nj=_sum([(layer.energy_nj, len(layer.layers)) for layer in layers]),
        latency_ns=_sum([(layer.latency_ns, len(layer.layers)) for layer in layers]),
        arrays=_sum([(layer.layer_arrays, len(layer.layers)) for layer in layers]),
    )


def gain_cell_layers(config: Any) -> dict[int, tuple[int, GainCell]]:
    """Window and cell of each gain-cell layer of a converted model; empty for other models."""
    mixers = getattr(config, "mixers", None) or {}
    return {
        index: (mixers[name]["window"], GainCell.from_dict(mixers[name]["cell"]))
        for index, name in enumerate(getattr(config, "mixer_types", None) or ())
        if name in mixers and mixers[name]["type"] == "gain_cell"
    }


def _attention_layers(config: Any) -> list[int]:
    """Layers with softmax attention in the stock model: all of a converted one."""
    kinds = None if hasattr(config, "mixer_types") else getattr(config, "layer_types", None)
    return [i for i in range(config.num_hidden_layers) if kinds is None or kinds[i] not in NO_ATTENTION]


def _checked_shape(config: Any) -> tuple[int, int, int]:
    name = f"This {config.model_type} model"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} has an encoder and a decoder: the estimate is for causal language models.")
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        raise UserError(f"{name} has no attention heads in its config, so there is nothing to estimate.")
    if getattr(config, "kv_lora_rank", None):
        raise UserError(f"{name} caches a latent in place of keys and values: no gain-cell figures apply to it.")
    heads, key_value_heads, head_dim = attention_shape(config)
    if config.model_type == "falcon":  # its config counts them in fields of its own
        key_value_heads = 1 if config.multi_query and not config.new_decoder_architecture else config.num_kv_heads
    return heads, key_value_heads, head_dim


def _layer(
    heads: int, key_value_heads: int, head_dim: int, layers: list[int], window: int, cell: GainCell
) -> LayerEstimate:
    """Apply the scaling rule of the data file to one layer."""
    data, published = constants(), constants()["published"]
    if window < 1 or window % cell.tile:
        raise UserError(f"The window is {window} tokens, but it must be a multiple of the cell's tile, {cell.tile}.")
    arrays = -(-head_dim // published["sub_array"][0]) * (window // cell.tile)
    reasons = _differences(head_dim, window, cell, heads // key_value_heads)
    beyond = bool(reasons)
    by_arrays, by_dimension = arrays / published["sub_arrays"], head_dim / published["head_dim"]
    scale = {"scores": by_arrays, "values": by_arrays, "digital": by_dimension, "dac": by_dimension}
    components = {name: data["energy_pj"][name] * scale[name] for name in COMPONENTS}
    head = sum(components.values())
    all_at_once = heads == published["heads"]
    if not all_at_once:
        reasons.append(f"{heads} heads at once, for the latency (published: {published['heads']})")
    return LayerEstimate(
        layers=layers,
        window=window,
        cell=cell.to_dict(),
        head_components_nj={name: Figure(value / 1000, beyond) for name, value in components.items()},
        head_energy_nj=Figure(head / 1000, beyond),
        energy_nj=Figure(heads * head / 1000, beyond),
        latency_ns=Figure(data["latency_ns"], beyond or not all_at_once),
        head_arrays=Figure(arrays, beyond),
        layer_arrays=Figure(2 * key_value_heads * arrays, beyond),
        reasons=reasons,
    )


def _differences(head_dim: int, window: int, cell: GainCell, group: int) -> list[str]:
    """What takes a layer's figures beyond the published ones."""
    published, paper = constants()["published"], GainCell()
    found = []
    if head_dim != published["head_dim"]:
        found.append(f"head dimension {head_dim} (published: {published['head_dim']})")
    if window != published["window"]:
        found.append(f"window {window:,} (published: {published['window']:,})")
    names = [field.name for field in dataclasses.fields(GainCell) if field.name not in OF_THE_SIMULATION]
    if changed := [name for name in names if getattr(cell, name) != getattr(paper, name)]:
        found.append(f"a cell with another {', '.join(changed)} than the paper's")
    if group > 1:
        found.append(f"{group} query heads on one key/value head (published: 1)")
    return found


def _sum(figures: Sequence[tuple[Figure, int]]) -> Figure:
    """Add figures up, each so many times."""
    return Figure(sum(f.value * times for f, times in figures), any(f.extrapolated for f, _ in figures))
