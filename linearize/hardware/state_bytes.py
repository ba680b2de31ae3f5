"""Bytes of the inference state of one sequence, from the config alone: the student's beside the teacher's KV cache."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from linearize.tables import Table, format_bytes

LENGTHS = (1024, 8192, 32768)  # tokens


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """After `tokens` tokens of one sequence: the student's whole cache (softmax layers included) and the teacher's."""

    tokens: int
    student: int
    teacher: int


def state_bytes(config: Any, lengths: Sequence[int] = LENGTHS, dtype: torch.dtype | None = None) -> list[StateBytes]:
    """Compute both caches of a converted model; an empty list for an encoder, which keeps none.

    Args:
        config: of a converted model (`config.mixer(i)`), or of a stock one, whose two figures are equal.
        lengths: tokens in the sequence.
        dtype: of cached keys and values; default the config's, or float32 where it names none.
    """
    from linearize.modeling import is_encoder

    if is_encoder(config):
        return []
    layers = range(config.num_hidden_layers)
    return [
        StateBytes(
            tokens,
            student=sum(layer_bytes(config, i, tokens, dtype) for i in layers),
            teacher=len(layers) * _key_value_bytes(config, tokens, dtype),
        )
        for tokens in lengths
    ]


def layer_bytes(config: Any, layer_idx: int, tokens: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of one layer's cache for one sequence of `tokens` tokens."""
    from linearize.modeling.registry import mechanism

    mixer = config.mixer(layer_idx) if hasattr(config, "mixer_types") else None
    if mixer is None:
        return _key_value_bytes(config, tokens, dtype)
    heads, key_value_heads, head_dim = attention_shape(config)
    count = mechanism(mixer.type).state_bytes
    return count(mixer, heads, key_value_heads, head_dim, tokens, _dtype_bytes(config, dtype))


def state_table(figures: Sequence[StateBytes]) -> Table:
    rows = [
        [f"{x.tokens:,}", format_bytes(x.student), format_bytes(x.teacher), f"{x.teacher / x.student:.2f}x"]
        for x in figures
    ]
    header = ["tokens", "converted", "KV cache of the teacher", "smaller by"]
    return Table("Inference state of one sequence", header, rows)


def softmax_window(config: Any) -> int | None:
    """Last tokens that softmax attention sees, of a converted model or a stock one; None where it sees all."""
    if hasattr(config, "mixer_types"):
        return config.softmax_window
    return config.sliding_window if config.model_type == "mistral" else None  # others may have one and not use it


def _key_value_bytes(config: Any, tokens: int, dtype: torch.dtype | None) -> int:
    window = softmax_window(config)
    tokens = tokens if window is None else min(tokens, window - 1)  # the next token is the window's last
    _, key_value_heads, head_dim = attention_shape(config)
    return 2 * tokens * key_value_heads * head_dim * _dtype_bytes(config, dtype)


def attention_shape(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and head dimension of a model."""
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _dtype_bytes(config: Any, dtype: torch.dtype | None) -> int:
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype.itemsize
