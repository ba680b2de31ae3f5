"""Training of an encoder until its sentence embeddings are its teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from linearize.config.settings import Schedule, StageSettings
from linearize.config.values import convert_fields, require

LOSSES = ("embedding_weight", "similarity_weight", "hidden_weight")


@dataclass
class EmbeddingConfig(StageSettings):
    """The student's sentence embeddings learn to be the teacher's: those of the model that the run starts from."""

    section = "distillation"

    tokens: int = 8_388_608
    """Places in training rows, padding included."""
    max_steps: int | None = None
    """Optimiser steps; set, it overrides `tokens`."""
    batch_size: int = 64
    """Rows per process and micro-batch."""
    tokens_per_step: int = 16_384
    """Places per optimiser step, padding included: a multiple of sequence length x batch size x processes."""
    learning_rate: float = 1e-4
    """Highest learning rate of the teacher's weights."""
    mixer_learning_rate: float = 1e-3
    """Highest learning rate of the mechanism's own parameters."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: linear or cosine decay to 0, or constant."""
    warmup_steps: int = 50
    """Steps over which the learning rates rise from 0."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices of the teacher's weights."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 switches clipping off."""
    dropout: bool = False
    """Train with the dropout of the checkpoint's config."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the matrix products; auto: bfloat16 on a GPU and float32 on a CPU. The weights are float32 always."""
    logging_steps: int = 10
    """Steps between lines of the log."""
    save_steps: int = 500
    """Steps between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept."""

    embedding_weight: float = 1.0
    """Weight of 1 - cosine of student's and teacher's sentence embedding."""
    similarity_weight: float = 1.0
    """Weight of the squared difference of the similarities between the rows of a step."""
    hidden_weight: float = 1.0
    """Weight of the mean over layers and tokens of 1 - cosine of student's and teacher's hidden state."""

    kind: Literal["train"] = "train"
    """Kind of the stage."""
    weights: Literal["all", "attention"] = "all"
    """What trains: all weights, or projections and mechanism of the converted layers' attention alone."""
    objective: Literal["embeddings"] = "embeddings"
    """The teacher's sentence embeddings."""

    def __post_init__(self) -> None:
        convert_fields(self, self.section)
        self._check_stage()
        for name in ("mixer_learning_rate", *LOSSES):
            value = getattr(self, name)
            require(value >= 0, f"{self.section}.{name} is {value}, but it must not be negative.")
        weights = [getattr(self, name) for name in LOSSES]
        require(any(weights), f"All weights of the losses of {self.section} are 0: nothing would train.")
