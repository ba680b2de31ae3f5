"""The mechanisms: one file each, one line here.

Model card, command line and tests read this table. Backbones are listed in `__init__.py`, which does not ship.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attention_cosine import CosineAttention, CosineAttentionConfig
from .attention_cosine import reads as cosine_reads
from .attention_cosine import state_bytes as cosine_state_bytes
from .attention_gain_cell import GainCellAttention, GainCellAttentionConfig
from .attention_gain_cell import state_bytes as gain_cell_state_bytes
from .attention_landmark import LandmarkAttention, LandmarkAttentionConfig
from .attention_landmark import calibrates as landmark_calibrates
from .attention_landmark import state_bytes as landmark_state_bytes
from .attention_linear import LinearAttention, LinearAttentionConfig
from .attention_linear import reads as linear_reads
from .attention_linear import state_bytes as linear_state_bytes
from .attention_salient import SalientAttention, SalientAttentionConfig
from .attention_salient import state_bytes as salient_state_bytes
from .cache_landmark import LandmarkStateLayer
from .cache_layers import CosineStateLayer, GainCellStateLayer, LinearStateLayer, SalientStateLayer


@dataclass(frozen=True)
class Mechanism:
    """What the rest of the project needs to know about an attention.

    state_bytes takes (config, num_heads, num_key_value_heads, head_dim, num_tokens, dtype_bytes). bidirectional:
    whether its forward takes `causal=False`, which encoders need. transfers: whether attention transfer has something
    to train in it. constant_state: whether its state never grows. in_place: whether a step can change its state in
    place, in the buffers of the attention's `new_buffers` and `read_buffers`, which captured decoding needs.
    calibrates: whether settings of it leave numbers that can be fitted to softmax attention before any training.
    reads: names of what a layer of these settings is given beside queries, keys and values (`MixerAttention.context`).
    """

    attention: type[nn.Module]
    config: type
    cache_layer_type: str
    state_bytes: Callable[..., int]
    title: str
    paper: str
    bidirectional: bool
    transfers: bool = True
    constant_state: bool = True
    in_place: bool = False
    calibrates: Callable[[Mapping[str, Any]], bool] = lambda settings: False
    reads: Callable[[Any], tuple[str, ...]] = lambda settings: ()


ATTENTIONS = {
    "linear": Mechanism(
        LinearAttention,
        LinearAttentionConfig,
        LinearStateLayer._layer_type,
        linear_state_bytes,
        "hybrid linear attention (Hedgehog feature maps with a softmax window)",
        "https://arxiv.org/abs/2410.10254",
        bidirectional=True,
        in_place=True,
        reads=linear_reads,
    ),
    "cosine": Mechanism(
        CosineAttention,
        CosineAttentionConfig,
        CosineStateLayer._layer_type,
        cosine_state_bytes,
        "cosine attention (unit queries and keys without softmax, beside a softmax window)",
        "https://arxiv.org/abs/2409.18747",
        bidirectional=True,
        calibrates=lambda settings: True,
        reads=cosine_reads,
    ),
    "gain_cell": Mechanism(
        GainCellAttention,
        GainCellAttentionConfig,
        GainCellStateLayer._layer_type,
        gain_cell_state_bytes,
        "analog gain-cell attention (voltages on a ring of cells, a clamp instead of softmax)",
        "https://arxiv.org/abs/2409.19315",
        bidirectional=False,
        calibrates=lambda settings: True,
    ),
    "landmark": Mechanism(
        LandmarkAttention,
        LandmarkAttentionConfig,
        LandmarkStateLayer._layer_type,
        landmark_state_bytes,
        "landmark attention (a grouped softmax over the blocks that it retrieves)",
        "https://arxiv.org/abs/2305.16300",
        bidirectional=False,
        transfers=False,
        constant_state=False,
        calibrates=landmark_calibrates,
    ),
    "salient": Mechanism(
        SalientAttention,
        SalientAttentionConfig,
        SalientStateLayer._layer_type,
        salient_state_bytes,
        "salient-token attention (a softmax over a window, sinks, and the old tokens most looked at)",
        "https://arxiv.org/abs/2306.14048",
        bidirectional=False,
        transfers=False,
        in_place=True,
    ),
}


def mechanism(name: str) -> Mechanism:
    """Look up a mechanism.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"unknown attention {name!r}: choose one of {', '.join(ATTENTIONS)}")
    return ATTENTIONS[name]


def resolve_settings(settings: Any, head_dim: int, backbone: Any) -> None:
    """Fill in what depends on the model.

    Args:
        settings: of a mechanism. backbone: a converted config, or its class.
    """
    if settings.type in ("linear", "cosine"):
        settings.resolve(head_dim, rotary=not backbone.learned_positions, causal=not backbone.sees_both_sides)
    else:
        settings.resolve(head_dim)
