"""SalientAttention: softmax over a window, sinks, and the old tokens that their window looked at most.

A state of constant size that holds exact keys and values alone. There is nothing to learn in it: the model adapts to
it by LoRA or by training all weights. Sources: see `op_salient.py`.
"""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from .op_dispatch import check_contract
from .op_salient import CONTRACT, salient_attention
from .op_salient_chunked import SalientState, Settings, empty_state
from .op_salient_decode import SalientBuffers, new_buffers, read_buffers, salient_step_

ARMS = ("mixed", "softmax")


@strict
@dataclass
class SalientAttentionConfig:
    """Settings of `SalientAttention`; every one is written into config.json."""

    type: str = "salient"
    window: int = 224
    """Tokens in the window, the query itself included."""
    sinks: int = 4
    """First tokens of a sequence that always stay."""
    kept_tokens: int = 220
    """Tokens that each key/value head keeps of those that have left the window; 0 leaves the window and the sinks."""
    age_penalty: float | int = 0.6
    """Nats that a kept token loses to newer ones in a thousand tokens."""
    contract: int = CONTRACT
    """Contract of the op that the checkpoint was saved with."""

    def __post_init__(self) -> None:
        if self.type != "salient":
            raise ValueError(f"type is {self.type!r}: choose one of salient")
        for name, least in (("window", 1), ("sinks", 0), ("kept_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it counts tokens and must be at least {least}")
        if not 0 <= self.age_penalty < float("inf"):
            raise ValueError(f"age_penalty is {self.age_penalty}: it must be a finite number of nats, at least 0")
        check_contract("salient-token attention", self.contract, CONTRACT)

    def resolve(self, head_dim: int) -> None:
        """Nothing depends on the model."""


class SalientAttention(nn.Module):
    """Mixes tokens in place of softmax attention; the backbone projects and rotates before, and projects after.

    Args:
        config: settings, resolved.
        num_heads: H. num_key_value_heads: G. head_dim: D. scaling: of the softmax scores.

    Attributes:
        arms: `mixed`; `softmax`, the window and sinks alone.
    """

    arms = ARMS
    read_buffers = staticmethod(read_buffers)

    def __init__(self, config, num_heads: int, num_key_value_heads: int, head_dim: int, scaling: float):
        super().__init__()
        self.window, self.sinks, self.kept_tokens = config.window, config.sinks, config.kept_tokens
        self.age_penalty, self.scaling, self.op_backend = config.age_penalty, scaling, "auto"
        self.head_dim = head_dim

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
            cache_layer: holder of the running state, or None; one with buffers takes a step of one token in place.
            arm: `mixed`; `softmax`, the window and sinks alone.
            causal: True.
            cu_seqlens: `(N + 1,)`, where packed texts lie in a single row without padding and cache.

        Returns:
            `(B, H, T, D)` in the query's dtype.
        """
        if not causal:
            raise ValueError("salient-token attention is causal: a token is kept by what later ones saw in it")
        settings = self._settings(arm)._asdict()
        if cache_layer is not None and cache_layer.buffers is not None:
            cache_layer.seen += query.shape[2]
            held = {"buffers": cache_layer.buffers, "count": cache_layer.count}
            options = {**settings, **held, "attention_mask": padding_mask, "backend": self.op_backend}
            return salient_step_(query, key, value, **options)
        output, state = salient_attention(
            query,
            key,
            value,
            **settings,
            attention_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            initial_state=None if cache_layer is None else cache_layer.state,
            return_state=cache_layer is not None,
            backend=self.op_backend,
        )
        if cache_layer is not None:
            cache_layer.store(state, query.shape[2])
        return output

    def new_buffers(
        self, num_key_value_heads: int, arm: str, batch: int, dtype: torch.dtype, device
    ) -> SalientBuffers:
        """What a step changes in place, for `batch` rows before their first token; dtype is that of keys and
        values."""
        return new_buffers(self.empty_state(num_key_value_heads, arm, dtype, device), batch)

    def empty_state(self, num_key_value_heads: int, arm: str, dtype: torch.dtype, device) -> SalientState:
        """The state of one row before its first token; dtype is that of keys and values."""
        key = torch.zeros(1, num_key_value_heads, 0, self.head_dim, dtype=dtype, device=device)
        return empty_state(key, key, key, self._settings(arm))

    def _settings(self, arm: str) -> Settings:
        if arm not in self.arms:
            raise ValueError(f"unknown arm {arm!r}: use one of {', '.join(self.arms)}")
        kept = self.kept_tokens if arm == "mixed" else 0
        return Settings(self.window, self.sinks, kept, float(self.age_penalty), self.scaling)


def state_bytes(config, num_heads, num_key_value_heads, head_dim, num_tokens, dtype_bytes) -> int:
    """Bytes of one sequence's state after `num_tokens` tokens; the same for any number."""
    slots = config.window + config.sinks + config.kept_tokens
    raw = 2 * slots * num_key_value_heads * head_dim * dtype_bytes
    return raw + 4 * num_key_value_heads * (config.window + config.kept_tokens) + 8
