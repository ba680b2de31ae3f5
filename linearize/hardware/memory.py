"""A forecast of the peak accelerator memory of both stages, from the teacher's shape and the settings alone.

The peak is what is held all the time and what a stage holds at its fullest moment, per process:

    weights      the teacher's parameters at the bytes of their type; in 4 bits half a byte and the scales, with the
                 embeddings and the head as they are
    mixers       the mechanism's parameters in float32: where they train also a gradient and two Adam moments
    adapters     LoRA's parameters in float32: weight, gradient, two Adam moments (stage 2)
    activations  stage 1: what one layer's mechanism keeps for its backward; its graph is freed at once
                 stage 2: what every layer keeps; with gradient checkpointing every layer's input and one layer
    logits       stage 2: one chunk of float32 logits, its log-softmax and its gradient

A mechanism keeps tensors of a few sizes: H query and G key heads, D head dimension, F features, and chunks of C tokens
that meet R = C + window + sinks keys one by one. How many of each is in `Kept`, fitted to peaks of the chunked path
(27 shapes of 512 to 2048 tokens, every size varied alone) that it then gives within 6%. Sizes are per token.

The fused kernels of a GPU keep far less, which `FusedBytes` counts tensor by tensor. Stage 1 was held against peaks on
an H100 (Llama-3-8B and SmolLM2-135M shapes, bfloat16). Stage 2 is counted, not fitted: no peak of it has been measured
on a GPU, so its sum takes every tensor as alive at once and a margin. (Triton's interpreter on a CPU, float32, tiny
shapes: stage 1's activations at 1.00 to 1.07 times the profiler's peak, stage 2's at 1.2 to 1.5 times.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearize.hardware.memory_cosine import CosineMechanism, Stage
from linearize.hardware.shape import GELU, Shape, linear_layers
from linearize.modeling import BACKBONES
from linearize.modeling.attention_linear import DEFAULT_GATE, DEFAULT_MAP_INPUT
from linearize.modeling.op_hybrid_linear_chunked import CHUNK

if TYPE_CHECKING:
    from linearize.config.settings import FinetuneConfig, TransferConfig
    from linearize.runs.settings import RunConfig

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FUSED_BYTES = {"bfloat16": 2, "float16": 4, "float32": 4}
"""Of the fused kernels' features and sums, in the type of their products (float16 is widened)."""
FUSED_CHUNK = {"bfloat16": 128, "float16": 64, "float32": 64}
"""Tokens between two of the sums that the fused kernels keep."""
FUSED_QUERIES = 64
"""Queries whose part of the sinks' gradients the fused kernels write at once."""
MAP_PROGRAMS = 528
"""Programs that each write a part of the gradients of the maps of one side, over all heads."""
FORECAST = ("linear", "cosine")
"""Mechanisms whose memory is known."""
EAGER = ("gptj",)
"""Architectures whose softmax attention holds its scores: twice H x T of them and the mask, in float32."""
ADAM_STATES = 4
"""float32 copies of a trained parameter: weight, gradient, first and second moment."""


@dataclass(frozen=True)
class Kept:
    """How many float32 tensors of each size one layer's mechanism holds at the fullest moment."""

    features: float
    """H x F: maps, their activations, gradients."""
    magnitude_features: float
    """H x F, only with learned magnitudes."""
    heads: float
    """H x D: outputs of the branches, the loss."""
    scores: float
    """H x R: scores, weights, feature products and masks of the near keys."""
    near_features: float
    """H x F x R / C: the near keys' features, gathered per chunk."""
    near_values: float
    """G x D x R / C: the near keys and values, gathered per chunk."""
    sums: float
    """H x F x D / C: the running sums, one per chunk."""


KEPT_IN_TRANSFER = Kept(6.5, 2.0, 2.1, 4.1, 0.0, 4.2, 4.1)
KEPT_IN_FINETUNING = Kept(5.5, 2.0, 4.8, 3.5, 0.9, 2.7, 2.2)
GATED_IN_TRANSFER = Kept(1.5, 0.0, 0.0, -2.2, 0.0, 0.0, 1.6)
GATED_IN_FINETUNING = Kept(1.4, 0.0, 0.0, -2.0, 0.0, 0.0, 1.5)
"""What a memory that forgets adds: its weights, and fewer feature products (4 shapes)."""
GATED_PAIRS = 6.8
"""H x C, with it: the weights of the pairs of a chunk."""
PROJECTED = {"transfer": 1.1, "finetune": 0.5}
"""(H + 2 G) x D, with maps before position: what the maps read, beside queries and keys."""


@dataclass(frozen=True)
class Factors:
    """The other numbers that shapes do not give."""

    quantized_bytes_4bit: float = 0.5 + 1 / 64 + 4 / (64 * 256)
    """NF4 with double quantisation: half a byte, one byte of scale per 64 weights, one float32 per 256 scales."""
    quantized_bytes_8bit: float = 1.0
    """One byte; the row scales are negligible."""
    teacher_hidden: float = 2.0
    """Stage 1: tensors of the hidden size alive around the mechanism, in the model's type."""
    fused_teacher_hidden: float = 3.0
    """The same on the fused path: the embeddings' output, a layer's input and its norm."""
    teacher_intermediate: float = 3.0
    """Stage 1, fused: tensors of the MLP's width in the teacher's forward, where that is the fullest moment."""
    cosine_loss: float = 6.1
    """Stage 1, fused: float32 tensors H x D while the cosine loss and its backward run; the other losses hold few."""
    fused_margin: float = 1.1
    """Stage 2, fused: on what each layer's mechanism is counted to keep."""
    hidden: float = 3.5
    """Stage 2: tensors of the hidden size that a layer keeps, in the model's type."""
    hidden_in_float32: float = 3.7
    """Stage 2: those that a half-precision model keeps in float32 (norms, inputs of the adapters)."""
    intermediate: float = 3.4
    """Stage 2: tensors of the MLP's width that a layer keeps, in the model's type."""
    eager_hidden: float = 6.0
    """Stage 1: tensors of the hidden size alive around a teacher's softmax attention that holds its scores."""
    gelu_intermediate: float = 5.5
    """The same of GPT-2 and GPT-J, whose MLP has no gate and an activation in many steps (3 shapes, within 2%)."""
    recomputed_layer: float = 1.1
    """Gradient checkpointing: one layer's forward and backward over what it keeps."""
    logits: float = 3.0
    """Float32 tensors of the size of one chunk's logits."""
    workspace: int = 32 * 2**20
    """The matrix library's workspace, bytes."""


FACTORS = Factors()


@dataclass(frozen=True)
class Mechanism:
    """What the forecast needs of the linear attention's settings."""

    layers: int
    """Converted layers."""
    features: int
    """F."""
    near: int
    """R; 0 without window and sinks leaves the chunk itself."""
    magnitude: bool
    parameters: int
    """Of all layers."""
    key_maps: int
    """Heads of the key features: H, or G where a group shares its map."""
    map_parameters: int
    """Of one head's map."""
    sinks: int
    maximum: bool
    """Whether the window's level is its maximum."""
    gated: bool
    """Whether the memory forgets."""
    projected: bool
    """Whether the maps read the projections before position."""

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
        layers = shape.layers - len({index % shape.layers for index in softmax_layers})
        key_maps = shape.key_heads if attention.get("share_key_map", False) else shape.heads
        magnitude = bool(attention.get("magnitude", True))
        per_map = shape.head_dim * width + (shape.head_dim if magnitude else 0)
        per_map += width if attention.get("bias", False) else 0
        mix = shape.heads * (1 if attention.get("window_shift", 0.5) is None else 2)
        backbone: Any = BACKBONES[shape.architecture].config
        gate = "none" if backbone.sees_both_sides else attention.get("gate") or DEFAULT_GATE
        map_input = "rotated" if backbone.learned_positions else attention.get("map_input") or DEFAULT_MAP_INPUT
        gate_parameters = {"none": 0, "head": 1, "token": 1 + shape.hidden, "key": 1 + shape.head_dim}[gate]
        return cls(
            layers=layers,
            features=2 * width if both_signs else width,
            near=CHUNK + attention.get("window", 64) + attention.get("sinks", 4),
            magnitude=magnitude,
            parameters=layers * ((shape.heads + key_maps) * per_map + mix + key_maps * gate_parameters),
            key_maps=key_maps,
            map_parameters=per_map,
            sinks=attention.get("sinks", 4),
            maximum=attention.get("window_reference", "logsumexp") == "max",
            gated=gate != "none",
            projected=map_input == "projections",
        )

    def activations(self, shape: Shape, stage: Stage) -> float:
        """Bytes that one layer's mechanism holds for each token."""
        kept = KEPT_IN_TRANSFER if stage == "transfer" else KEPT_IN_FINETUNING
        heads, groups, dim = shape.heads, shape.key_heads, shape.head_dim
        features = heads * self.features
        held = 4.0 * PROJECTED[stage] * (heads + 2 * groups) * dim if self.projected else 0.0
        if self.gated:
            gate = GATED_IN_TRANSFER if stage == "transfer" else GATED_IN_FINETUNING
            held += 4.0 * heads * (gate.scores * self.near + GATED_PAIRS * CHUNK)
            held += 4.0 * self.features * (gate.features * heads + gate.sums * self.key_maps * dim / CHUNK)
        return held + 4.0 * (
            features * (kept.features + (kept.magnitude_features if self.magnitude else 0.0))
            + features * (kept.near_features * self.near + kept.sums * dim) / CHUNK
            + heads * (kept.heads * dim + kept.scores * self.near)
            + groups * dim * kept.near_values * self.near / CHUNK
        )


def mechanism_of(shape: Shape, config: RunConfig) -> Mechanism | CosineMechanism:
    """Sizes of a run's mechanism."""
    kind: Any = CosineMechanism if config.mechanism.get("type") == "cosine" else Mechanism
    return kind.of(shape, config.mechanism, config.kept_layers)


def has_forecast(config: RunConfig) -> bool:
    """Whether the memory of a run's mechanism is known: of cosine attention, that of the chunked path on a CPU."""
    import torch

    kind = config.mechanism["type"]
    return kind in FORECAST and (kind == "linear" or config.device == "cpu" or not torch.cuda.is_available())


@dataclass(frozen=True)
class FusedBytes:
    """Bytes of one layer's mechanism on the fused path.

    Per token, but for `maps`. The features are computed anew in the backward, so what stays from the forward is small.
    """

    inputs: float
    """Query, key and value after the rotary embedding, and the sines and cosines of it."""
    output: float
    """One tensor H x D in the model's type: the output, its gradient, the teacher's output."""
    kept: float
    """From forward to backward, without the inputs: output, the softmax branch's difference from it, float32 rows, and
    the sums before each chunk."""
    backward: float
    """While the backward runs: features and their gradients, float32 rows, and the sums after each chunk."""
    input_gradients: float
    """Stage 2: gradients of query, key and value per query head, those of keys and values summed over groups, and the
    parts of the sinks' gradients."""
    maps: int
    """Parts of the gradients of one side's maps and both sides' sums of them, not per token."""

    @classmethod
    def of(cls, shape: Shape, mechanism: Mechanism, dtype: str, tokens: int) -> FusedBytes:
        """Count the tensors of a call of `tokens` tokens in the model's `dtype`."""
        size, wide, chunk = BYTES[dtype], FUSED_BYTES[dtype], FUSED_CHUNK[dtype]
        heads, groups, dim, features = shape.heads, shape.key_heads, shape.head_dim, mechanism.features
        output = size * heads * dim
        sums = features * (wide * dim + 4) / chunk  # one head's kv, and its normalizer in float32
        # Kept: log-sum-exp, mass, denominator; the maximum and its key. Backward: 4 terms, 5 with the maximum.
        kept_rows, backward_rows = (5, 5) if mechanism.maximum else (3, 4)
        shared = mechanism.key_maps if mechanism.key_maps < heads else 0  # sums over the heads that share a map
        feature_heads = heads + mechanism.key_maps + 2 * heads + shared  # features, their gradients
        return cls(
            inputs=size * (heads + 2 * groups + 2) * dim,
            output=output,
            kept=2 * output + 4 * kept_rows * heads + mechanism.key_maps * sums,
            backward=wide * features * feature_heads + 4 * backward_rows * heads + heads * sums,
            input_gradients=3 * output + 2 * size * groups * dim + 8 * heads * mechanism.sinks * dim / FUSED_QUERIES,
            maps=4 * mechanism.map_parameters * (min(MAP_PROGRAMS, heads * (tokens // 64 + 1)) + 2 * heads),
        )


@dataclass(frozen=True)
class Forecast:
    """Expected peak bytes by part."""

    weights: int
    mixers: int
    adapters: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """Expected peak, bytes."""
        return self.weights + self.mixers + self.adapters + self.activations + self.logits + self.workspace


def weight_bytes(shape: Shape, config: RunConfig) -> int:
    """Bytes of the frozen weights, with the largest matrix that a quantised load expands to compute with."""
    size = BYTES[config.dtype]
    if config.load_in_4bit or config.load_in_8bit:
        each = FACTORS.quantized_bytes_4bit if config.load_in_4bit else FACTORS.quantized_bytes_8bit
        expanded = shape.hidden * shape.intermediate * size
        return int(shape.linear_parameters * each + shape.other_parameters * size + expanded)
    return (shape.linear_parameters + shape.other_parameters) * size


def runs_fused(teacher: Any, config: RunConfig) -> bool:
    """Whether the mechanism will run the fused Triton kernels: a GPU that has them, and settings that they take."""
    import torch

    from linearize.modeling.op_dispatch import BACKEND_VARIABLE

    backend = config.op_backend if config.op_backend != "auto" else os.environ.get(BACKEND_VARIABLE, "auto")
    if backend not in ("auto", "triton") or config.device == "cpu" or not torch.cuda.is_available():
        return False
    return why_not_fused(teacher, config) is None


def why_not_fused(teacher: Any, config: RunConfig) -> str | None:
    """Why a GPU's Triton kernels cannot do a run's linear attention; None where they can.

    The kernels judge a call of one token, whose tensors have shapes and no memory.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from linearize.modeling.feature_maps import FeatureMapWeights
    from linearize.modeling.op_dispatch import find_kernel
    from linearize.modeling.op_hybrid_linear import CONTRACT

    kernel, reason = find_kernel("hybrid_linear", CONTRACT)
    if kernel is None:
        return reason
    shape = Shape.of(teacher)
    mechanism = Mechanism.of(shape, config.mechanism, config.kept_layers)
    with FakeTensorMode():
        query, key = (
            torch.empty(1, heads, 1, shape.head_dim, dtype=getattr(torch, config.dtype), device="cuda")
            for heads in (shape.heads, shape.key_heads)
        )
        # As many features as the map gives, in one half: `relu` has F = f.
        maps = FeatureMapWeights(torch.empty(shape.heads, shape.head_dim, mechanism.features), None, None, "relu")
        try:
            given = {"map_query": query, "map_key": key} if mechanism.projected else {}
            if mechanism.gated:
                given["log_decay"] = torch.empty(1, mechanism.key_maps, 1, device="cuda")
            return kernel.unsupported(query, key, key, maps, maps, causal=True, sinks=mechanism.sinks, **given)
        except ImportError as error:  # Triton is there and does not load
            return str(error)


def forecast_transfer(teacher: Any, config: RunConfig, settings: TransferConfig, *, fused: bool = False) -> Forecast:
    """Peak of stage 1: one layer's graph of one arm at a time, inside a forward without gradient.

    Args:
        teacher: Its config.
        config: Of the run.
        settings: Of the stage.
        fused: Whether the fused kernels will run (`runs_fused`), which hold less than the chunked path.
    """
    shape = Shape.of(teacher)
    mechanism = mechanism_of(shape, config)
    tokens = settings.batch_size * config.data.sequence_length
    if fused and isinstance(mechanism, Mechanism):
        activations = _fused_transfer(shape, mechanism, config, settings.loss, tokens)
    else:
        hidden = FACTORS.teacher_hidden * BYTES[config.dtype] * shape.hidden
        activations = tokens * (mechanism.activations(shape, "transfer") + hidden)
    if shape.architecture in EAGER:
        length, held = config.data.sequence_length, FACTORS.eager_hidden * BYTES[config.dtype] * shape.hidden
        activations = max(activations, tokens * (4 * (2 * shape.heads + 1) * length + held))
    return Forecast(
        weights=weight_bytes(shape, config),
        mixers=ADAM_STATES * 4 * mechanism.parameters,
        adapters=0,
        activations=int(activations),
        logits=0,
        workspace=FACTORS.workspace,
    )


def _fused_transfer(shape: Shape, mechanism: Mechanism, config: RunConfig, loss_kind: str, tokens: int) -> float:
    """Bytes of stage 1's fullest moment: the end of the mixed arm's backward, its loss, or the teacher's MLP."""
    fused, size = FusedBytes.of(shape, mechanism, config.dtype, tokens), BYTES[config.dtype]
    forward = fused.inputs + fused.kept + fused.output  # the last is the teacher's output
    loss = forward + (4 * FACTORS.cosine_loss * shape.heads * shape.head_dim if loss_kind == "cosine" else 0)
    backward = forward + fused.output + fused.backward + fused.maps / tokens  # the second output is its gradient
    mlp = size * FACTORS.teacher_intermediate * shape.intermediate
    return tokens * (max(loss, backward, mlp) + size * FACTORS.fused_teacher_hidden * shape.hidden)


def adapter_parameters(shape: Shape, settings: FinetuneConfig) -> int:
    """LoRA parameters on the targets that the forecast knows."""
    layers, targets = linear_layers(shape), settings.lora_targets or shape.lora_targets
    return shape.layers * settings.lora_rank * sum(a + b for name in targets for a, b in layers.get(name, []))


def forecast_finetune(teacher: Any, config: RunConfig, settings: FinetuneConfig, *, fused: bool = False) -> Forecast:
    """Peak of stage 2: all layers' activations, or one layer's and every layer's input with gradient checkpointing.

    With `fused` (as in `forecast_transfer`) the mechanism's part is counted from the kernels, not fitted.
    """
    shape = Shape.of(teacher)
    mechanism = mechanism_of(shape, config)
    tokens = settings.batch_size * max(settings.lengths(config.data.sequence_length))
    size = BYTES[config.dtype]
    hidden = FACTORS.hidden * size + (4 * FACTORS.hidden_in_float32 if size < 4 else 0.0)
    wide = FACTORS.gelu_intermediate if shape.architecture in GELU else FACTORS.intermediate
    dense = tokens * (hidden * shape.hidden + wide * size * shape.intermediate)
    if fused and isinstance(mechanism, Mechanism):
        mixer, backward = _fused_finetuning(shape, mechanism, config.dtype, tokens)
    else:
        mixer, backward = tokens * mechanism.activations(shape, "finetune"), 0.0
    copies = 2 if settings.kl_weight > 0 else 1
    logits = FACTORS.logits * copies * 4 * min(settings.logits_chunk, tokens) * shape.vocabulary
    activations = shape.layers * dense + mechanism.layers * mixer + backward
    if settings.gradient_checkpointing:
        activations = shape.layers * size * tokens * shape.hidden
        layer = FACTORS.recomputed_layer * (dense + mixer + backward)
        activations += max(layer - logits, 0.0)
    # Training along makes a copy of the mechanism: peft keeps the one from before.
    mixers = 1 + (ADAM_STATES if settings.train_mixers else 0)
    return Forecast(
        weights=weight_bytes(shape, config),
        mixers=mixers * 4 * mechanism.parameters,
        adapters=ADAM_STATES * 4 * adapter_parameters(shape, settings),
        activations=int(activations),
        logits=int(logits),
        workspace=FACTORS.workspace,
    )


def _fused_finetuning(shape: Shape, mechanism: Mechanism, dtype: str, tokens: int) -> tuple[float, float]:
    """Bytes that each layer keeps from its forward to its backward, and those of the one layer whose backward runs."""
    fused = FusedBytes.of(shape, mechanism, dtype, tokens)
    kept = tokens * (fused.inputs + fused.kept)
    workspace = tokens * (fused.output + fused.backward + fused.input_gradients) + fused.maps
    return FACTORS.fused_margin * kept, workspace


def format_bytes(count: float) -> str:
    """Bytes as a person reads them: `512 MiB`, `17.3 GiB`."""
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:.1f} GiB"
