"""How much of a memory each token keeps: a learned gate per head, as the ops' `log_decay`; and what it reads.

Source: gates from the token, Lizard (2025, arXiv 2507.09025); from the key projection, Liger (2025, arXiv 2503.01496).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

GATES = ("none", "head", "token", "key")
INPUTS = {"token": "layer_input", "key": "unrotated_key"}
"""What a gate reads of what its attention is given (`MixerAttention.context`)."""


class DecayGate(nn.Module):
    """`log sigmoid(w . x + b)` per head, kept in float32 whatever the model's dtype.

    Args:
        heads: HK, those of the memory.
        width: of x; None leaves w out, so that every token is kept alike.
        start: b at the start, where w is 0.
    """

    def __init__(self, heads: int, width: int | None, start: float):
        super().__init__()
        self.start = start
        weight = None if width is None else nn.Parameter(torch.empty(heads, width, dtype=torch.float32))
        self.weight = weight
        self.bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))

    def reset_parameters(self) -> None:
        init.constant_(self.bias, self.start)
        if self.weight is not None:
            init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The logarithms, `(B, HK, T)` in float32 at least, all <= 0.

        Args:
            x: `(B, heads, T, width)`; heads divides HK. Without w only its shape matters.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            level = self.bias.to(dtype)[None, :, None].expand(x.shape[0], -1, x.shape[2])
            if self.weight is not None:
                weight = self.weight.to(dtype).unflatten(0, (x.shape[1], -1))
                level = level + torch.einsum("bgtd,grd->bgrt", x.to(dtype), weight).flatten(1, 2)
            return functional.logsigmoid(level)


def resolve_gate(gate: str | None, default: str, causal: bool) -> str:
    """The gate of a model, whose settings may leave it open.

    Raises:
        ValueError: an encoder is to have one.
    """
    if not causal and gate not in (None, "none"):
        raise ValueError(
            f"gate is {gate!r}, and an encoder, which sees both sides at once, has no memory that could "
            "forget: set gate to none"
        )
    return (gate or default) if causal else "none"


def make_gate(gate: str, heads: int, head_dim: int, layer_width: int | None, start: float) -> DecayGate | None:
    """The gate of settings, None where they have none; arguments as in `DecayGate`, widths of what it may read."""
    if gate == "none":
        return None
    if gate == "token" and layer_width is None:
        raise ValueError("a gate by the layer's input needs its width: give layer_width")
    widths = {"head": None, "token": layer_width, "key": head_dim}
    return DecayGate(heads, widths[gate], start)


def reads(before_position: bool, gate: str | None) -> tuple[str, ...]:
    """What an attention is given beside queries, keys and values: `unrotated_query` `(B, H, T, D)`, `unrotated_key`
    `(B, G, T, D)`, `layer_input` `(B, 1, T, E)`."""
    names = ["unrotated_query", "unrotated_key"] if before_position else []
    names += [INPUTS[gate]] if gate in INPUTS else []
    return tuple(dict.fromkeys(names))


def check_context(reads: tuple[str, ...], context: dict[str, Tensor]) -> None:
    """Refuse a call that gives something else than an attention `reads`."""
    if set(context) != set(reads):
        raise ValueError(
            f"an attention of these settings reads {', '.join(reads) or 'queries, keys and values alone'}, "
            f"and was given {', '.join(context) or 'nothing of it'}"
        )


def log_decay(
    module: DecayGate | None, gate: str, key: Tensor, padding_mask: Tensor | None, context: dict[str, Tensor]
) -> Tensor | None:
    """What the op takes of that name: `(B, HK, T)`, None without a gate; key where only its shape is read."""
    if module is None:
        return None
    x = context[INPUTS[gate]] if gate in INPUTS else key
    if gate in INPUTS and padding_mask is not None:  # it may hold NaN, which the gradient of w would keep
        x = x.masked_fill(~padding_mask.bool()[:, None, :, None], 0.0)
    return module(x)
