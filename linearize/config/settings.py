"""Settings of the data and of the stages that convert a model, with units and where the defaults come from.

They are plain dataclasses; `runs/settings.py` has the whole run, whose YAML and flags are made from them. Measured
defaults come from this project's own runs on SmolLM2-135M (see docs/results.md); published ones from LoLCATs (Zhang et
al. 2024, https://arxiv.org/abs/2410.10254; its configs are quoted in recipes/configs/llama3_8b_lolcats.yaml).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.config.values import convert_fields, require

Schedule = Literal["linear", "constant", "cosine"]


@dataclass(frozen=True)
class StepPlan:
    """How a stage's tokens divide into optimiser steps."""

    accumulation: int
    """Micro-batches per process and optimiser step."""
    tokens_per_step: int
    """Tokens of one optimiser step over all processes: the least whole number of micro-batches that holds the asked
    tokens. A stage runs only where the two are equal (`training.loop.exact_plan`); else this is what it suggests."""
    steps: int
    """Optimiser steps of the stage."""


class StageSettings:
    """What the training stages share: fields that each declares with its own default, and turning token counts into
    steps."""

    section = "stage"
    """Name of the settings in messages; in a run the stage's own (`runs.settings`)."""
    tokens: int
    max_steps: int | None
    batch_size: int
    tokens_per_step: int
    learning_rate: float
    schedule: Schedule
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    logging_steps: int
    save_steps: int
    save_total_limit: int

    def plan(self, sequence_length: int, num_processes: int = 1) -> StepPlan:
        """The steps of this stage.

        Args:
            sequence_length: Tokens in one training sequence.
            num_processes: Data-parallel processes.
        """
        micro_batch = sequence_length * self.batch_size * num_processes
        accumulation = max(1, math.ceil(self.tokens_per_step / micro_batch))
        tokens_per_step = accumulation * micro_batch
        steps = self.max_steps if self.max_steps is not None else max(1, math.ceil(self.tokens / tokens_per_step))
        return StepPlan(accumulation, tokens_per_step, steps)

    def _check_stage(self) -> None:
        name = self.section
        for key in ("tokens", "batch_size", "tokens_per_step", "logging_steps", "save_steps", "save_total_limit"):
            require(getattr(self, key) >= 1, f"{name}.{key} is {getattr(self, key)}, but it must be at least 1.")
        require(
            self.max_steps is None or self.max_steps >= 0,
            f"{name}.max_steps is {self.max_steps}, but it must be none or at least 0.",
        )
        for key in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"):
            require(getattr(self, key) >= 0, f"{name}.{key} is {getattr(self, key)}, but it must not be negative.")


def changed(settings: Any, **changes: Any) -> Any:
    """The same settings of a stage, by the same name in messages, with other values in some fields."""
    other = copy.copy(settings)
    for name, value in changes.items():
        setattr(other, name, value)
    other.__post_init__()
    return other


@dataclass
class DataConfig:
    """The text that both stages train on, and the held-out text that the evaluation reads."""

    dataset: str | list[str] = "yahma/alpaca-cleaned"
    """Hub id of a dataset, or path(s) of .txt, .jsonl, .json or .parquet files (.gz too). LoLCATs trains on
    alpaca-cleaned."""
    dataset_config: str | None = None
    """Name of the Hub dataset's configuration, if it has several."""
    split: str = "train"
    """Split of the Hub dataset to train on."""
    revision: str | None = None
    """Branch, tag or commit of the Hub dataset."""
    format: Literal["auto", "text", "chat", "instruction", "completion"] = "auto"
    """How a record becomes text: its text field, its messages through the chat template (role/content, or ShareGPT's
    from/value), Alpaca's instruction/input/output prompt, or its prompt and completion."""
    text_field: str = "text"
    """Column that holds the text (format text)."""
    messages_field: str = "messages"
    """Column that holds the messages (format chat); where there is no `messages`, `conversations` is taken."""
    validation: str | None = None
    """Path or Hub split of held-out text; none: documents are carved off the training data."""
    validation_documents: int = 200
    """Documents carved off for validation when `validation` is none."""
    sequence_length: int = 1024
    """Tokens in one packed training sequence (1024 in LoLCATs)."""
    sentences_per_row: int = 3
    """Of an encoder, whose rows are whole sentences: consecutive ones in a row at most, one to so many."""
    mask_probability: float = 0.15
    """Share of the tokens that an encoder must find where its objective is masked (0.15 in BERT): of these 80% show as
    the mask token, 10% as a random one and 10% as they are."""
    packing: Literal["stream", "bfd"] = "stream"
    """How documents become sequences: one stream of tokens, cut (as published), or whole documents fitted into padded
    sequences by best-fit decreasing, so that only those longer than a sequence are cut."""
    isolate_documents: bool = False
    """Keep the documents of a sequence apart, for teacher and student: attention, blocks and positions start again
    with each. As published, attention crosses their borders."""
    completion_only: bool | None = None
    """Take stage 2's loss on answers only; none: no for text, yes for all other data."""
    cache_dir: str | None = None
    """Folder of the tokenised data; none: the Hugging Face cache."""
    max_tokens: int | None = None
    """Tokens of training data to prepare at most; none: all of it."""

    def __post_init__(self) -> None:
        convert_fields(self, "data")
        require(bool(self.dataset), "data.dataset is empty: give a Hub id or the path of a text file.")
        require(
            self.sequence_length >= 2, f"data.sequence_length is {self.sequence_length}, but it must be at least 2."
        )
        require(
            self.sentences_per_row >= 1,
            f"data.sentences_per_row is {self.sentences_per_row}, but it must be at least 1.",
        )
        require(
            0 < self.mask_probability < 1,
            f"data.mask_probability is {self.mask_probability}, but it must be above 0 and below 1.",
        )
        require(
            self.validation_documents >= 0,
            f"data.validation_documents is {self.validation_documents}, but it must not be negative.",
        )
        require(
            self.max_tokens is None or self.max_tokens >= 1,
            f"data.max_tokens is {self.max_tokens}, but it must be none or at least 1.",
        )


@dataclass
class TransferConfig(StageSettings):
    """Stage 1, attention transfer: only the mechanism's own parameters train, to give each layer's softmax output."""

    section = "transfer"

    tokens: int = 20_000_000
    """Training tokens (20 M in LoLCATs: 2 epochs of alpaca-cleaned)."""
    max_steps: int | None = None
    """Optimiser steps; set, it overrides `tokens`."""
    batch_size: int = 1
    """Sequences per process and micro-batch."""
    tokens_per_step: int = 8192
    """Tokens per optimiser step, a multiple of sequence length x batch size x processes (8 x 1024 in LoLCATs)."""
    loss: Literal["relative_mse", "mse", "cosine"] = "relative_mse"
    """Per-layer loss: squared error over the mean square of the teacher's output, plain squared error, or cosine
    distance."""
    loss_scale: float = 1.0
    """Factor on the loss (1000 for the published mse)."""
    branch: Literal["both", "mixed", "linear"] | None = None
    """Train on the mixed output, on the linear branch alone over all visible keys, or on the sum of both; none: both
    for linear attention with a window or sinks (measured best), mixed for all other attentions."""
    learning_rate: float = 1e-2
    """Learning rate of the feature maps (1e-2 in LoLCATs), and of a mechanism's other numbers (cosine's exponents and
    gains)."""
    window_learning_rate: float = 3e-2
    """Learning rate of the window's weight (linear, cosine) and shift (linear; measured there), and of a gate's
    bias."""
    gate_learning_rate: float = 1e-3
    """Learning rate of what a gate (linear) multiplies its input with."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    schedule: Schedule = "linear"
    """Learning rate over the run: linear or cosine decay to 0, or constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 switches clipping off."""
    window_dropout: float | list[float] = 0.0
    """Probability that a step hides the softmax window; a list is a schedule over equal parts of the run, e.g.
    0.9,0.75,0.5."""
    logging_steps: int = 10
    """Steps between lines of the log."""
    save_steps: int = 500
    """Steps between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    eval_steps: int | None = None
    """Steps between measurements on the validation text; none: only at the end of the run."""
    kind: Literal["transfer"] = "transfer"
    """Kind of the stage."""

    def __post_init__(self) -> None:
        convert_fields(self, self.section)
        self._check_stage()
        require(self.loss_scale > 0, f"{self.section}.loss_scale is {self.loss_scale}, but it must be positive.")
        for key in ("window_learning_rate", "gate_learning_rate"):
            require(
                getattr(self, key) >= 0, f"{self.section}.{key} is {getattr(self, key)}, but it must not be negative."
            )
        for share in self.window_dropout_schedule:
            require(
                0 <= share <= 1, f"{self.section}.window_dropout holds {share}, but probabilities are between 0 and 1."
            )
        require(
            self.eval_steps is None or self.eval_steps >= 1,
            f"{self.section}.eval_steps is {self.eval_steps}, but it must be none or at least 1.",
        )

    @property
    def window_dropout_schedule(self) -> list[float]:
        """`window_dropout` as a list of at least one probability."""
        dropout = self.window_dropout
        return (dropout or [0.0]) if isinstance(dropout, list) else [dropout]


@dataclass
class FinetuneConfig(StageSettings):
    """Stage 2: LoRA on the projections (and the feature maps along) with the language-modelling loss."""

    section = "finetune"

    tokens: int = 20_000_000
    """Training tokens (20 M in LoLCATs)."""
    max_steps: int | None = None
    """Optimiser steps; set, it overrides `tokens`."""
    batch_size: int = 1
    """Sequences per process and micro-batch."""
    tokens_per_step: int = 8192
    """Tokens per optimiser step, a multiple of sequence length x batch size x processes (8 x 1024 in LoLCATs)."""
    sequence_length: int | list[int] | None = None
    """Tokens of a sequence, a multiple of data.sequence_length, whose rows are joined to it; several, e.g. 1024,4096:
    each step has sequences of one of them, in turn, and of shorter ones as many more as hold the same tokens (the
    longest counts for batch_size and tokens_per_step); none: data.sequence_length."""
    length_shares: list[float] | None = None
    """Share of the tokens that each of several sequence lengths gets, in their order; none: equal shares."""
    state_passing: float = 0.0
    """Share of the steps whose sequences start from the state that the piece of text before them leaves, of the same
    length and without a gradient, as a model meets it in a long text (https://arxiv.org/abs/2507.02782); costs such a
    step another forward pass."""
    learning_rate: float = 1e-4
    """Learning rate of the LoRA weights (1e-4 in LoLCATs)."""
    mixer_learning_rate: float = 1e-3
    """Learning rate of the mechanism's parameters when `train_mixers` (measured)."""
    train_mixers: bool = True
    """Train the mechanism's parameters along (measured better; LoLCATs freezes them)."""
    lora_rank: int = 8
    """Rank of the LoRA adapters (8 in LoLCATs)."""
    lora_alpha: float = 16
    """LoRA's alpha: adapters are scaled by alpha / rank (16 in LoLCATs)."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters (0 in LoLCATs)."""
    lora_targets: list[str] | None = None
    """Names of the linear layers that get an adapter; none: the projections of the attention (q, k, v, o)."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the text."""
    kl_weight: float = 0.0
    """Weight of the KL divergence to the teacher's logits (the same weights, mechanism and adapters switched off)."""
    temperature: float = 1.0
    """Softmax temperature of the KL term."""
    schedule: Schedule = "linear"
    """Learning rate over the run: linear or cosine decay to 0, or constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 switches clipping off."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    logits_chunk: int = 1024
    """Positions whose logits exist at one time in float32."""
    logging_steps: int = 10
    """Steps between lines of the log."""
    save_steps: int = 500
    """Steps between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    kind: Literal["train"] = "train"
    """Kind of the stage."""
    weights: Literal["lora"] = "lora"
    """What trains: adapters of low rank."""

    def __post_init__(self) -> None:
        convert_fields(self, self.section)
        self._check_stage()
        for key in ("lora_rank", "logits_chunk"):
            require(
                getattr(self, key) >= 1, f"{self.section}.{key} is {getattr(self, key)}, but it must be at least 1."
            )
        for key in ("mixer_learning_rate", "ce_weight", "kl_weight"):
            require(
                getattr(self, key) >= 0, f"{self.section}.{key} is {getattr(self, key)}, but it must not be negative."
            )
        require(
            self.ce_weight + self.kl_weight > 0,
            f"{self.section}.ce_weight and {self.section}.kl_weight are both 0: set one of them.",
        )
        self._check_lengths()
        require(self.temperature > 0, f"{self.section}.temperature is {self.temperature}, but it must be positive.")
        require(self.lora_alpha > 0, f"{self.section}.lora_alpha is {self.lora_alpha}, but it must be positive.")
        require(
            0 <= self.lora_dropout < 1,
            f"{self.section}.lora_dropout is {self.lora_dropout}, but it must be at least 0 and below 1.",
        )
        require(
            self.lora_targets is None or bool(self.lora_targets),
            f"{self.section}.lora_targets is empty: name the layers to adapt, e.g. q_proj,v_proj.",
        )

    def _check_lengths(self) -> None:
        lengths, shares = self.lengths(2), self.length_shares
        require(
            bool(lengths) and min(lengths) >= 2 and len(set(lengths)) == len(lengths),
            f"{self.section}.sequence_length is {self.sequence_length}, but it must be lengths of at least 2, each "
            "once.",
        )
        require(
            shares is None or (len(shares) == len(lengths) and min(shares) > 0),
            f"{self.section}.length_shares is {shares}, but it must be a positive share for each of the "
            f"{len(lengths)} lengths in {self.section}.sequence_length.",
        )
        require(
            0 <= self.state_passing <= 1,
            f"{self.section}.state_passing is {self.state_passing}, but shares are between 0 and 1.",
        )
        require(
            not (self.state_passing and self.gradient_checkpointing),
            f"{self.section}.state_passing and gradient_checkpointing are both set, but recomputed layers are given "
            "no state: set one of them to 0 or false.",
        )

    def lengths(self, row_length: int) -> list[int]:
        """Lengths of this stage's sequences, in tokens, where the data has rows of `row_length`."""
        given = row_length if self.sequence_length is None else self.sequence_length
        return given if isinstance(given, list) else [given]


@dataclass
class DistillationConfig:
    """A frozen teacher beside the labels, while all weights train."""

    teacher: str | None = None
    """The teacher, of the student's tokenizer, layers and width: yardstick, an earlier stage's name, base (the model
    that the run starts from), or a Hub id or local directory; none: the labels alone."""
    labels_weight: float = 1.0
    """Weight of the cross-entropy with the labels."""
    logits_weight: float = 1.0
    """Weight of the divergence from the teacher's distribution of the next token."""
    hidden_weight: float = 1.0
    """Weight of the mean over layers of 1 - cosine of student's and teacher's hidden state."""
    logits_chunk: int = 4096
    """Tokens whose logits are computed at once."""

    section = "distillation"

    def __post_init__(self) -> None:
        convert_fields(self, self.section)
        self._check_weights()

    def _check_weights(self) -> None:
        weights = {key: getattr(self, key) for key in ("labels_weight", "logits_weight", "hidden_weight")}
        for key, value in weights.items():
            require(value >= 0, f"{self.section}.{key} is {value}, but it must not be negative.")
        require(any(weights.values()), f"All weights of the losses of {self.section} are 0: nothing would train.")
        require(
            self.logits_chunk >= 1, f"{self.section}.logits_chunk is {self.logits_chunk}, but it must be at least 1."
        )


@dataclass
class CalibrationConfig:
    """The mechanism's own numbers, fitted before anything trains."""

    section = "calibrate"

    sequences: int = 8
    """Training sequences to look at, the first ones."""
    batch_size: int = 1
    """Sequences per forward pass."""
    kind: Literal["calibrate"] = "calibrate"
    """Kind of the stage."""

    def __post_init__(self) -> None:
        convert_fields(self, self.section)
        for name in ("sequences", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{self.section}.{name} is {value}, but it must be at least 1.")


@dataclass
class AdaptationConfig:
    """Adaptation of the scalers from one gain cell to another, by statistics."""

    section = "adaptation"

    iterations: int = 100
    """Most steps; each is one pass over the blocks."""
    tolerance: float = 1e-3
    """Stop when every mean and deviation is this close to its target, in units of the target's deviation."""
    damping: float = 1.0
    """Part of the way to the solution that a step goes; lowered when steps make things worse."""
    patience: int = 12
    """Stop after this many steps in a row without a new best."""
    batch_size: int = 1
    """Sequences per forward pass."""
    sequences: int = 32
    """Training sequences that the statistics are taken over."""
    attention: dict[str, Any] = field(default_factory=lambda: {"cell_kind": "nonlinear"})
    """Settings of the mechanism that change."""
    kind: Literal["adapt"] = "adapt"
    """Kind of the stage."""

    def __post_init__(self) -> None:
        convert_fields(self, self.section)
        for name in ("iterations", "patience", "batch_size", "sequences"):
            require(
                getattr(self, name) >= 1, f"{self.section}.{name} is {getattr(self, name)}, but it must be at least 1."
            )
        require(
            0 < self.damping <= 1, f"{self.section}.damping is {self.damping}, but it must be above 0 and at most 1."
        )
        require(self.tolerance > 0, f"{self.section}.tolerance is {self.tolerance}, but it must be above 0.")


class RunSettings:
    """What the settings of a run and of the GLUE benchmark share: fields that each declares."""

    output_dir: str
    overwrite: bool
    resume_from_checkpoint: bool
    seed: int

    def _check_seed(self) -> None:
        require(self.seed >= 0, f"seed is {self.seed}, but it must not be negative.")

    def _check_output(self) -> None:
        require(bool(self.output_dir), "output_dir is empty: name the folder that the run is written to.")
        require(
            not (self.overwrite and self.resume_from_checkpoint),
            "overwrite and resume_from_checkpoint are both set: choose one of them.",
        )
