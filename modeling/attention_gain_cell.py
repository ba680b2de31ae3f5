"""GainCellAttention: attention as analog gain cells compute it, between trainable range scalers.

Source: Leroux et al. 2025 (Nature Computational Science 5, 813; arXiv 2409.19315). Keys and values live as voltages
in two arrays per head; a clamp takes the place of softmax and nothing is normalised, so four scalers per head (query,
key, value, output) fit a pretrained model's numbers to the cells' ranges.
"""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from .gain_cell import GainCell, GainCellNoise
from .op_dispatch import check_contract
from .op_gain_cell import CONTRACT, GRADIENTS, check_window, gain_cell_attention

CELL_KINDS = ("nonlinear", "linear")
INITIALIZATIONS = ("unit", "published")
SCALE_FLOOR = 1e-20


@strict
@dataclass
class GainCellAttentionConfig:
    """Settings of `GainCellAttention`; every one is written into config.json."""

    type: str = "gain_cell"
    window: int = 1024
    """Tokens that the ring of cells holds, the query's own included; a multiple of the cell's tile."""
    cell: dict[str, Any] | None = None
    """The device: `GainCell`'s fields; None is the paper's silicon-CMOS cell. Absent fields take its values."""
    cell_kind: str = "nonlinear"
    """`nonlinear`, the cell itself; `linear`, the linear cell that stands in for it in the first training stage."""
    gradient: str = "exact"
    """`exact`, of the cell's polynomial; `linear`, the published surrogate."""
    initialization: str = "unit"
    """Scalers before any adaptation: `unit` puts two deviations of unit-variance queries, keys and values into the
    ranges; `published` scales by 1 and moves keys and values to the middle voltage."""
    contract: int = CONTRACT
    """Contract of the op that the checkpoint was saved with."""

    def __post_init__(self) -> None:
        choices = {
            "type": ("gain_cell",),
            "cell_kind": CELL_KINDS,
            "gradient": GRADIENTS,
            "initialization": INITIALIZATIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        cell = GainCell.from_dict(self.cell or {})
        self.cell = cell.to_dict()
        check_window(self.window, cell.tile)
        check_contract("gain-cell attention", self.contract, CONTRACT)

    def resolve(self, head_dim: int) -> None:
        """Nothing depends on the model: wider heads take more sub-arrays."""


class RangeScaler(nn.Module):
    """`max(scale, 1e-20) x + offset` per head, float32.

    Args:
        heads: heads of x. scale, offset: starting values.
    """

    def __init__(self, heads: int, scale: float, offset: float):
        super().__init__()
        self.start = (scale, offset)
        self.scale = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.offset = nn.Parameter(torch.empty(heads, dtype=torch.float32))

    def reset_parameters(self) -> None:
        init.constant_(self.scale, self.start[0])
        init.constant_(self.offset, self.start[1])

    def forward(self, x: Tensor) -> Tensor:
        """`(B, heads, T, D)` in any dtype to float32 at least."""
        scale, offset = (p[:, None, None] for p in (self.scale.clamp(min=SCALE_FLOOR), self.offset))
        return x.to(torch.promote_types(x.dtype, torch.float32)) * scale + offset


class GainCellAttention(nn.Module):
    """Mixes tokens in place of softmax attention; the backbone projects and rotates before, and projects after.

    Args:
        config: settings, resolved.
        num_heads: H. num_key_value_heads: G. head_dim: D. scaling: of the softmax scores; the scalers replace it.

    Attributes:
        noise: deviations of the cells at run time, or None; never saved. Its seed is the layer's own.
    """

    arms = ("mixed",)

    def __init__(self, config, num_heads: int, num_key_value_heads: int, head_dim: int, scaling: float):
        super().__init__()
        device = GainCell.from_dict(config.cell)
        self.cell = device.linear() if config.cell_kind == "linear" else device
        self.window, self.gradient, self.op_backend = config.window, config.gradient, "auto"
        self.noise: GainCellNoise | None = None
        unit = config.initialization == "unit"
        (low, high), (bottom, top) = device.input_range, device.weight_range
        query = ((high - low) / 4, (high + low) / 2) if unit else (1.0, 0.0)
        stored = ((top - bottom) / 4 if unit else 1.0, device.offset)
        self.query_scaler = RangeScaler(num_heads, *query)
        self.key_scaler = RangeScaler(num_key_value_heads, *stored)
        self.value_scaler = RangeScaler(num_key_value_heads, *stored)
        self.output_scaler = RangeScaler(num_heads, 1.0, 0.0)

    @staticmethod
    def parameter_group(name: str) -> str:
        """Which learning rate a parameter takes."""
        return "scalers"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding_mask: Tensor | None = None,
        cache_layer=None,
        arm: str = "mixed",
        causal: bool = True,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: `(B, H, T, D)`; key, value: `(B, G, T, D)`; after RoPE, unscaled, never repeated.
            padding_mask: `(B, T)` of these tokens, 1 = real.
            cache_layer: holder of the ring, or None.
            arm: `mixed`, the only one.
            causal: True; a ring of cells has no future.
            cu_seqlens: `(N + 1,)`, where packed texts lie in a single row without padding and cache.

        Returns:
            `(B, H, T, D)` in the query's dtype.
        """
        if arm not in self.arms:
            raise ValueError(f"unknown arm {arm!r} of gain-cell attention: it has no branches, use mixed")
        if not causal:
            raise ValueError("gain-cell attention is causal: its ring holds the tokens before the query")
        output, state = gain_cell_attention(
            self.query_scaler(query),
            self.key_scaler(key),
            self.value_scaler(value),
            cell=self.cell,
            window=self.window,
            gradient=self.gradient,
            noise=self.noise,
            attention_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            initial_state=None if cache_layer is None else cache_layer.state,
            return_state=cache_layer is not None,
            backend=self.op_backend,
        )
        if cache_layer is not None:
            cache_layer.store(state, query.shape[2])
        output = self.output_scaler(output)
        if padding_mask is not None:
            output = output.masked_fill(~padding_mask.bool()[:, None, :, None], 0.0)
        return output.to(query.dtype)


def state_bytes(config, num_heads, num_key_value_heads, head_dim, num_tokens, dtype_bytes) -> int:
    """Bytes of one sequence's state after `num_tokens` tokens; the same for any number."""
    return config.window * (2 * num_key_value_heads * head_dim * 4 + 8) + 8
