"""A stock softmax model from scratch on text, with transformers' Trainer: a teacher for the conversion.

    result = linearize.pretrain("gpt2_mini_pretrain")         # a preset, a YAML file, a dictionary or a PretrainConfig
    result = linearize.pretrain({"tokenizer": "train", "data": {"dataset": "text.jsonl"}, "output_dir": "out"})

The run directory:

config.yaml                                 every setting, resolved
logs/{pretrain,validation}.jsonl            losses; perplexities
checkpoints/pretrain/step-N
final/                                      the model and its tokenizer, an ordinary repository
report.json                                 `PretrainReport`
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

from linearize.errors import UserError
from linearize.failures import stage
from linearize.hub import FINAL, library_versions
from linearize.run_directory import CONFIG, RunDirectory
from linearize.settings import DataConfig, DistillationConfig, RunSettings, StageSettings
from linearize.settings_io import resolve
from linearize.settings_values import convert_fields, require

CHECKPOINTS = Path("checkpoints", "pretrain")
LOG, VALIDATION = Path("logs", "pretrain.jsonl"), Path("logs", "validation.jsonl")
REPORT = "report.json"


GPT2_TOKENIZER = "openai-community/gpt2"


@dataclass
class ModelConfig:
    """The shape of the model; its positions are `data.sequence_length`, its vocabulary is the tokenizer's."""

    type: Literal["gpt2"] = "gpt2"
    """The architecture."""
    n_layer: int = 12
    """Layers (12 in GPT-2 of 124 M)."""
    n_head: int = 12
    """Attention heads (12 in GPT-2 of 124 M)."""
    n_embd: int = 768
    """Width, a multiple of the heads (768 in GPT-2 of 124 M)."""
    dropout: float = 0.0
    """Dropout of embeddings, attention and residuals (0.1 in GPT-2; 0 where no text is seen often)."""

    def __post_init__(self) -> None:
        convert_fields(self, "model")
        for key in ("n_layer", "n_head", "n_embd"):
            require(getattr(self, key) >= 1, f"model.{key} is {getattr(self, key)}, but it must be at least 1.")
        require(
            self.n_embd % self.n_head == 0,
            f"model.n_embd is {self.n_embd}, but it must be a multiple of model.n_head ({self.n_head}).",
        )
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}, but it must be at least 0 and below 1.")


@dataclass
class PretrainingConfig(StageSettings):
    """The steps: AdamW, a warm-up and a cosine. The defaults are nanoGPT's for GPT-2 of 124 M, over fewer tokens."""

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
    min_lr_ratio: float = 0.1
    """Share of the learning rate at which the cosine ends."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, on tensors of two or more dimensions; biases and norms have none."""
    adam_beta1: float = 0.9
    """AdamW's decay of the gradients' mean."""
    adam_beta2: float = 0.95
    """AdamW's decay of the gradients' mean square."""
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
    """Load a tokenizer, or train a byte-level BPE on the training text (documents that are carved off for validation
    included)."""
    tokenizer_name_or_path: str | None = None
    """Hub id or local directory of the tokenizer to load; none: the checkpoint's, and GPT-2's for random weights."""
    vocab_size: int = 50_257
    """Entries of a trained tokenizer, at most; a loaded one has its own."""
    tokenizer_characters: int = 100_000_000
    """Characters of text that a tokenizer is trained on, at most."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The shape of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation text."""
    training: PretrainingConfig = field(default_factory=PretrainingConfig)
    """The steps."""
    distillation: DistillationConfig | None = None
    """Train against a teacher as well; none: the labels alone."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Trackers of transformers' Trainer: trackio, wandb, tensorboard, all or none."""

    def __post_init__(self) -> None:
        convert_fields(self, "")
        self._check_run()
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

    @property
    def tokenizer_source(self) -> str:
        """Where a tokenizer is loaded from."""
        return self.tokenizer_name_or_path or self.model_name_or_path or GPT2_TOKENIZER


@dataclass
class PretrainReport:
    """What a pretraining measured; `report.json`."""

    architecture: str
    """Class of the model."""
    parameters: int
    """Parameters, tied ones once."""
    vocab_size: int
    """Entries of the vocabulary."""
    train_sequences: int
    """Training sequences there were; more tokens than they hold were seen more than once."""
    steps: int
    """Steps of the whole run, those before a resume included."""
    tokens: int
    """Tokens of the whole run."""
    seconds: float
    """Duration of the last call's training, checkpoints included and validation not."""
    tokens_per_second: float | None
    """Of the last call; None if it had no step left to run."""
    losses: list[tuple[int, float]]
    """Step, and the mean training loss since the line before it, in nats per token."""
    validation: list[tuple[int, float]]
    """Step, and the perplexity of the validation text after it."""
    perplexity: float | None
    """Of the validation text at the end, in float32; None without validation text."""
    perplexity_tokens: int | None
    """Tokens that it was taken over."""
    peak_memory_bytes: int | None
    """Highest number of bytes that tensors held on the GPU; None on a CPU."""
    device: str
    """Name of the GPU, or cpu."""
    versions: dict[str, str]
    """Of the libraries."""


@dataclass
class PretrainResult:
    """What a pretraining leaves."""

    output_dir: Path
    final: Path
    """The repository."""
    report: PretrainReport | None
    """None on the other processes of a launcher."""


class PretrainDirectory(RunDirectory):
    """The directory of a pretraining."""

    contents = (CONFIG, "logs", "checkpoints", FINAL, REPORT)

    def is_complete(self) -> bool:
        """Whether the run that lies there has ended."""
        return self.final.is_dir() and (self.path / REPORT).is_file()

    def read_report(self) -> PretrainReport:
        """The report of a complete run."""
        return PretrainReport(**json.loads((self.path / REPORT).read_text(encoding="utf-8")))


def pretrain(config: PretrainConfig | Mapping[str, Any] | str | PathLike[str]) -> PretrainResult:
    """Train all weights of a model, from scratch or from a checkpoint, measure it and save it.

    Args:
        config: Settings, a mapping of them, a YAML file, or the name of a shipped preset.

    Raises:
        UserError: Input that the user can mend; nothing half-written is left, checkpoints stay.
        KeyboardInterrupt: After Ctrl-C in training, with a checkpoint left.
    """
    settings = resolve(config, settings=PretrainConfig)
    directory = PretrainDirectory(settings)
    directory.check()

    import torch
    from accelerate import PartialState

    state = PartialState(cpu=settings.device == "cpu")
    if settings.resume_from_checkpoint and directory.is_complete():
        if state.is_main_process:
            print(f"The run in {directory.path} is complete: {directory.final}", flush=True)
        return PretrainResult(directory.path, directory.final, directory.read_report())

    from linearize.checkpointing import checkpoint_to_resume, require_same_run
    from linearize.data import main_process_first, prepare_data
    from linearize.data_documents import tokenizer_identity
    from linearize.modeling.compiled import compiled_training
    from linearize.pretraining_model import build_distiller, build_model, make_tokenizer
    from linearize.pretraining_trainer import DistillationTrainer, PretrainingTrainer, pretraining_arguments
    from linearize.training_log import TrainingLog
    from linearize.training_loop import Interrupt, PeakMemory

    arguments, plan = pretraining_arguments(settings, directory.path / CHECKPOINTS)
    with stage("preparing the data"):
        tokenizer = make_tokenizer(settings)
        train, validation = prepare_data(settings.data, tokenizer)
    if settings.training.eval_steps is not None and not len(validation):
        raise UserError("training.eval_steps is set, but there is no validation text: give data.validation.")
    model = build_model(settings, tokenizer)
    distiller = build_distiller(settings, model)
    run = {
        "sequence_length": train.sequence_length,
        "tokens_per_step": plan.tokens_per_step,
        "num_blocks": len(train),
        "seed": settings.seed,
        "steps": plan.steps,
        "tokenizer": tokenizer_identity(tokenizer)[:12],
    }
    resume = settings.resume_from_checkpoint
    checkpoint = checkpoint_to_resume(directory.path / CHECKPOINTS, resume) if resume else None
    if checkpoint is not None:
        require_same_run(checkpoint, run)
    main_process_first(lambda: directory.prepare() if state.is_main_process else None)
    if state.is_main_process:
        print(
            f"{type(model).__name__}, {model.num_parameters():,} parameters; {len(train):,} training sequences of "
            f"{train.sequence_length} tokens, {len(validation):,} for validation; {plan.steps:,} steps of "
            f"{plan.tokens_per_step:,} tokens",
            flush=True,
        )
    memory = PeakMemory(arguments.device)
    after = checkpoint.step if checkpoint else None
    logs = [TrainingLog(directory.path / name, after) if state.is_main_process else None for name in (LOG, VALIDATION)]
    lower = (
        f"lower training.batch_size (now {settings.training.batch_size}) or data.sequence_length (now "
        f"{settings.data.sequence_length})"
    )
    with stage("pretraining", lower):
        with Interrupt() as interrupt:
            kind = PretrainingTrainer if distiller is None else partial(DistillationTrainer, distiller)
            trainer = kind(
                model,
                arguments,
                config=settings.training,
                train_dataset=train,
                validation=validation,
                interrupt=interrupt,
                log=logs[0],
                validation_log=logs[1],
                run=run,
                window=list(checkpoint.state["window"]) if checkpoint else [],
            )
            start = time.perf_counter()
            with compiled_training() if settings.training.compile else nullcontext():
                losses = trainer.run_stage(checkpoint)
            seconds = time.perf_counter() - start - trainer.measuring_seconds
        measured = trainer.measure(plan.steps)
    report = None
    if state.is_main_process:
        report = PretrainReport(
            architecture=type(model).__name__,
            parameters=model.num_parameters(),
            vocab_size=model.config.vocab_size,
            train_sequences=len(train),
            steps=plan.steps,
            tokens=plan.steps * plan.tokens_per_step,
            seconds=seconds,
            tokens_per_second=len(losses) * plan.tokens_per_step / seconds if losses else None,
            losses=_curve(directory.path / LOG, "loss"),
            validation=_curve(directory.path / VALIDATION, "perplexity"),
            perplexity=measured.perplexity if measured else None,
            perplexity_tokens=measured.tokens if measured else None,
            peak_memory_bytes=memory.bytes(),
            device=torch.cuda.get_device_name() if arguments.device.type == "cuda" else arguments.device.type,
            versions=library_versions(),
        )
        with stage("saving the model"):
            _save(settings, directory, model, tokenizer, report)
    state.wait_for_everyone()
    return PretrainResult(directory.path, directory.final, report)


def _curve(log: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of each record of a log, one a step: a run that was resumed at its end measures again."""
    from linearize.training_log import read_log

    return list({record["step"]: record[name] for record in read_log(log)}.items())


def _save(
    settings: PretrainConfig, directory: PretrainDirectory, model: Any, tokenizer: Any, report: PretrainReport
) -> None:
    from linearize.checkpointing import atomic_directory, write_file
    from linearize.evaluation.arms import is_student
    from linearize.hub import read_record, save_final

    if is_student(model):
        record = read_record(settings.model_name_or_path or "")
        tokens = {**(record.get("tokens") or {})}
        what = "all weights" if settings.training.train == "all" else settings.training.train
        tokens[what] = tokens.get(what, 0) + report.tokens
        save_final(model, tokenizer, directory.final, {**record, "tokens": tokens})
    else:
        with atomic_directory(directory.final) as final:
            model.save_pretrained(final)
            tokenizer.save_pretrained(final)
    write_file(directory.path / REPORT, (json.dumps(dataclasses.asdict(report), indent=1) + "\n").encode())
    speed = f", {report.tokens_per_second:,.0f} tokens/s" if report.tokens_per_second else ""
    quality = f", validation perplexity {report.perplexity:.2f}" if report.perplexity else ""
    print(f"pretraining: {report.steps:,} steps, {report.tokens:,} tokens{speed}{quality}", flush=True)
    print(f"Saved {directory.final}", flush=True)
