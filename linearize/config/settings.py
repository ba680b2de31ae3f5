"""All settings of a run: what YAML, flags and Python callers set, with units and where the defaults come from.

The sections are plain dataclasses. `yaml_io.py` reads and writes them as YAML, and the flags are made from
them. Measured defaults come from this project's own runs on SmolLM2-135M (see docs/results.md); published ones from
LoLCATs (Zhang et al. 2024, https://arxiv.org/abs/2410.10254; its configs are quoted in
recipes/configs/llama3_8b_lolcats.yaml).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from linearize.config.evaluation import EvaluationConfig
from linearize.config.selection import LayerChoice, SelectConfig
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

    def _check_stage(self, name: str) -> None:
        for key in ("tokens", "batch_size", "tokens_per_step", "logging_steps", "save_steps", "save_total_limit"):
            require(getattr(self, key) >= 1, f"{name}.{key} is {getattr(self, key)}, but it must be at least 1.")
        require(
            self.max_steps is None or self.max_steps >= 0,
            f"{name}.max_steps is {self.max_steps}, but it must be none or at least 0.",
        )
        for key in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"):
            require(getattr(self, key) >= 0, f"{name}.{key} is {getattr(self, key)}, but it must not be negative.")


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

    def __post_init__(self) -> None:
        convert_fields(self, "transfer")
        self._check_stage("transfer")
        require(self.loss_scale > 0, f"transfer.loss_scale is {self.loss_scale}, but it must be positive.")
        for key in ("window_learning_rate", "gate_learning_rate"):
            require(getattr(self, key) >= 0, f"transfer.{key} is {getattr(self, key)}, but it must not be negative.")
        for share in self.window_dropout_schedule:
            require(0 <= share <= 1, f"transfer.window_dropout holds {share}, but probabilities are between 0 and 1.")
        require(
            self.eval_steps is None or self.eval_steps >= 1,
            f"transfer.eval_steps is {self.eval_steps}, but it must be none or at least 1.",
        )

    @property
    def window_dropout_schedule(self) -> list[float]:
        """`window_dropout` as a list of at least one probability."""
        dropout = self.window_dropout
        return (dropout or [0.0]) if isinstance(dropout, list) else [dropout]


@dataclass
class FinetuneConfig(StageSettings):
    """Stage 2: LoRA on the projections (and the feature maps along) with the language-modelling loss."""

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

    def __post_init__(self) -> None:
        convert_fields(self, "finetune")
        self._check_stage("finetune")
        for key in ("lora_rank", "logits_chunk"):
            require(getattr(self, key) >= 1, f"finetune.{key} is {getattr(self, key)}, but it must be at least 1.")
        for key in ("mixer_learning_rate", "ce_weight", "kl_weight"):
            require(getattr(self, key) >= 0, f"finetune.{key} is {getattr(self, key)}, but it must not be negative.")
        require(
            self.ce_weight + self.kl_weight > 0,
            "finetune.ce_weight and finetune.kl_weight are both 0: set one of them.",
        )
        self._check_lengths()
        require(self.temperature > 0, f"finetune.temperature is {self.temperature}, but it must be positive.")
        require(self.lora_alpha > 0, f"finetune.lora_alpha is {self.lora_alpha}, but it must be positive.")
        require(
            0 <= self.lora_dropout < 1,
            f"finetune.lora_dropout is {self.lora_dropout}, but it must be at least 0 and below 1.",
        )
        require(
            self.lora_targets is None or bool(self.lora_targets),
            "finetune.lora_targets is empty: name the layers to adapt, e.g. q_proj,v_proj.",
        )

    def _check_lengths(self) -> None:
        lengths, shares = self.lengths(2), self.length_shares
        require(
            bool(lengths) and min(lengths) >= 2 and len(set(lengths)) == len(lengths),
            f"finetune.sequence_length is {self.sequence_length}, but it must be lengths of at least 2, each once.",
        )
        require(
            shares is None or (len(shares) == len(lengths) and min(shares) > 0),
            f"finetune.length_shares is {shares}, but it must be a positive share for each of the {len(lengths)} "
            "lengths in finetune.sequence_length.",
        )
        require(
            0 <= self.state_passing <= 1,
            f"finetune.state_passing is {self.state_passing}, but shares are between 0 and 1.",
        )
        require(
            not (self.state_passing and self.gradient_checkpointing),
            "finetune.state_passing and finetune.gradient_checkpointing are both set, but recomputed layers are given "
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
    """Hub id or local directory of the teacher, of the student's tokenizer, layers and width."""
    labels_weight: float = 1.0
    """Weight of the cross-entropy with the labels."""
    logits_weight: float = 1.0
    """Weight of the divergence from the teacher's distribution of the next token."""
    hidden_weight: float = 1.0
    """Weight of the mean over layers of 1 - cosine of student's and teacher's hidden state."""
    logits_chunk: int = 4096
    """Tokens whose logits are computed at once."""

    def __post_init__(self) -> None:
        convert_fields(self, "distillation")
        weights = {key: getattr(self, key) for key in ("labels_weight", "logits_weight", "hidden_weight")}
        for key, value in weights.items():
            require(value >= 0, f"distillation.{key} is {value}, but it must not be negative.")
        require(any(weights.values()), "All weights of distillation are 0: nothing would train.")
        require(
            self.logits_chunk >= 1, f"distillation.logits_chunk is {self.logits_chunk}, but it must be at least 1."
        )


@dataclass
class AdaptationConfig:
    """Adaptation of the scalers from one gain cell to another, by statistics."""

    iterations: int = 100
    """Most steps; each is one pass over the blocks."""
    tolerance: float = 1e-3
    """Stop when every mean and deviation is this close to its target, in units of the target's deviation."""
    damping: float = 1.0
    """Part of the way to the solution that a step goes; lowered when steps make things worse."""
    patience: int = 12
    """Stop after this many steps in a row without a new best."""
    batch_size: int = 1
    """Blocks per forward pass."""

    def __post_init__(self) -> None:
        convert_fields(self, "adaptation")
        for name in ("iterations", "patience", "batch_size"):
            require(
                getattr(self, name) >= 1, f"adaptation.{name} is {getattr(self, name)}, but it must be at least 1."
            )
        require(0 < self.damping <= 1, f"adaptation.damping is {self.damping}, but it must be above 0 and at most 1.")
        require(self.tolerance > 0, f"adaptation.tolerance is {self.tolerance}, but it must be above 0.")


class RunSettings:
    """What the settings of every kind of run share: fields that each declares, and where its presets are."""

    preset_folder: ClassVar[str] = "."
    """Folder of the shipped presets, under `recipes/configs`."""
    output_dir: str
    overwrite: bool
    resume_from_checkpoint: bool
    seed: int

    def _check_calibration(self, sequences: int) -> None:
        require(sequences >= 0, f"calibration_sequences is {sequences}, but it must not be negative.")

    def _check_run(self) -> None:
        self._check_output()
        require(self.seed >= 0, f"seed is {self.seed}, but it must not be negative.")

    def _check_output(self) -> None:
        require(bool(self.output_dir), "output_dir is empty: name the folder that the run is written to.")
        require(
            not (self.overwrite and self.resume_from_checkpoint),
            "overwrite and resume_from_checkpoint are both set: choose one of them.",
        )


@dataclass
class RunConfig(LayerChoice, RunSettings):
    """One whole run: convert, transfer, finetune, evaluate, save."""

    model_name_or_path: str = "meta-llama/Meta-Llama-3-8B"
    """The teacher: a Hub id, a local directory, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of the teacher's repository."""
    output_dir: str = "out"
    """The run directory: config.yaml, logs, plots, checkpoints, adapter and final."""
    overwrite: bool = False
    """Replace a run that `output_dir` already holds."""
    resume_from_checkpoint: bool = False
    """Continue the run in `output_dir` from its newest checkpoint, in the stage where it stopped."""
    seed: int = 0
    """Seed of the initialisation, the order of the data and the dropout."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the teacher's weights and of the computation; the mechanism's parameters are float32 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The process's GPU, else the CPU; or one of them (CUDA_VISIBLE_DEVICES chooses among several)."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits while training (bitsandbytes NF4); the result is merged into the full
    weights."""
    load_in_8bit: bool = False
    """The same in 8 bits."""
    attention: dict[str, Any] = field(default_factory=lambda: {"type": "linear"})
    """The new attention: `type` and the settings of that mechanism (window, sinks, feature_map, ...)."""
    softmax_layers: int | list[int] | str = field(default_factory=list)
    """Layers that keep softmax attention: a list of indices such as [4] or 0,5, from 0, negative ones from the end; or
    a number of them or a share such as 10%, which are then chosen by measuring (section select)."""
    state_budget: int | str | None = None
    """Bytes that the states of one sequence may hold beside softmax layers, such as 7MB, or 240KB/layer on average:
    windows are then placed by measuring (section select), in place of attention.window."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """How layers and windows are measured, where state_budget or a number of softmax_layers asks for it."""
    mixer_types: list[str] | None = None
    """The attention of each layer by name: softmax, or an entry of `mixers`; none: `attention` and
    `softmax_layers`."""
    mixers: dict[str, Any] | None = None
    """Settings of each name in `mixer_types`, as `attention` has them."""
    sliding_window: Literal["keep", "lift"] = "keep"
    """A teacher's sliding window (Mistral-7B-v0.1): keep it in softmax layers and in the teacher that stage 1 learns
    from, or lift it there, so that they see all tokens; converted layers never have it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation text."""
    calibration_sequences: int = 8
    """Training sequences that a mechanism with a calibration (cosine, landmark) is fitted to before it trains; 0: not
    fitted."""
    transfer: TransferConfig | None = field(default_factory=TransferConfig)
    """Stage 1; none: skipped."""
    finetune: FinetuneConfig | None = field(default_factory=FinetuneConfig)
    """Stage 2; none: skipped."""
    evaluation: EvaluationConfig | None = field(default_factory=EvaluationConfig)
    """The measurements; none: skipped."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Trackers: trackio, wandb, tensorboard, all or none. All stages are one run of the project linearize."""
    op_backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Implementation of the new attention; auto: the fastest that runs here."""
    push_to_hub: str | None = None
    """Hub repository that the result is pushed to, e.g. me/Llama-3-8B-linear; none: not pushed."""

    def __post_init__(self) -> None:
        convert_fields(self, "")
        self.attention.setdefault("type", "linear")
        self._check_layers()
        require(bool(self.model_name_or_path), "model_name_or_path is empty: name the teacher.")
        self._check_run()
        self._check_calibration(self.calibration_sequences)
        require(
            not (self.load_in_4bit and self.load_in_8bit),
            "load_in_4bit and load_in_8bit are both set: choose one of them.",
        )
        require(
            self.finetune is not None or self.evaluation is None or not self.evaluation.yardstick,
            "evaluation.yardstick trains the teacher as stage 2 trains the student: set finetune, or leave it out.",
        )
        require(
            self.push_to_hub is None or self.push_to_hub.count("/") <= 1,
            f"push_to_hub is {self.push_to_hub!r}, but a repository is named NAME or OWNER/NAME.",
        )
