"""The settings of a pretraining: the shape of the model, its attention, the text, and the steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from linearize.config.encoder import EncoderDataConfig
from linearize.config.settings import DataConfig, DistillationConfig, RunSettings, Schedule, StageSettings
from linearize.config.values import convert_fields, require

GPT2_TOKENIZER, BERT_TOKENIZER = "openai-community/gpt2", "google-bert/bert-base-cased"
ENCODERS = ("bert",)
"""Types that find hidden tokens; the others predict the next one."""
SIZES = (
    *("n_layer", "n_head", "n_embd", "n_inner", "n_kv_head", "head_dim"),
    *("rotary_dim", "n_positions", "vocab_multiple"),
)
LLAMA_ONLY = {
    "n_kv_head": "grouped keys and values",
    "head_dim": "heads of another width",
    "rope_theta": "rotations to set",
}
"""Settings that the other types have no place for, and what they are about."""
LLAMA_ROUND = 64
"""The inner width of a Llama that none is given for is a multiple of this."""
ROPE_THETA = 10_000.0
ROTARY_DIM = 64
"""Channels of a head that a GPT-J rotates, at most, where none are given."""


@dataclass
class ModelConfig:
    """The shape of the model; its vocabulary is the tokenizer's."""

    type: Literal["gpt2", "llama", "bert", "gptj"] = "gpt2"
    """The architecture: a GPT-2, a Llama, a GPT-J, or a BERT, which learns to find hidden tokens."""
    n_layer: int = 12
    """Layers (12 in GPT-2 of 124 M and in BERT-base)."""
    n_head: int = 12
    """Attention heads (12 in GPT-2 of 124 M and in BERT-base)."""
    n_embd: int = 768
    """Width, a multiple of the heads (768 in GPT-2 of 124 M and in BERT-base)."""
    n_inner: int | None = None
    """Width inside the feed-forward layers; none: 4 times `n_embd`, and in a Llama, whose layers have three matrices
    for two, 8/3 of it up to a multiple of 64."""
    n_kv_head: int | None = None
    """Key/value heads of a Llama, which groups of attention heads share; none: as many as attention heads."""
    head_dim: int | None = None
    """Width of a head of a Llama; none: `n_embd / n_head`."""
    n_positions: int | None = None
    """Positions that the model has, `data.sequence_length` at least; none: just so many."""
    rope_theta: float | None = None
    """Base of a Llama's rotary embedding; none: 10000."""
    rotary_dim: int | None = None
    """Channels of each head that a GPT-J rotates, an even number; none: 64, or all of a narrower head."""
    tie_embeddings: bool | None = None
    """Use the matrix of the embeddings for the output too; none: as the architecture has it (GPT-2 and BERT yes,
    Llama and GPT-J no)."""
    vocab_multiple: int = 1
    """Fill the vocabulary up to a multiple of this with entries that no text has."""
    dropout: float = 0.0
    """Dropout of embeddings, attention and residuals, of attention alone in a Llama (0.1 in GPT-2 and BERT; 0 where no
    text is seen often)."""

    def __post_init__(self) -> None:
        convert_fields(self, "model")
        for key in SIZES:
            value = getattr(self, key)
            require(value is None or value >= 1, f"model.{key} is {value}, but it must be at least 1.")
        for key, what in LLAMA_ONLY.items():
            require(
                self.type == "llama" or getattr(self, key) is None,
                f"model.{key} is set, but model.type {self.type} has no {what}: leave it out, or set type to llama.",
            )
        require(
            self.head_dim is not None or self.n_embd % self.n_head == 0,
            f"model.n_embd is {self.n_embd}, but it must be a multiple of model.n_head ({self.n_head}).",
        )
        if self.type == "llama":
            self._check_llama()
        self._check_rotary_dim()
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}, but it must be at least 0 and below 1.")

    def _check_llama(self) -> None:
        width = self.head_dim or self.n_embd // self.n_head
        require(
            width % 2 == 0, f"The heads of model are {width} wide, but a Llama rotates pairs: choose an even head_dim."
        )
        require(
            self.n_head % (self.n_kv_head or self.n_head) == 0,
            f"model.n_head is {self.n_head}, but it must be a multiple of model.n_kv_head ({self.n_kv_head}).",
        )
        require(
            self.rope_theta is None or self.rope_theta > 0,
            f"model.rope_theta is {self.rope_theta}, but it must be positive.",
        )

    def _check_rotary_dim(self) -> None:
        if self.type != "gptj":
            require(
                self.rotary_dim is None,
                f"model.rotary_dim is set, but model.type {self.type} has no part of a head to rotate: leave it out, "
                "or set type to gptj.",
            )
            return
        width, rotated = self.n_embd // self.n_head, self.rotated
        require(
            rotated % 2 == 0 and rotated <= width,
            f"model.rotary_dim is {rotated}, but it must be even and at most the width of a head ({width}).",
        )

    @property
    def rotated(self) -> int:
        """Channels of each head that a GPT-J rotates."""
        return min(ROTARY_DIM, self.n_embd // self.n_head) if self.rotary_dim is None else self.rotary_dim

    @property
    def encoder(self) -> bool:
        """Whether it learns to find hidden tokens rather than the next one."""
        return self.type in ENCODERS

    @property
    def inner(self) -> int:
        """Width inside the feed-forward layers."""
        if self.n_inner is not None:
            return self.n_inner
        if self.type != "llama":
            return 4 * self.n_embd
        return -(-8 * self.n_embd // (3 * LLAMA_ROUND)) * LLAMA_ROUND


@dataclass
class PretrainDataConfig(EncoderDataConfig):
    """Training and validation text: packed for a decoder, rows of whole sentences for an encoder."""

    sequence_length: int = 1024
    """Tokens in one training sequence: packed for a decoder, at most so many in an encoder's row."""
    mask_probability: float = 0.15
    """Share of the tokens that an encoder must find (0.15 in BERT): of these 80% show as the mask token, 10% as a
    random one and 10% as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.mask_probability < 1,
            f"data.mask_probability is {self.mask_probability}, but it must be above 0 and below 1.",
        )


@dataclass
class PretrainingConfig(StageSettings):
    """The steps: AdamW, a warm-up and a decay. The defaults are nanoGPT's for GPT-2 of 124 M, over fewer tokens."""

    tokens: int = 2_500_000_000
    """Training tokens (20 for each parameter of GPT-2 of 124 M)."""
    max_steps: int | None = None
    """Optimiser steps; set, it overrides `tokens`."""
    batch_size: int = 16
    """Sequences per process and micro-batch."""
    tokens_per_step: int = 524_288
    """Tokens per optimiser step, a multiple of sequence length x batch size x processes."""
    learning_rate: float = 6e-4
    """Highest learning rate."""
    mixer_learning_rate: float | None = None
    """Highest learning rate of the mechanism's own parameters; none: that of the others."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: linear or cosine decay, or constant."""
    min_lr_ratio: float = 0.1
    """Share of the learning rate at which the decay ends."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay; the mechanism's own parameters have none."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: tensors of two or more dimensions, or biases and norms too."""
    adam_beta1: float = 0.9
    """AdamW's decay of the gradients' mean."""
    adam_beta2: float = 0.95
    """AdamW's decay of the gradients' mean square."""
    adam_epsilon: float = 1e-8
    """AdamW's addend to the root of the mean square."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 switches clipping off."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the matrix products; auto: bfloat16 on a GPU and float32 on a CPU. The weights are float32 always."""
    train: Literal["all", "scalers"] = "all"
    """What trains: all weights, or the range scalers of gain-cell attention alone."""
    compile: bool = False
    """Compile the inner functions of gain-cell and landmark attention (torch.compile; GPU)."""
    logging_steps: int = 10
    """Steps between lines of the log."""
    save_steps: int = 500
    """Steps between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    eval_steps: int | None = None
    """Steps between perplexities of the validation text; none: only at the end of the run."""
    eval_tokens: int = 262_144
    """Tokens of the validation text to score each time, the first ones."""

    def __post_init__(self) -> None:
        convert_fields(self, "training")
        self._check_stage("training")
        for key in ("min_lr_ratio", "adam_beta1", "adam_beta2"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"training.{key} is {value}, but it must be between 0 and 1.")
        for key in ("mixer_learning_rate", "adam_epsilon"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"training.{key} is {value}, but it must not be negative.")
        require(
            self.eval_steps is None or self.eval_steps >= 1,
            f"training.eval_steps is {self.eval_steps}, but it must be none or at least 1.",
        )
        require(self.eval_tokens >= 1, f"training.eval_tokens is {self.eval_tokens}, but it must be at least 1.")


@dataclass
class PretrainConfig(RunSettings):
    """A whole pretraining."""

    preset_folder: ClassVar[str] = "pretrain"

    output_dir: str = "out_pretrain"
    """The run directory: config.yaml, logs, checkpoints, final and report.json."""
    overwrite: bool = False
    """Replace a run that `output_dir` already holds."""
    resume_from_checkpoint: bool = False
    """Continue the run in `output_dir` from its newest checkpoint."""
    seed: int = 0
    """Seed of the initialisation, the order of the data and the dropout."""
    device: Literal["auto", "cpu"] = "auto"
    """The process's GPU, else the CPU; or the CPU."""
    model_name_or_path: str | None = None
    """Go on from the weights of this checkpoint, stock or converted; none: random weights."""
    tokenizer: Literal["load", "train"] = "load"
    """Load a tokenizer, or train one on the training text (documents that are carved off for validation included): a
    byte-level BPE, and WordPiece with its marks for an encoder."""
    tokenizer_name_or_path: str | None = None
    """Hub id or local directory of the tokenizer to load; none: the checkpoint's, and for random weights GPT-2's, or
    BERT's cased one for an encoder."""
    vocab_size: int = 50_257
    """Entries of a trained tokenizer, at most; a loaded one has its own."""
    tokenizer_characters: int = 100_000_000
    """Characters of text that a tokenizer is trained on, at most."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The shape of a model with random weights."""
    attention: dict[str, Any] | None = None
    """The attention of a model with random weights: `type` and the settings of that mechanism; none: softmax, a stock
    model."""
    softmax_layers: list[int] = field(default_factory=list)
    """Indices of the layers that have softmax attention beside that, from 0; negative ones count from the end."""
    mixer_types: list[str] | None = None
    """The attention of each layer by name: softmax, or an entry of `mixers`; none: `attention` and
    `softmax_layers`."""
    mixers: dict[str, Any] | None = None
    """Settings of each name in `mixer_types`, as `attention` has them."""
    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    """Training and validation text."""
    training: PretrainingConfig = field(default_factory=PretrainingConfig)
    """The steps."""
    distillation: DistillationConfig | None = None
    """Train a decoder against a teacher as well; none: the labels alone."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Trackers: trackio, wandb, tensorboard, all or none. All stages are one run of the project linearize."""
    op_backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Implementation of the new attention; auto: the fastest that runs here."""

    def __post_init__(self) -> None:
        if type(self.data) is DataConfig:
            self.data = PretrainDataConfig(**dataclasses.asdict(self.data))
        convert_fields(self, "")
        self._check_run()
        self._check_attention()
        self._check_shape()
        positions, length = self.model.n_positions, self.data.sequence_length
        require(
            positions is None or positions >= length,
            f"model.n_positions is {positions}, but data.sequence_length is {length}: raise it, or leave it out.",
        )
        require(
            self.tokenizer == "load" or self.model_name_or_path is None,
            "tokenizer is train, but model_name_or_path has a vocabulary of its own: set tokenizer to load.",
        )
        require(
            self.distillation is None or self.distillation.teacher is not None,
            "distillation.teacher is not set: name the model to learn from.",
        )
        require(
            self.vocab_size >= 257,
            f"vocab_size is {self.vocab_size}, but it must be at least 257: all bytes and the end of a text.",
        )
        require(
            self.tokenizer_characters >= 1,
            f"tokenizer_characters is {self.tokenizer_characters}, but it must be at least 1.",
        )

    def _check_shape(self) -> None:
        if self.model_name_or_path is None:
            return
        fields = dataclasses.fields(ModelConfig)
        given = [field.name for field in fields if getattr(self.model, field.name) != field.default]
        require(
            not given,
            f"{' and '.join(f'model.{name}' for name in given)} {'is' if len(given) == 1 else 'are'} set, but "
            "model_name_or_path has a shape of its own: leave the section model out, of the config too.",
        )

    def _check_attention(self) -> None:
        if self.attention is not None:
            self.attention.setdefault("type", "linear")
            if self.attention == {"type": "softmax"}:
                self.attention = None
        layered = self.mixer_types is not None or self.mixers is not None
        require(
            self.model_name_or_path is None or not (self.attention or self.softmax_layers or layered),
            "attention is set, but model_name_or_path has an attention of its own: leave it out, or give a stock "
            "checkpoint another one with `linearize convert` first.",
        )
        require(
            not layered or (self.mixer_types is not None and self.mixers is not None),
            "mixer_types and mixers belong together: give both, or attention and softmax_layers.",
        )
        require(
            not layered or (self.attention is None and not self.softmax_layers),
            "mixer_types and attention both say what the layers have: leave attention and softmax_layers out.",
        )
        require(
            self.attention is not None or not self.softmax_layers,
            "softmax_layers is set, but without attention all layers have softmax: set attention too.",
        )

    @property
    def tokenizer_source(self) -> str:
        """Where a tokenizer is loaded from."""
        default = BERT_TOKENIZER if self.model.encoder else GPT2_TOKENIZER
        return self.tokenizer_name_or_path or self.model_name_or_path or default
