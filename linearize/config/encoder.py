"""The settings of an encoder's conversion: rows of sentences, embedding distillation, masked language modelling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from linearize.config.settings import DataConfig, RunSettings, Schedule, StageSettings, TransferConfig
from linearize.config.values import convert_fields, require


@dataclass
class EncoderDataConfig(DataConfig):
    """The text of an encoder's training: rows of whole sentences, padded."""

    sequence_length: int = 128
    """Tokens of a row at most, its first and last mark included; longer ones are cut."""
    sentences_per_row: int = 3
    """Consecutive sentences in a row, at most: one to so many, each number as often."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.packing == "stream" and not self.isolate_documents,
            "data.packing and data.isolate_documents are for decoders: an encoder's row is a text of its own, so "
            "leave them out.",
        )
        require(
            self.sentences_per_row >= 1,
            f"data.sentences_per_row is {self.sentences_per_row}, but it must be at least 1.",
        )


@dataclass
class EncoderStageConfig(StageSettings):
    """The steps of a stage that trains an encoder's weights."""

    section: ClassVar[str] = "stage"
    """Name of the settings in messages."""

    tokens: int = 8_388_608
    """Places in training rows, padding included."""
    max_steps: int | None = None
    """Optimiser steps; set, it overrides `tokens`."""
    batch_size: int = 64
    """Rows per process and micro-batch."""
    tokens_per_step: int = 16_384
    """Places per optimiser step, padding included: a multiple of sequence length x batch size x processes."""
    train: Literal["all", "attention"] = "all"
    """What trains: all weights, or projections and mechanism of the converted layers' attention alone."""
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

    def __post_init__(self) -> None:
        convert_fields(self, self.section)
        self._check_stage(self.section)
        self._check_not_negative("mixer_learning_rate")

    def _check_not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value >= 0, f"{self.section}.{name} is {value}, but it must not be negative.")


@dataclass
class EmbeddingDistillationConfig(EncoderStageConfig):
    """The student's sentence embeddings learn to be the teacher's."""

    section: ClassVar[str] = "distillation"

    embedding_weight: float = 1.0
    """Weight of 1 - cosine of student's and teacher's sentence embedding."""
    similarity_weight: float = 1.0
    """Weight of the squared difference of the similarities between the rows of a step."""
    hidden_weight: float = 1.0
    """Weight of the mean over layers and tokens of 1 - cosine of student's and teacher's hidden state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("embedding_weight", "similarity_weight", "hidden_weight")
        self._check_not_negative(*names)
        require(any(getattr(self, name) for name in names), "All weights of distillation are 0: nothing would train.")


@dataclass
class MaskedConfig(EncoderStageConfig):
    """Masked language modelling, of a checkpoint that has its head."""

    section: ClassVar[str] = "mlm"

    mask_probability: float = 0.15
    """Share of the tokens that the model must find (0.15 in BERT): of these 80% show as the mask token, 10% as a
    random one and 10% as they are."""
    dropout: bool = True
    """Train with the dropout of the checkpoint's config."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.mask_probability < 1,
            f"mlm.mask_probability is {self.mask_probability}, but it must be above 0 and below 1.",
        )


@dataclass
class EmbeddingEvaluationConfig:
    """What is measured on held-out sentences after each stage."""

    pairs: int = 1000
    """Pairs of adjacent sentences, at most."""
    texts: str | list[str] | None = None
    """Path(s) of text to take them from; none: the validation documents."""
    batch_size: int = 64
    """Sentences embedded together."""
    controls: bool = True
    """Measure the teacher, the untrained student and the single branches too."""

    def __post_init__(self) -> None:
        convert_fields(self, "evaluation")
        for key in ("pairs", "batch_size"):
            require(getattr(self, key) >= 1, f"evaluation.{key} is {getattr(self, key)}, but it must be at least 1.")


def _transfer() -> TransferConfig:
    return TransferConfig(tokens=2_097_152, batch_size=32, tokens_per_step=8192)


@dataclass
class EncoderRunConfig(RunSettings):
    """A whole run of an encoder."""

    preset_folder: ClassVar[str] = "bert"

    model_name_or_path: str = "sentence-transformers/all-MiniLM-L6-v2"
    """The teacher: a Hub id or a local directory."""
    revision: str | None = None
    """Branch, tag or commit of the teacher's repository."""
    output_dir: str = "out_encoder"
    """The run directory: config.yaml, logs, plots, checkpoints, report.json and final."""
    overwrite: bool = False
    """Replace a run that `output_dir` already holds."""
    resume_from_checkpoint: bool = False
    """Continue the run in `output_dir` from its newest checkpoint, in the stage where it stopped."""
    seed: int = 0
    """Seed of the initialisation, the order of the data, the masks and the dropout."""
    device: Literal["auto", "cpu"] = "auto"
    """The process's GPU, else the CPU; or the CPU."""
    attention: dict[str, Any] = field(default_factory=lambda: {"type": "linear"})
    """The new attention: `type` and the settings of that mechanism (window, sinks, feature_map, ...)."""
    softmax_layers: list[int] = field(default_factory=list)
    """Indices of the layers that keep softmax attention, from 0; negative ones count from the end."""
    data: EncoderDataConfig = field(default_factory=EncoderDataConfig)
    """Training and validation text."""
    calibration_sequences: int = 128
    """Training rows that a mechanism with a calibration (cosine, landmark) is fitted to before it trains; 0: not
    fitted."""
    transfer: TransferConfig | None = field(default_factory=_transfer)
    """Stage 1, attention transfer; none: skipped."""
    mlm: MaskedConfig | None = None
    """Masked language modelling after it; none: skipped."""
    distillation: EmbeddingDistillationConfig | None = field(default_factory=EmbeddingDistillationConfig)
    """Embedding distillation last; none: skipped. A frozen copy of the teacher stays in memory meanwhile."""
    evaluation: EmbeddingEvaluationConfig | None = field(default_factory=EmbeddingEvaluationConfig)
    """The measurements; none: skipped."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Trackers: trackio, wandb, tensorboard, all or none. All stages are one run of the project linearize."""
    op_backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Implementation of the new attention; auto: the fastest that runs here."""
    push_to_hub: str | None = None
    """Hub repository that the result is pushed to, e.g. me/MiniLM-linear; none: not pushed."""

    def __post_init__(self) -> None:
        convert_fields(self, "")
        self.attention.setdefault("type", "linear")
        require(bool(self.model_name_or_path), "model_name_or_path is empty: name the teacher.")
        self._check_run()
        self._check_calibration(self.calibration_sequences)
        require(
            self.push_to_hub is None or self.push_to_hub.count("/") <= 1,
            f"push_to_hub is {self.push_to_hub!r}, but a repository is named NAME or OWNER/NAME.",
        )
