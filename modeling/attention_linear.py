"""LinearAttention: a softmax window and sinks beside per-head feature maps, one denominator.

Source: LoLCATs (Zhang et al. 2024, arXiv 2410.10254). The published form is `window_reference="max"`,
`window_shift=None`, `window_weight_form="sigmoid"`, `window_weight=0.1`, `magnitude=False`, `sinks=0`; the default
here lets a window that matches badly give way to the linear branch.
"""

import math
from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from .decay_gate import GATES, check_context, log_decay, make_gate, resolve_gate
from .decay_gate import reads as names_read
from .feature_maps import INITIALIZATIONS, WIDTH, FeatureMap, FeatureMapWeights
from .op_dispatch import take_contract
from .op_hybrid_linear import CONTRACT, HybridLinearState, hybrid_linear_attention, linear_share
from .op_hybrid_linear_decode import DecodeBuffers, hybrid_linear_step_, new_buffers, read_buffers

ARMS = ("mixed", "softmax", "linear")
MAP_INPUTS = ("projections", "rotated")
DEFAULT_MAP_INPUT, DEFAULT_GATE = "projections", "token"
CONTRACT_1 = {"map_input": "rotated", "gate": "none"}
"""What a config.json of contract 1, which lacks these settings, means; whatever the defaults are."""


@strict
@dataclass
class LinearAttentionConfig:
    """Settings of `LinearAttention`; every one is written into config.json."""

    type: str = "linear"
    window: int = 64
    """Tokens in the softmax window, the query itself included; 0 is pure linear attention."""
    sinks: int = 4
    """First tokens of a sequence that always stay in the softmax branch."""
    feature_map: str = "softmax"
    """`softmax` or `exp` (Hedgehog), `relu` (T2R), `elu`."""
    feature_dim: int | None = None
    """Width f of the maps; None takes min(head_dim, 64). `softmax` and `exp` give 2 f features."""
    magnitude: bool = True
    """Learn a direction that scales a token's features, which softmax features otherwise forget."""
    bias: bool = False
    """Learn a bias per head and feature inside the map."""
    initialization: str = "identity"
    """`identity` (a narrow map keeps whole RoPE pairs), the published `identity_first` (the first dimensions), or
    `kaiming`."""
    share_key_map: bool = False
    """One key map per key/value head: a state H / G times smaller."""
    window_reference: str = "logsumexp"
    """Level that the window's mass is measured from: `logsumexp`, or the published `max`."""
    window_weight: float | int = 16.0
    """Starting weight of the softmax branch."""
    window_weight_form: str = "log"
    """How the weight is learned: its logarithm, or the published `sigmoid` of a logit (weight below 1)."""
    window_shift: float | int | None = 0.5
    """Starting value of the learned shift per head; None leaves it out (published)."""
    map_input: str | None = None
    """What the maps read: `projections`, queries and keys before position, or `rotated`, as the scores do (published);
    None takes rotated. Without rotary positions both are the same."""
    gate: str | None = None
    """What the memory forgets with each token: `none` (published); `head`, a learned share; `token`, by the layer's
    input; `key`, by the key's projection. None takes none."""
    gate_bias: float | int = 6.0
    """Where a gate starts: each token multiplies the memory by the sigmoid of it."""
    contract: int = CONTRACT
    """Contract of the op that the checkpoint was saved with."""

    def __post_init__(self) -> None:
        choices = {
            "type": ("linear",),
            "feature_map": tuple(WIDTH),
            "initialization": INITIALIZATIONS,
            "window_reference": ("logsumexp", "max"),
            "window_weight_form": ("log", "sigmoid"),
            "map_input": (None, *MAP_INPUTS),
            "gate": (None, *GATES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(x for x in allowed if x is not None)
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {known}")
        for name in ("window", "sinks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it counts tokens and must be at least 0")
        if self.feature_dim is not None and self.feature_dim < 1:
            raise ValueError(f"feature_dim is {self.feature_dim}: it must be at least 1")
        if not 0 < self.window_weight < (math.inf if self.window_weight_form == "log" else 1):
            raise ValueError(
                f"window_weight is {self.window_weight}: it must be above 0, and below 1 in the sigmoid form"
            )
        if self.window_shift is not None and not math.isfinite(self.window_shift):
            raise ValueError(f"window_shift is {self.window_shift}: it must be a finite number, or None")
        if not math.isfinite(self.gate_bias):
            raise ValueError(f"gate_bias is {self.gate_bias}: it must be a finite number")
        take_contract(self, "linear attention", CONTRACT, CONTRACT_1)

    def resolve(self, head_dim: int, rotary: bool = True, causal: bool = True) -> None:
        """Fill in what depends on the model: its head dimension, whether it rotates, and whether a token sees only
        those before it.

        Raises:
            ValueError: one sentence.
        """
        self.map_input = (self.map_input or DEFAULT_MAP_INPUT) if rotary else "rotated"
        self.gate = resolve_gate(self.gate, DEFAULT_GATE, causal)
        if self.feature_dim is None:
            self.feature_dim = min(head_dim, 64)
        if self.initialization != "kaiming" and self.feature_dim > head_dim:
            raise ValueError(
                f"feature_dim {self.feature_dim} is wider than the head dimension {head_dim}: "
                "lower it, or use initialization 'kaiming'"
            )


class WindowMix(nn.Module):
    """The weight of the softmax branch per head, always positive, and the shift; float32."""

    def __init__(self, heads: int, config: LinearAttentionConfig):
        super().__init__()
        self.form, self.start, self.shift_start = config.window_weight_form, config.window_weight, config.window_shift
        self.weight = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        shift = None if self.shift_start is None else nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.shift = shift

    def reset_parameters(self) -> None:
        raw = math.log(self.start) if self.form == "log" else math.log(self.start / (1 - self.start))
        init.constant_(self.weight, raw)
        if self.shift is not None and self.shift_start is not None:
            init.constant_(self.shift, self.shift_start)

    def forward(self, x: Tensor, log_weight: bool = False) -> tuple[Tensor, Tensor | None]:
        """The weight `(H,)`, or its logarithm, and the shift `(H,)` or None; x as in `FeatureMap`."""
        return self.log_window_weight() if log_weight else self.window_weight(), self.shift

    def window_weight(self) -> Tensor:
        return self.weight.exp() if self.form == "log" else self.weight.sigmoid()

    def log_window_weight(self) -> Tensor:
        return self.weight if self.form == "log" else nn.functional.logsigmoid(self.weight)


class LinearAttention(nn.Module):
    """Mixes tokens in place of softmax attention; the backbone projects and rotates before, and projects after.

    Args:
        config: settings, resolved.
        num_heads: H. num_key_value_heads: G. head_dim: D. scaling: of the softmax scores.
        layer_width: E, of the layer's input; for a gate that reads it.
    """

    arms = ARMS
    read_buffers = staticmethod(read_buffers)

    def __init__(
        self,
        config,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        scaling: float,
        layer_width: int | None = None,
    ):
        super().__init__()
        self.window, self.sinks, self.reference = config.window, config.sinks, config.window_reference
        self.scaling, self.op_backend = scaling, "auto"
        self.num_heads, self.head_dim = num_heads, head_dim
        shape = (
            head_dim,
            config.feature_dim,
            config.feature_map,
            config.bias,
            config.magnitude,
            config.initialization,
        )
        self.feature_map_q = FeatureMap(num_heads, *shape)
        key_heads = num_key_value_heads if config.share_key_map else num_heads
        self.feature_map_k = FeatureMap(key_heads, *shape)
        self.reads, self.map_input, self.gate_input = reads(config), config.map_input, config.gate
        self.gate = make_gate(config.gate, key_heads, head_dim, layer_width, config.gate_bias)
        self.window_mix = WindowMix(num_heads, config) if config.window + config.sinks else None

    @staticmethod
    def parameter_group(name: str) -> str:
        """Which learning rate a parameter takes: `window` (weight and shift), `gate` (what multiplies its input),
        `gate_bias` or `maps`."""
        if name.startswith("gate."):
            return "gate_bias" if name.endswith("bias") else "gate"
        return "window" if name.startswith("window_mix.") else "maps"

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
        **context: Tensor,
    ) -> Tensor:
        """Attend.

        Args:
            query: `(B, H, T, D)`; key, value: `(B, G, T, D)`; after RoPE, unscaled, never repeated.
            padding_mask: `(B, T)` of these tokens, 1 = real.
            cache_layer: holder of the running state, or None; one with buffers takes a step of one token in place.
            arm: `mixed`; `softmax`, the window and sinks alone; `linear`, every key through the linear branch.
            cu_seqlens: `(N + 1,)`, where packed texts lie in a single row without padding and cache.
            context: what `reads` names, by name.

        Returns:
            `(B, H, T, D)` in the query's dtype.
        """
        if cache_layer is not None and cache_layer.buffers is not None:
            return self._step(query, key, value, padding_mask, cache_layer, arm, context)
        features, options = self._call_options(arm, query)
        options |= self._memory_options(arm, key, padding_mask, context)
        output, state = hybrid_linear_attention(
            query,
            key,
            value,
            *features,
            **options,
            causal=causal,
            attention_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            initial_state=None if cache_layer is None else cache_layer.state,
            return_state=cache_layer is not None,
            backend=self.op_backend,
        )
        if cache_layer is not None:
            cache_layer.store(state, query.shape[2])
        return output

    def _step(self, query, key, value, padding_mask, cache_layer, arm, context):
        features, options = self._call_options(arm, query, log_weight=True)
        options |= self._memory_options(arm, key, padding_mask, context)
        cache_layer.seen += query.shape[2]
        return hybrid_linear_step_(
            query,
            key,
            value,
            *features,
            **options,
            log_weight=True,
            attention_mask=padding_mask,
            buffers=cache_layer.buffers,
            count=cache_layer.count,
            backend=self.op_backend,
        )

    def new_buffers(self, num_key_value_heads: int, arm: str, batch: int, dtype: torch.dtype, device) -> DecodeBuffers:
        """What a step changes in place, for `batch` rows before their first token; dtype is that of keys and
        values."""
        return new_buffers(self.empty_state(num_key_value_heads, arm, dtype, device), batch)

    def empty_state(self, num_key_value_heads: int, arm: str, dtype: torch.dtype, device) -> HybridLinearState:
        """The state of one row before its first token; dtype is that of keys and values."""
        query, key, value = (
            torch.zeros(1, count, 0, self.head_dim, dtype=dtype, device=device)
            for count in (self.num_heads, num_key_value_heads, num_key_value_heads)
        )
        features, options = self._call_options(arm, query)
        width = 0 if self.gate is None or self.gate.weight is None else self.gate.weight.shape[1]
        layer_input = query.new_zeros(1, 1, 0, width)
        given = {"unrotated_query": query, "unrotated_key": key, "layer_input": layer_input}
        options |= self._memory_options(arm, key, None, {name: given[name] for name in self.reads})
        call = {**options, "return_state": True, "backend": "chunked"}
        state = hybrid_linear_attention(query, key, value, *features, **call)[1]
        assert state is not None
        return state

    def linear_share(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding_mask: Tensor | None = None,
        causal: bool = True,
        **context: Tensor,
    ) -> Tensor:
        """The linear branch's share of the denominator, `(B, H, T)` in [0, 1]; arguments as in `forward`."""
        features, options = self._call_options("mixed", query)
        options |= self._memory_options("mixed", key, padding_mask, context)
        return linear_share(query, key, value, *features, **options, attention_mask=padding_mask, causal=causal)

    def _memory_options(self, arm: str, key: Tensor, padding_mask: Tensor | None, context: dict[str, Tensor]):
        """What of the op's arguments the maps read, and how the memory forgets; nothing without a memory."""
        options: dict[str, Tensor] = {}
        if arm == "softmax":
            return options
        check_context(self.reads, context)
        if self.map_input == "projections":
            options |= {"map_query": context["unrotated_query"], "map_key": context["unrotated_key"]}
        decay = log_decay(self.gate, self.gate_input, key, padding_mask, context)
        if decay is not None:
            options["log_decay"] = decay
        return options

    def _call_options(self, arm: str, query: Tensor, log_weight: bool = False):
        if arm not in ARMS:
            raise ValueError(f"unknown arm {arm!r}: use one of {', '.join(ARMS)}")
        features: tuple[FeatureMapWeights | None, FeatureMapWeights | None] = (None, None)
        if arm != "softmax":
            features = (self.feature_map_q(query), self.feature_map_k(query))
        whole = arm != "linear"
        mix = self.window_mix if whole else None
        weight, shift = (None, None) if mix is None else mix(query, log_weight)
        return features, {
            "window_weight": weight,
            "window_shift": shift,
            "window_reference": self.reference,
            "window": self.window if whole else 0,
            "sinks": self.sinks if whole else 0,
            "scaling": self.scaling,
        }


def reads(config: LinearAttentionConfig) -> tuple[str, ...]:
    """What the attention is given beside queries, keys and values."""
    return names_read(config.map_input == "projections", config.gate)


def state_bytes(config, num_heads, num_key_value_heads, head_dim, num_tokens, dtype_bytes) -> int:
    """Bytes of one sequence's state after `num_tokens` tokens; the same for any number."""
    key_heads = num_key_value_heads if config.share_key_map else num_heads
    sums = key_heads * WIDTH[config.feature_map] * config.feature_dim * (head_dim + 1) * 4
    kept = 2 * (config.window + config.sinks) + (config.window if config.map_input == "projections" else 0)
    raw = kept * num_key_value_heads * head_dim * dtype_bytes
    return sums + raw + 8
