"""CosineAttention: values weighed by the cosine of query and key, beside a softmax window and sinks where wanted.

Source: Cottention (Mongaras et al. 2024, arXiv 2409.18747). The published form is `window=0, sinks=0, gain=False`,
with `scale_side="key"` in decoders. The query's side, the gain, the feature map before the normalisation, directions
before position, a memory that forgets and the window are this project's: with them a pretrained model keeps more of
what it knew.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from .cosine_memory import CosineMemory, as_softmax, joined, next_window
from .decay_gate import GATES, check_context, log_decay, make_gate, resolve_gate
from .decay_gate import reads as names_read
from .feature_maps import INITIALIZATIONS, WIDTH, FeatureMap, apply_feature_map
from .op_cosine import CONTRACT, CosineState, cosine_attention
from .op_cosine_chunked import power, seen_keys
from .op_dispatch import take_contract
from .op_hybrid_linear import hybrid_linear_attention
from .op_rows import Rows

ARMS = ("mixed", "softmax", "linear")
NO_MAP = "none"
FEATURE_MAPS = (NO_MAP, "projection", *WIDTH)
SCALE_SIDES = ("query", "key")
DIRECTIONS = ("projections", "rotated")
DEFAULT_DIRECTIONS, DEFAULT_GATE = "rotated", "none"
CONTRACT_1 = {"directions": "rotated", "gate": "none"}
"""What a config.json of contract 1, which lacks these settings, means; whatever the defaults are."""
LOGIT_LIMIT = 4.0  # sigmoid(4) = 0.982: there an exponent still learns with 7% of the greatest slope
NO_WAY_BACK = "scale_side is 'key', which an encoder can only have with window 0 and sinks 0: set scale_side to query"


@strict
@dataclass
class CosineAttentionConfig:
    """Settings of `CosineAttention`; every one is written into config.json."""

    type: str = "cosine"
    window: int = 64
    """Tokens in the softmax window beside it, the query itself included; 0 is pure cosine attention."""
    sinks: int = 4
    """First tokens of a sequence that always stay in the softmax branch."""
    feature_map: str = NO_MAP
    """Before the normalisation: `none` (published), `projection` (a learned matrix per head), or a map of linear
    attention: `softmax`, `exp`, `relu`, `elu`."""
    feature_dim: int | None = None
    """Width f of the maps; None takes min(head_dim, 64). `softmax` and `exp` give 2 f features."""
    bias: bool = False
    """Learn a bias per head and feature inside the map."""
    initialization: str = "identity"
    """Of the maps: `identity`, `identity_first` or `kaiming`, as in `LinearAttentionConfig`."""
    exponent: float | int | list[float] = 0.6225
    """Starting exponent s of the length scale c^-s, between 0 and 1: one for all heads, or a list with one for each
    query head. What lies outside 0.018 to 0.982 starts from there, for nearer to the ends it could hardly learn. The
    default is the published sigmoid(0.5)."""
    scale_side: str = "query"
    """`query` scales an output by the keys that it sees; `key` (published for decoders) a key by its place."""
    gain: bool = True
    """Learn a factor on the output per head; it starts from 0 beside a window, else from 1."""
    window_weight: float | int = 1.0
    """Starting weight of the softmax branch per head; there is none with window 0 and sinks 0."""
    directions: str | None = None
    """What the cosine is taken of: `projections`, queries and keys before position, or `rotated`, as the softmax
    window's (published); None takes rotated. Without rotary positions both are the same."""
    gate: str | None = None
    """What the memory forgets with each token: `none` (published); `head`, a learned share; `token`, by the layer's
    input; `key`, by the key's projection. None takes none. On the query's side an output is then scaled by what is
    remembered."""
    gate_bias: float | int = 6.0
    """Where a gate starts: each token multiplies the memory by the sigmoid of it."""
    contract: int = CONTRACT
    """Contract of the op that the checkpoint was saved with."""

    def __post_init__(self) -> None:
        choices = {
            "type": ("cosine",),
            "feature_map": FEATURE_MAPS,
            "initialization": INITIALIZATIONS,
            "scale_side": SCALE_SIDES,
            "directions": (None, *DIRECTIONS),
            "gate": (None, *GATES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(x for x in allowed if x is not None)
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {known}")
        for name in ("window", "sinks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it counts tokens and must be at least 0")
        if self.feature_map == NO_MAP and (
            self.feature_dim is not None or self.bias or self.initialization != "identity"
        ):
            raise ValueError(
                "feature_dim, bias and initialization belong to a feature map: choose a feature_map, or leave them out"
            )
        if self.window + self.sinks == 0 and self.window_weight != 1:
            raise ValueError("window_weight belongs to a softmax branch: set window or sinks, or leave it out")
        if self.feature_dim is not None and self.feature_dim < 1:
            raise ValueError(f"feature_dim is {self.feature_dim}: it must be at least 1")
        for exponent in self.exponent if isinstance(self.exponent, list) else [self.exponent]:
            if not 0 <= exponent <= 1:
                raise ValueError(f"exponent is {exponent}: it must lie between 0 and 1")
        for name in ("window_weight", "gate_bias"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}: it must be a finite number")
        take_contract(self, "cosine attention", CONTRACT, CONTRACT_1)

    def resolve(self, head_dim: int, rotary: bool = True, causal: bool = True) -> None:
        """Fill in what depends on the model: its head dimension, whether it rotates, and whether a token sees only
        those before it.

        Raises:
            ValueError: one sentence.
        """
        self.directions = (self.directions or DEFAULT_DIRECTIONS) if rotary else "rotated"
        self.gate = resolve_gate(self.gate, DEFAULT_GATE, causal)
        if self.feature_map == NO_MAP:
            return
        if self.feature_dim is None:
            self.feature_dim = min(head_dim, 64)
        if self.initialization != "kaiming" and self.feature_dim > head_dim:
            raise ValueError(
                f"feature_dim {self.feature_dim} is wider than the head dimension {head_dim}: "
                "lower it, or use initialization 'kaiming'"
            )

    def check_heads(self, num_heads: int) -> None:
        """Refuse exponents that are not one for each query head.

        Raises:
            ValueError: one sentence.
        """
        if isinstance(self.exponent, list) and len(self.exponent) != num_heads:
            raise ValueError(
                f"exponent lists {len(self.exponent)} numbers, but the attention has {num_heads} query heads: give "
                "one number for each, or a single one for all"
            )

    def check_bidirectional(self) -> None:
        """Refuse settings that have no form for encoders.

        Raises:
            ValueError: one sentence.
        """
        if self.scale_side == "key" and self.window + self.sinks:
            raise ValueError(NO_WAY_BACK)

    def key_width(self, head_dim: int) -> int:
        """Numbers in a query or key as the cosine sees it."""
        if self.feature_map == NO_MAP or self.feature_dim is None:
            return head_dim
        return WIDTH.get(self.feature_map, 1) * self.feature_dim


class CosineScales(nn.Module):
    """What is learned per query head, float32: the exponent's logit, the output's gain, the window's weight.

    Args:
        heads: H. config: settings; gain and window_weight are None where they leave them out.
    """

    def __init__(self, heads: int, config: CosineAttentionConfig):
        super().__init__()
        config.check_heads(heads)
        windowed = config.window + config.sinks > 0
        self.starts = (config.exponent, 0.0 if windowed else 1.0, config.window_weight)
        self.exponent_logit = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.gain = nn.Parameter(torch.empty(heads, dtype=torch.float32)) if config.gain else None
        self.window_weight = nn.Parameter(torch.empty(heads, dtype=torch.float32)) if windowed else None

    def reset_parameters(self) -> None:
        exponent, gain, weight = self.starts
        exponents = torch.as_tensor(exponent, dtype=torch.float32, device=self.exponent_logit.device)
        init.copy_(self.exponent_logit, exponent_logit(exponents).expand_as(self.exponent_logit))
        if self.gain is not None:
            init.constant_(self.gain, gain)
        if self.window_weight is not None:
            init.constant_(self.window_weight, weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The exponent's logit, the gain and the window's weight, `(H,)` each; x as in `FeatureMap`."""
        return self.exponent_logit, self.gain, self.window_weight

    def exponent(self) -> Tensor:
        """s `(H,)`, between 0 and 1."""
        return self.exponent_logit.sigmoid()

    @staticmethod
    def exponent_range() -> tuple[float, float]:
        """The least and the greatest exponent that `assign` takes as it is: 0.018 and 0.982."""
        low, high = torch.tensor([-LOGIT_LIMIT, LOGIT_LIMIT], dtype=torch.float64).sigmoid().tolist()
        return low, high

    @torch.no_grad()
    def assign(self, exponent: Tensor, gain: Tensor, window_weight: Tensor) -> None:
        """Set what is learned to these values, `(H,)` each; gain and window weight where they are there."""
        self.exponent_logit.copy_(exponent_logit(exponent))
        for parameter, values in ((self.gain, gain), (self.window_weight, window_weight)):
            if parameter is not None:
                parameter.copy_(values)


def exponent_logit(exponent: Tensor) -> Tensor:
    """The number that is learned for an exponent, at most 4 from 0."""
    return torch.logit(exponent).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


class CosineAttention(nn.Module):
    """Mixes tokens in place of softmax attention; the backbone projects and rotates before, and projects after.

    With a window, or sinks, it is `window_weight * softmax over them + cosine attention over all other keys`.

    Args:
        config: settings, resolved.
        num_heads: H. num_key_value_heads: G. head_dim: D. scaling: of the softmax scores.
        layer_width: E, of the layer's input; for a gate that reads it.

    Attributes:
        arms: `mixed`, and with a window the branches alone: `softmax`, and `linear`, every key by its cosine.
    """

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
        self.window, self.sinks, self.scale_side = config.window, config.sinks, config.scale_side
        self.scaling, self.op_backend = scaling, "auto"
        self.arms = ARMS if self.window + self.sinks else ARMS[:1]
        self.scales = CosineScales(num_heads, config)
        self.reads, self.directions, self.gate_input = reads(config), config.directions, config.gate
        key_heads = num_heads if config.scale_side == "key" else num_key_value_heads
        self.gate = make_gate(config.gate, key_heads, head_dim, layer_width, config.gate_bias)
        self.feature_map_q = self.feature_map_k = None
        if config.feature_map != NO_MAP:
            shape = (head_dim, config.feature_dim, config.feature_map, config.bias, False, config.initialization)
            self.feature_map_q = FeatureMap(num_heads, *shape)
            self.feature_map_k = FeatureMap(num_key_value_heads, *shape)

    @staticmethod
    def parameter_group(name: str) -> str:
        """Which learning rate a parameter takes: `window` (its weight), `scalers` (exponent and gain), `gate` (what
        multiplies its input), `gate_bias` or `maps`."""
        if name.startswith("gate."):
            return "gate_bias" if name.endswith("bias") else "gate"
        if name == "scales.window_weight":
            return "window"
        return "scalers" if name.startswith("scales.") else "maps"

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
            cache_layer: holder of the running state, or None.
            arm: `mixed`; with a window also `softmax`, the window and sinks alone, without their weight; and `linear`,
                every key by its cosine.
            causal: False sees every real key.
            cu_seqlens: `(N + 1,)`, where packed texts lie in a single row without padding and cache.
            context: what `reads` names, by name.

        Returns:
            `(B, H, T, D)` in the query's dtype.
        """
        past = None if cache_layer is None else cache_layer.state
        call = self._call_options(arm, padding_mask, causal, return_state=cache_layer is not None)
        call["cu_seqlens"] = cu_seqlens
        near = far = near_state = far_state = directions = None
        if call["window"] + call["sinks"]:
            near, near_state = self._softmax_branch(query, key, value, past, call)
        if arm != "softmax":
            inputs, memory = self._far_inputs(query, key, value, padding_mask, context)
            start = None if past is None else self._as_cosine(past)
            far, far_state = self._cosine_branch(*inputs, start, call | memory)
            if cache_layer is not None and self.directions == "projections":
                directions = next_window(past, context["unrotated_key"], padding_mask, call["window"], call["sinks"])
        if cache_layer is not None:
            cache_layer.store(joined(key, value, near_state, far_state, directions), query.shape[2])
        return self._mixed(near, far).to(query.dtype)

    def _call_options(
        self, arm: str, padding_mask: Tensor | None, causal: bool, return_state: bool = False
    ) -> dict[str, Any]:
        """What both branches' ops are called with."""
        if arm not in self.arms:
            raise ValueError(f"unknown arm {arm!r}: use one of {', '.join(self.arms)}")
        if not causal and self.scale_side == "key" and self.window + self.sinks:
            raise ValueError(NO_WAY_BACK)
        return {
            "window": 0 if arm == "linear" else self.window,
            "sinks": 0 if arm == "linear" else self.sinks,
            "causal": causal,
            "attention_mask": padding_mask,
            "return_state": return_state,
            "backend": self.op_backend,
        }

    def _softmax_branch(self, query, key, value, past: CosineMemory | None, call):
        """Softmax over window and sinks, without its weight, and its state."""
        start = None if past is None else as_softmax(past, query.shape[1])
        return hybrid_linear_attention(
            query, key, value, None, None, scaling=self.scaling, initial_state=start, **call
        )

    def _cosine_branch(self, query, key, value, past: CosineState | None, call):
        """Cosine attention over all other keys, with its gain, and its state; inputs as `_far_inputs` gives them."""
        logit, gain, _ = self.scales(query)
        scales: dict[str, Any] = {"exponent": logit.sigmoid(), "gain": gain, "scale_side": self.scale_side}
        return cosine_attention(query, key, value, **scales, initial_state=past, **call)

    def _mixed(self, near: Tensor | None, far: Tensor | None) -> Tensor:
        """The weighted sum of the branches that are there, in float32 at least where both are."""
        if near is None or far is None:
            output = far if near is None else near
            assert output is not None, "an arm has one branch at least"
            return output
        return self._weighted(near) + far.to(torch.promote_types(far.dtype, torch.float32))

    def _weighted(self, near: Tensor) -> Tensor:
        _, _, weight = self.scales(near)
        assert weight is not None, "there is a window"
        dtype = torch.promote_types(near.dtype, torch.float32)
        return near.to(dtype) * weight.to(dtype)[:, None, None]

    def _far_inputs(
        self, query, key, value, padding_mask, context
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Queries, keys and values as the cosine takes them, and how the memory forgets, as an option of the op."""
        check_context(self.reads, context)
        decay = log_decay(self.gate, self.gate_input, key, padding_mask, context)
        if self.directions == "projections":
            query, key = context["unrotated_query"], context["unrotated_key"]
        return self._features(query, key, value, padding_mask), {"log_decay": decay}

    def _features(self, query, key, value, padding_mask) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the cosine takes them: with maps in float32 at least."""
        if self.feature_map_q is None:
            return query, key, value
        if padding_mask is not None:  # padding may hold NaN, which a map's gradient would keep
            hidden = ~padding_mask.bool()[:, None, :, None]
            query, key = query.masked_fill(hidden, 0.0), key.masked_fill(hidden, 0.0)
        query, key = map_features(query, self.feature_map_q), map_features(key, self.feature_map_k)
        return query, key, value.to(key.dtype)

    def _as_cosine(self, memory: CosineMemory) -> CosineState:
        """The op's state from the cache's, whose keys are raw; the cosine never reads the sinks."""
        state = CosineState(*memory[:-1])
        if memory.window_direction is not None:
            state = state._replace(window_key=memory.window_direction)
        if self.feature_map_k is None:
            return state
        window_key, sink_key = (map_features(x, self.feature_map_k) for x in (state.window_key, state.sink_key))
        values = {name: getattr(state, name).to(window_key.dtype) for name in ("window_value", "sink_value")}
        return state._replace(window_key=window_key, sink_key=sink_key, **values)

    def linear_share(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding_mask: Tensor | None = None,
        causal: bool = True,
        **context: Tensor,
    ) -> Tensor:
        """The cosine branch's share of both branches' lengths, `(B, H, T)` in [0, 1]; there is no common
        denominator. Arguments as in `forward`."""
        call = self._call_options("mixed", padding_mask, causal)
        near = self._weighted(self._softmax_branch(query, key, value, None, call)[0]).norm(dim=-1)
        inputs, memory = self._far_inputs(query, key, value, padding_mask, context)
        far = self._cosine_branch(*inputs, None, call | memory)[0].norm(dim=-1)
        return far / (near + far).clamp(min=1e-20)

    def calibration_terms(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding_mask: Tensor | None,
        causal: bool,
        exponents: Tensor,
        **context: Tensor,
    ) -> tuple[Tensor | None, Iterator[Tensor]]:
        """What a calibration weighs against each other: the mixed output is a weighted sum of them.

        Args:
            exponents: `(N, H)` to try.
            context: what `reads` names, by name.

        Returns:
            The softmax branch `(B, H, T, D)`, or None without a window; the cosine branch with gain 1 for each
            exponent, made as it is asked for.
        """
        call = self._call_options("mixed", padding_mask, causal)
        near = self._softmax_branch(query, key, value, None, call)[0] if self.window + self.sinks else None
        inputs, memory = self._far_inputs(query, key, value, padding_mask, context)
        call |= memory
        if causal and self.scale_side == "key":
            return near, (cosine_attention(*inputs, exponent=x, scale_side="key", **call)[0] for x in exponents)
        # On the query's side an exponent only scales what the exponent 0 gives.
        unscaled = cosine_attention(*inputs, exponent=torch.zeros_like(exponents[0]), **call)[0]
        counts = _far_counts(query, padding_mask, (self.window, self.sinks, causal), memory["log_decay"])
        return near, (unscaled * power(counts, x[:, None]) for x in exponents)


def _far_counts(x: Tensor, padding_mask: Tensor | None, form: tuple[int, int, bool], decay: Tensor | None) -> Tensor:
    """What the scale of each query of a call counts: `(B, 1, T)`, with decay `(B, G, T)`; arguments as in
    `seen_keys`."""
    rows = Rows(padding_mask, x)
    if decay is not None:
        decay = rows.compact(decay[..., None])[..., 0]
    seen = seen_keys(rows.lengths, x.shape[2], form, decay)
    return rows.restore((seen[:, None] if decay is None else seen)[..., None])[..., 0]


def map_features(x: Tensor, feature_map: FeatureMap | None) -> Tensor:
    """Features of x, in float32 at least: `(B, heads, T, F)`."""
    assert feature_map is not None
    with torch.autocast(x.device.type, enabled=False):
        maps = feature_map(x)
        if maps.activation != "projection":
            return apply_feature_map(x, maps, floor=0.0)  # a dead vector has no direction
        dtype = torch.promote_types(x.dtype, torch.float32)
        features = torch.einsum("bhtd,hdf->bhtf", x.to(dtype), maps.weight.to(dtype))
        return features if maps.bias is None else features + maps.bias.to(dtype)[:, None]


def reads(config: CosineAttentionConfig) -> tuple[str, ...]:
    """What the attention is given beside queries, keys and values."""
    return names_read(config.directions == "projections", config.gate)


def state_bytes(config, num_heads, num_key_value_heads, head_dim, num_tokens, dtype_bytes) -> int:
    """Bytes of one sequence's state after `num_tokens` tokens; the same for any number."""
    key_heads = num_heads if config.scale_side == "key" else num_key_value_heads
    kept = 2 * (config.window + config.sinks) + (config.window if config.directions == "projections" else 0)
    raw = kept * num_key_value_heads * head_dim * dtype_bytes
    mass = 4 * key_heads if config.scale_side == "query" and config.gate not in (None, "none") else 0
    return key_heads * config.key_width(head_dim) * head_dim * 4 + mass + raw + 8
