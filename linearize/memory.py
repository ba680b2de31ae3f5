"""A forecast of the peak accelerator memory of both stages, from the teacher's shape and the settings alone.

The peak is a sum of what is held all the time and of what a stage holds at its fullest moment:

    weights      the teacher's parameters at the bytes of their type (4-bit: 0.5 byte and the scales; embeddings and
    head stay unquantised)
    mixers       the mechanism's parameters, float32: weights always, in a stage that trains them also gradient and
    two Adam moments
    adapters     LoRA's parameters, float32: weight, gradient, two Adam moments (stage 2)
    activations  stage 1: what one layer's mechanism keeps for its backward, for its graph is freed before the next
    layer starts
                 stage 2: what every layer keeps; with gradient checkpointing every layer's input and one layer's
                 activations
    logits       stage 2: one chunk of float32 logits with its gradient and its softmax
    runtime      what torch allocates for itself

All factors that were fitted to measurements stand in `Factors`; the rest follows from shapes. Sizes are per process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.settings import RunConfig

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ADAM_STATES = 4
"""float32 copies of a trained parameter: weight, gradient, first and second moment."""


@dataclass(frozen=True)
class Factors:
    """Numbers that shapes do not give: how many tensors of each size are alive at the fullest moment."""

    quantized_bytes_4bit: float = 0.5 + 1 / 64 + 4 / (64 * 256)
    """NF4 with double quantisation: half a byte, one byte of scale per 64 weights, one float32 per 256 scales."""
    quantized_bytes_8bit: float = 1.0
    """One byte; the row scales are negligible."""
    transfer_feature_tensors: float = 10.0
    """Float32 tensors of shape (B, H, T, F) alive in one layer of stage 1: maps, their softmaxes and their
    gradients."""
    transfer_head_tensors: float = 12.0
    """Float32 tensors of shape (B, H, T, D) alive in one layer of stage 1: branch outputs, their gradients, the
    loss."""
    score_tensors: float = 4.0
    """Float32 score tensors over the window (B, H, T, 2 x window + sinks) of one layer."""
    hidden_tensors: float = 8.0
    """Tensors of shape (B, T, hidden) that a layer keeps for its backward in stage 2."""
    mlp_tensors: float = 4.0
    """Tensors of shape (B, T, intermediate) that a layer keeps for its backward in stage 2."""
    logits_copies: float = 3.0
    """Float32 copies of one chunk of logits: logits, log-softmax, gradient."""
    runtime_bytes: int = 64 * 2**20
    """Workspaces of the matrix library."""


FACTORS = Factors()


@dataclass(frozen=True)
class Shape:
    """What the forecast needs of the teacher's config."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read a transformers Llama-like config."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' projections: what a quantised load quantises."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def other_parameters(self) -> int:
        """Embeddings, head and norms."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden


@dataclass(frozen=True)
class Mechanism:
    """What the forecast needs of the linear attention's settings."""

    layers: int
    feature_dim: int
    features: int
    window: int
    parameters: int

    @classmethod
    def of(cls, shape: Shape, attention: dict[str, Any], softmax_layers: list[int]) -> Mechanism:
        """Sizes of the mechanism for a teacher.

        Args:
            shape: The teacher.
            attention: Settings as in `RunConfig.attention`; absent ones take `LinearAttentionConfig`'s defaults.
            softmax_layers: Layers that keep softmax attention.
        """
        width = attention.get("feature_dim") or min(shape.head_dim, 64)
        both_signs = attention.get("feature_map", "softmax") in ("softmax", "exp")
        layers = shape.layers - len(set(softmax_layers))
        key_maps = shape.key_heads if attention.get("share_key_map", False) else shape.heads
        per_head = shape.head_dim * width
        per_head += shape.head_dim if attention.get("magnitude", True) else 0
        per_head += 1 if attention.get("bias", False) else 0
        window = attention.get("window", 64) or 0
        return cls(
            layers=layers,
            feature_dim=width,
            features=2 * width if both_signs else width,
            window=window + (attention.get("sinks", 4) or 0),
            parameters=layers * ((shape.heads + key_maps) * per_head + 2 * shape.heads),
        )


@dataclass(frozen=True)
class Forecast:
    """Expected peak bytes by part; `total` is the sum."""

    weights: int
    mixers: int
    adapters: int
    activations: int
    logits: int
    runtime: int

    @property
    def total(self) -> int:
        """Expected peak, bytes."""
        return self.weights + self.mixers + self.adapters + self.activations + self.logits + self.runtime


def weight_bytes(shape: Shape, config: RunConfig) -> int:
    """Bytes of the frozen weights."""
    size = BYTES[config.dtype]
    if config.load_in_4bit:
        return int(shape.linear_parameters * FACTORS.quantized_bytes_4bit + shape.other_parameters * size)
    if config.load_in_8bit:
        return int(shape.linear_parameters * FACTORS.quantized_bytes_8bit + shape.other_parameters * size)
    return (shape.linear_parameters + shape.other_parameters) * size


def mixer_activations(shape: Shape, mechanism: Mechanism, tokens: int, head_dim_tensors: float) -> float:
    """Bytes that one layer's mechanism keeps for its backward."""
    features = FACTORS.transfer_feature_tensors * mechanism.features
    heads = head_dim_tensors * shape.head_dim
    scores = FACTORS.score_tensors * 2 * mechanism.window
    return 4.0 * tokens * shape.heads * (features + heads + scores)


def forecast_transfer(teacher: Any, config: RunConfig) -> Forecast:
    """Peak of stage 1: one layer's graph at a time, and a forward without gradient around it."""
    assert config.transfer is not None
    shape = Shape.of(teacher)
    mechanism = Mechanism.of(shape, config.attention, config.softmax_layers)
    tokens = config.transfer.batch_size * config.data.sequence_length
    layer = mixer_activations(shape, mechanism, tokens, FACTORS.transfer_head_tensors)
    forward = tokens * BYTES[config.dtype] * (4 * shape.hidden + 2 * (shape.heads + shape.key_heads) * shape.head_dim)
    return Forecast(
        weights=weight_bytes(shape, config),
        mixers=ADAM_STATES * 4 * mechanism.parameters,
        adapters=0,
        activations=int(layer + forward),
        logits=0,
        runtime=FACTORS.runtime_bytes,
    )


def adapter_parameters(shape: Shape, config: RunConfig) -> int:
    """LoRA parameters on the targets that the forecast knows."""
    assert config.finetune is not None
    query, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    sides = {
        "q_proj": shape.hidden + query,
        "k_proj": shape.hidden + keys,
        "v_proj": shape.hidden + keys,
        "o_proj": query + shape.hidden,
        "gate_proj": shape.hidden + shape.intermediate,
        "up_proj": shape.hidden + shape.intermediate,
        "down_proj": shape.intermediate + shape.hidden,
    }
    return shape.layers * config.finetune.lora_rank * sum(sides.get(name, 0) for name in config.finetune.lora_targets)


def forecast_finetune(teacher: Any, config: RunConfig) -> Forecast:
    """Peak of stage 2: all layers' activations, or one layer's and every layer's input with gradient checkpointing."""
    assert config.finetune is not None
    settings = config.finetune
    shape = Shape.of(teacher)
    mechanism = Mechanism.of(shape, config.attention, config.softmax_layers)
    tokens = settings.batch_size * config.data.sequence_length
    size = BYTES[config.dtype]
    dense = size * tokens * (FACTORS.hidden_tensors * shape.hidden + FACTORS.mlp_tensors * shape.intermediate)
    mixer = mixer_activations(shape, mechanism, tokens, FACTORS.transfer_head_tensors)
    chunk = min(settings.logits_chunk, tokens)
    distillation = 2 if settings.kl_weight > 0 else 1
    logits = FACTORS.logits_copies * distillation * 4 * chunk * shape.vocabulary
    if (
        settings.gradient_checkpointing
    ):  # a layer is recomputed after the logits are gone: the larger of the two counts
        activations = shape.layers * size * tokens * shape.hidden + max(dense + mixer - logits, 0)
    else:
        activations = shape.layers * dense + mechanism.layers * mixer
    return Forecast(
        weights=weight_bytes(shape, config),
        mixers=(ADAM_STATES if settings.train_mixers else 1) * 4 * mechanism.parameters,
        adapters=ADAM_STATES * 4 * adapter_parameters(shape, config),
        activations=int(activations),
        logits=int(logits),
        runtime=FACTORS.runtime_bytes,
    )


def format_bytes(count: float) -> str:
    """Bytes as a person reads them: `512 MiB`, `17.3 GiB`."""
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:.1f} GiB"
