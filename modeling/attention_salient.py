"""SalientAttention: softmax over a window, sinks, and the old tokens that their window looked at most.

A state of constant size that holds exact keys and values alone. There is nothing to learn in it: the model adapts to
it by LoRA or by training all weights. Sources: see `op_salient.py`.
"""

from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from .op_dispatch import check_contract
from .op_salient import CONTRACT, salient_attention

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

    def __init__(self, config, num_heads: int, num_key_value_heads: int, head_dim: int, scaling: float):
        super().__init__()
        self.window, self.sinks, self.kept_tokens = config.window, config.sinks, config.kept_tokens
        self.age_penalty, self.scaling, self.op_backend = config.age_penalty, scaling, "auto"

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
            cache_layer: holder of the running state, or None.
            arm: `mixed`; `softmax`, the window and sinks alone.
            causal: True.
            cu_seqlens: `(N + 1,)`, where packed texts lie in a single row without padding and cache.

        Returns:
            `(B, H, T, D)` in the query's dtype.
        """
        if arm not in self.arms:
            raise ValueError(f"unknown arm {arm!r}: use one of {', '.join(self.arms)}")
        if not causal:
            raise ValueError("salient-token attention is causal: a token is kept by what later ones saw in it")
        output, state = salient_attention(
            query,
            key,
            value,
            window=self.window,
            sinks=self.sinks,
            kept=self.kept_tokens if arm == "mixed" else 0,
            age_penalty=float(self.age_penalty),
            scaling=self.scaling,
            attention_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            initial_state=None if cache_layer is None else cache_layer.state,
            return_state=cache_layer is not None,
            backend=self.op_backend,
        )
        if cache_layer is not None:
            cache_layer.store(state, query.shape[2])
        return output


def state_bytes(config, num_heads, num_key_value_heads, head_dim, num_tokens, dtype_bytes) -> int:
    """Bytes of one sequence's state after `num_tokens` tokens; the same for any number."""
    slots = config.window + config.sinks + config.kept_tokens
    raw = 2 * slots * num_key_value_heads * head_dim * dtype_bytes
    return raw + 4 * num_key_value_heads * (config.window + config.kept_tokens) + 8
