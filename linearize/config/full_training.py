"""Training of all weights, or of the mechanism alone, by the language modelling loss and a teacher beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from linearize.config.settings import DistillationConfig, Schedule, StageSettings
from linearize.config.values import convert_fields, require


@dataclass
class FullTrainingConfig(DistillationConfig, StageSettings):
    """AdamW, a warm-up and a decay, on float32 weights. The defaults are nanoGPT's for GPT-2 of 124 M, over fewer
    tokens."""

    section = "training"

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
    dropout: bool = True
    """Train with the dropout of the model's config."""
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
    kind: Literal["train"] = "train"
    """Kind of the stage."""
    weights: Literal["all", "mechanism", "attention"] = "all"
    """What trains: all weights, the mechanism's own parameters, or projections and mechanism of the converted
    layers."""
    objective: Literal["next_token", "masked"] = "next_token"
    """The next token (decoders), or hidden tokens (encoders)."""

    def __post_init__(self) -> None:
        convert_fields(self, self.section)
        self._check_stage()
        self._check_weights()
        for key in ("min_lr_ratio", "adam_beta1", "adam_beta2"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"{self.section}.{key} is {value}, but it must be between 0 and 1.")
        for key in ("mixer_learning_rate", "adam_epsilon"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"{self.section}.{key} is {value}, but it must not be negative.")
        require(
            self.eval_steps is None or self.eval_steps >= 1,
            f"{self.section}.eval_steps is {self.eval_steps}, but it must be none or at least 1.",
        )
        require(
            self.teacher is None or self.objective == "next_token",
            f"{self.section}.teacher teaches the next token, and an encoder predicts none: leave it out, or set "
            f"{self.section}.objective to embeddings.",
        )
        require(self.eval_tokens >= 1, f"{self.section}.eval_tokens is {self.eval_tokens}, but it must be at least 1.")
