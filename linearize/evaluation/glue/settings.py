"""The settings of finetuning on GLUE.

The defaults are BERT's, as published for these tasks: Devlin et al. 2018 (arXiv 1810.04805), sections 4.1 and A.3, and
the code that goes with it (google-research/bert, run_classifier.py).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from linearize.config.settings import RunSettings, Schedule, StageSettings
from linearize.config.values import convert_fields, require
from linearize.evaluation.glue.tasks import TASKS, task_names

GLUE = "nyu-mll/glue"
REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
FILE_NAME = re.compile(r"^\w[\w.+-]*$")


@dataclass
class GlueDataConfig:
    """The tasks' examples."""

    dataset: str = GLUE
    """Hub id of a dataset with GLUE's configurations, or a folder that holds a folder for each task (cola, sst2, mrpc,
    stsb, qqp, mnli, qnli, rte, wnli) with train and validation as .csv, .tsv, .jsonl or .parquet, in GLUE's columns;
    MNLI has validation_matched and validation_mismatched."""
    revision: str | None = None
    """Branch, tag or commit of the Hub dataset; none: of nyu-mll/glue the commit that is tested."""
    sequence_length: int = 128
    """Tokens of an example at most, marks included; longer ones are cut (128 in BERT)."""
    max_examples: int | None = None
    """Examples of each split at most, the first ones; none: all."""

    @property
    def folder(self) -> Path | None:
        """The local folder; None of a Hub dataset."""
        path = Path(self.dataset)
        return path if path.is_dir() else None

    def __post_init__(self) -> None:
        convert_fields(self, "data")
        if self.revision is None and self.dataset == GLUE:
            self.revision = REVISION
        require(bool(self.dataset), "data.dataset is empty: give a Hub id or a folder.")
        require(
            self.sequence_length >= 8, f"data.sequence_length is {self.sequence_length}, but it must be at least 8."
        )
        require(
            self.max_examples is None or self.max_examples >= 1,
            f"data.max_examples is {self.max_examples}, but it must be none or at least 1.",
        )


@dataclass
class GlueStage(StageSettings):
    """The steps of one finetuning, as the Trainer of the stages takes them."""

    max_steps: int | None
    batch_size: int
    tokens_per_step: int
    learning_rate: float
    mixer_learning_rate: float
    schedule: Schedule
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    logging_steps: int
    save_steps: int
    save_total_limit: int = 1
    tokens: int = 1


@dataclass
class GlueTrainingConfig:
    """The steps of each finetuning; all weights train."""

    batch_size: int = 32
    """Examples per optimiser step, over all processes (32 in BERT)."""
    micro_batch_size: int | None = None
    """Examples of a process at once, a divisor of its share of a step's; none: all of its share. It has no part in the
    result but for dropout, so a run that goes on may change it."""
    epochs: float = 3.0
    """Passes over the training examples (3 in BERT)."""
    max_steps: int | None = None
    """Optimiser steps; set, it overrides `epochs`."""
    learning_rates: list[float] = field(default_factory=lambda: [2e-5])
    """Highest learning rate. Of several, each is tried, and a model has for each task the one that is best on the
    validation examples over all seeds, as in BERT (5e-5, 4e-5, 3e-5, 2e-5)."""
    mixer_learning_rate: float | None = None
    """Highest learning rate of a converted model's own mechanism; none: the other weights'."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up: linear or cosine decay to 0, or constant."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises from 0 (0.1 in BERT's code)."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 switches clipping off."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the matrix products in training; auto: bfloat16 on a GPU and float32 on a CPU. The weights are float32
    always, and so is the evaluation."""
    eval_batch_size: int = 64
    """Examples scored together."""
    logging_steps: int = 50
    """Steps between lines of the log."""
    save_steps: int = 2000
    """Steps between checkpoints of one finetuning; a shorter one has none, unless Ctrl-C stops it."""

    def __post_init__(self) -> None:
        convert_fields(self, "training")
        for key in ("batch_size", "micro_batch_size", "eval_batch_size", "logging_steps", "save_steps"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"training.{key} is {value}, but it must be at least 1.")
        require(self.epochs > 0, f"training.epochs is {self.epochs}, but it must be positive.")
        require(
            self.max_steps is None or self.max_steps >= 1,
            f"training.max_steps is {self.max_steps}, but it must be none or at least 1.",
        )
        require(bool(self.learning_rates), "training.learning_rates is empty: give one or several.")
        require(
            len(set(self.learning_rates)) == len(self.learning_rates),
            "training.learning_rates names a rate twice: leave one out.",
        )
        rates = [*self.learning_rates, self.mixer_learning_rate or 0.0, self.weight_decay, self.max_grad_norm]
        require(min(rates) >= 0, "Learning rates, weight_decay and max_grad_norm of training must not be negative.")
        require(
            0 <= self.warmup_ratio <= 1,
            f"training.warmup_ratio is {self.warmup_ratio}, but it must be between 0 and 1.",
        )

    def own_examples(self, num_processes: int) -> int:
        """Examples of a process at once."""
        return self.micro_batch_size or self.batch_size // num_processes

    def stage(self, examples: int, sequence_length: int, learning_rate: float, num_processes: int = 1) -> GlueStage:
        """The steps on so many training examples.

        Raises:
            UserError: The batch cannot be divided by the processes, or a process's share by its micro-batches.
        """
        require(
            self.batch_size % num_processes == 0,
            f"training.batch_size is {self.batch_size}, but it must be a multiple of the {num_processes} processes.",
        )
        share, own = self.batch_size // num_processes, self.own_examples(num_processes)
        require(
            share % own == 0,
            f"training.micro_batch_size is {own}, but it must divide the {share} examples of a process and step.",
        )
        steps = self.max_steps or max(1, math.ceil(examples * self.epochs / self.batch_size))
        mixer_rate = learning_rate if self.mixer_learning_rate is None else self.mixer_learning_rate
        return GlueStage(
            max_steps=steps,
            batch_size=own,
            tokens_per_step=self.batch_size * sequence_length,
            learning_rate=learning_rate,
            mixer_learning_rate=mixer_rate,
            schedule=self.schedule,
            warmup_steps=round(self.warmup_ratio * steps),
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            logging_steps=self.logging_steps,
            save_steps=self.save_steps,
        )


@dataclass
class GlueRunConfig(RunSettings):
    """Finetuning of one or several encoders on GLUE."""

    preset_folder: ClassVar[str] = "glue"

    models: list[str] = field(default_factory=lambda: ["google-bert/bert-base-uncased"])
    """The encoders: Hub ids, directories or run directories, stock or converted, e.g. a teacher and its student; each
    starts with the same new head."""
    names: list[str] | None = None
    """What each model is called in the table; none: the last part of its id or path."""
    revisions: list[str] | None = None
    """Branch, tag or commit of each model's repository; none: main."""
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """Tasks of GLUE."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the head, the order of the examples and the dropout; the table has mean and deviation over them."""
    output_dir: str = "out_glue"
    """The run directory: config.yaml, results, logs, report.json, report.md and, if asked for, models."""
    overwrite: bool = False
    """Replace a run that `output_dir` already holds."""
    resume_from_checkpoint: bool = False
    """Continue the run in `output_dir`: what is finished is not run again. Models, tasks, seeds and learning rates may
    be added."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda: auto is the process's GPU, else the CPU."""
    data: GlueDataConfig = field(default_factory=GlueDataConfig)
    """The tasks' examples."""
    training: GlueTrainingConfig = field(default_factory=GlueTrainingConfig)
    """The steps of each finetuning."""
    reset_pooler: bool = False
    """Start every model's pooler at random, as that of a model whose checkpoint has none."""
    save_models: bool = False
    """Keep every finetuned model under `models`."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Trackers: trackio, wandb, tensorboard, all or none. All stages are one run of the project linearize."""
    op_backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Implementation of a converted model's attention; auto: the fastest that runs here."""

    def __post_init__(self) -> None:
        convert_fields(self, "")
        self._check_output()
        require(bool(self.models), "models is empty: name one or several.")
        require(bool(self.tasks), f"tasks is empty: name some of {', '.join(TASKS)}.")
        self.tasks = task_names(self.tasks)
        require(bool(self.seeds), "seeds is empty: give one or several.")
        require(min(self.seeds) >= 0, f"seeds holds {min(self.seeds)}, but seeds must not be negative.")
        require(len(set(self.seeds)) == len(self.seeds), "seeds names a seed twice: leave one out.")
        for key in ("names", "revisions"):
            given = getattr(self, key)
            require(
                given is None or len(given) == len(self.models),
                f"{key} has {len(given or ())} entries for {len(self.models)} models: give one for each.",
            )
        shown = self.model_names()
        for name in shown:
            require(shown.count(name) == 1, f"Two models are called {name}: give each a name of its own with names.")
            require(
                bool(FILE_NAME.match(name)),
                f"The model name {name!r} is no file name: give one of letters, digits, dots and dashes with names.",
            )

    def model_names(self) -> list[str]:
        """What each model is called."""
        return [default_name(source) for source in self.models] if self.names is None else self.names

    def revision(self, index: int) -> str | None:
        """The revision of a model."""
        return None if self.revisions is None else self.revisions[index]


def default_name(source: str) -> str:
    """The last part of an id or a path; of a run's `final` the run's."""
    path = Path(source).resolve() if Path(source).exists() else Path(source)
    return path.parent.name if path.name == "final" else path.name
