"""The sizes of a decoder that its memory follows from, and of its linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.modeling import PREFIX, backbone_of

GELU = ("gpt2", "gptj")
"""Architectures whose MLP has an activation in many steps and no gate."""


@dataclass(frozen=True)
class Shape:
    """What the forecast needs of the teacher's config."""

    architecture: str
    """The teacher's `model_type`."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    """Learned ones."""
    tied: bool
    lora_targets: tuple[str, ...]
    """The attention's projections."""

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the config of a teacher or a student."""
        heads = config.num_attention_heads
        architecture = config.model_type.removeprefix(PREFIX)
        gpt2, gelu = architecture == "gpt2", architecture in GELU
        return cls(
            architecture=architecture,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.n_inner or 4 * config.hidden_size if gelu else config.intermediate_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings if gpt2 else 0,
            tied=bool(config.tie_word_embeddings),
            lora_targets=backbone_of(config).lora_targets,
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' projections: what a quantised load quantises."""
        return self.layers * sum(a * b for sides in linear_layers(self).values() for a, b in sides)

    @property
    def other_parameters(self) -> int:
        """Embeddings, head, norms; biases of GPT-2's norms and projections, of GPT-J's norms, MLP and head."""
        embeddings = (self.vocabulary * (1 if self.tied else 2) + self.positions) * self.hidden
        norms = (2 * self.layers + 1) * self.hidden
        if self.architecture == "gpt2":
            biases = sum(outputs for sides in linear_layers(self).values() for _, outputs in sides)
            return embeddings + 2 * norms + self.layers * biases
        if self.architecture == "gptj":  # one norm per layer
            biases = self.layers * (self.intermediate + self.hidden) + self.vocabulary
            return embeddings + 2 * (self.layers + 1) * self.hidden + biases
        return embeddings + norms


def linear_layers(shape: Shape) -> dict[str, list[tuple[int, int]]]:
    """The linear layers of one decoder layer that can take an adapter: input and output width of those of a name."""
    query, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    hidden, intermediate = shape.hidden, shape.intermediate
    if shape.architecture == "gpt2":
        return {
            "c_attn": [(hidden, 3 * query)],
            "c_proj": [(query, hidden), (intermediate, hidden)],
            "c_fc": [(hidden, intermediate)],
        }
    if shape.architecture == "gptj":
        attention = dict.fromkeys(shape.lora_targets, [(hidden, hidden)])
        return {**attention, "fc_in": [(hidden, intermediate)], "fc_out": [(intermediate, hidden)]}
    return {
        "q_proj": [(hidden, query)],
        "k_proj": [(hidden, keys)],
        "v_proj": [(hidden, keys)],
        "o_proj": [(query, hidden)],
        "gate_proj": [(hidden, intermediate)],
        "up_proj": [(hidden, intermediate)],
        "down_proj": [(intermediate, hidden)],
    }
