"""What cosine attention adds to the forecast of `memory.py`: the tensors of its chunked path.

Within 15% of the measured peaks of one step of each stage in the tests. On a GPU there is no forecast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from linearize.modeling import BACKBONES
from linearize.modeling.attention_cosine import CosineAttentionConfig
from linearize.modeling.op_hybrid_linear_chunked import CHUNK
from linearize.modeling.registry import resolve_settings

Stage = Literal["transfer", "finetune"]


@dataclass(frozen=True)
class KeptByCosine:
    """How many float32 tensors of each size one layer's mechanism holds at the fullest moment; K key heads are H with
    the scale on the key's side, else G, and R = C + window + sinks keys meet a chunk of C queries.
    """

    mapped: float
    """(H + G) x F: features before the normalisation, only with a feature map."""
    heads: float
    """H x D: outputs of the branches, the loss."""
    features: float
    """H x F: unit queries."""
    scores: float
    """H x R: scores and weights of the near keys."""
    near_values: float
    """G x D x R / C: the near keys and values, gathered per chunk."""
    near_features: float
    """K x F x R / C: the near keys' unit features."""
    sums: float
    """K x F x D / C: the running sums, one per chunk."""


KEPT: dict[tuple[Stage, bool], KeptByCosine] = {
    ("transfer", False): KeptByCosine(3.48, 6.5, 1.76, 1.64, 2.08, 1.36, 3.3),
    ("finetune", False): KeptByCosine(2.64, 3.98, 2.56, 1.19, 3.84, 1.28, 1.37),
    ("transfer", True): KeptByCosine(3.39, 4.24, 2.07, 3.04, 1.16, 0.59, 5.06),
    ("finetune", True): KeptByCosine(2.37, 7.67, 3.05, 3.23, 2.86, 0.9, 2.42),
}
"""By stage, and whether there is a window (or sinks) beside it."""
FORGETS: dict[Stage, tuple[float, float]] = {"transfer": (0.0, 8.6), "finetune": (2.1, 5.9)}
"""H x C and K x C, with a gate: the weights of the pairs of a chunk, and of what is remembered (20 shapes, 12%)."""
PROJECTED: dict[Stage, float] = {"transfer": 0.38, "finetune": 0.0}
"""(H + 2 G) x D, with directions before position: what the cosine reads, beside queries and keys."""


@dataclass(frozen=True)
class CosineMechanism:
    """What the forecast needs of the settings of cosine attention."""

    layers: int
    """Converted layers."""
    features: int
    """F."""
    key_heads: int
    """K."""
    near: int
    """R."""
    mapped: bool
    windowed: bool
    gated: bool
    projected: bool
    parameters: int
    """Of all layers."""

    @classmethod
    def of(cls, shape: Any, attention: dict[str, Any], softmax_layers: list[int]) -> CosineMechanism:
        """Sizes of the mechanism for a teacher; arguments as in `memory.Mechanism.of`."""
        config = CosineAttentionConfig(**attention)
        resolve_settings(config, shape.head_dim, BACKBONES[shape.architecture].config)
        layers = shape.layers - len({index % shape.layers for index in softmax_layers})
        mapped, windowed = config.feature_map != "none", config.window + config.sinks > 0
        per_head = 1 + config.gain + windowed
        width = config.feature_dim if mapped and config.feature_dim is not None else 0
        per_map = width * (shape.head_dim + config.bias)
        key_heads = shape.heads if config.scale_side == "key" else shape.key_heads
        gates = {"head": 1, "token": 1 + shape.hidden, "key": 1 + shape.head_dim}
        per_gate = gates.get(config.gate or "none", 0)
        return cls(
            layers=layers,
            features=config.key_width(shape.head_dim),
            key_heads=key_heads,
            near=CHUNK + config.window + config.sinks,
            mapped=mapped,
            windowed=windowed,
            gated=per_gate > 0,
            projected=config.directions == "projections",
            parameters=layers
            * (shape.heads * per_head + (shape.heads + shape.key_heads) * per_map + key_heads * per_gate),
        )

    def activations(self, shape: Any, stage: Stage) -> float:
        """Bytes that one layer's mechanism holds for each token."""
        kept, heads, dim = KEPT[stage, self.windowed], shape.heads, shape.head_dim
        keys = self.key_heads * self.features
        by_query, by_key = FORGETS[stage] if self.gated else (0.0, 0.0)
        return 4.0 * (
            (PROJECTED[stage] * (heads + 2 * shape.key_heads) * dim if self.projected else 0.0)
            + (by_query * heads + by_key * self.key_heads) * CHUNK
            + (kept.mapped * (heads + shape.key_heads) * self.features if self.mapped else 0.0)
            + heads * (kept.heads * dim + kept.features * self.features + kept.scores * self.near)
            + shape.key_heads * dim * kept.near_values * self.near / CHUNK
            + keys * (kept.near_features * self.near + kept.sums * dim) / CHUNK
        )
