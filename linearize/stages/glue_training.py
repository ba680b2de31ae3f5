"""One finetuning on one task: an encoder with a new head, transformers' Trainer, and predictions at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from linearize.conversion.quantization import refuse_quantized
from linearize.conversion.students import load_config, quiet_transformers
from linearize.errors import UserError
from linearize.evaluation.glue.data import GlueRows, collate
from linearize.evaluation.glue.settings import GlueRunConfig, GlueStage
from linearize.evaluation.glue.tasks import TASKS, Task
from linearize.load_errors import explained
from linearize.modeling import BACKBONES, PREFIX, is_encoder
from linearize.stages.encoder_training import EncoderTrainer
from linearize.stages.opening import OpenStage, open_named
from linearize.training.launcher import in_bfloat16
from linearize.training.loop import Interrupt, PeakMemory, to_device

POOLER, HEAD = "bert.pooler.", "classifier."
OTHER_HEADS = ("cls.", "classifier.", "qa_outputs.")
"""First parts of the weights of heads that a checkpoint may have."""


@dataclass
class Finetuning:
    """Which finetuning of a run."""

    model: str
    """What the model is called."""
    source: str
    """Its id or directory."""
    revision: str | None
    task: str
    """A key of `TASKS`."""
    learning_rate: float
    seed: int
    weights: str = ""
    """What tells the model's weights from others: `checkpoint_digest`."""

    @property
    def key(self) -> str:
        """Path of its files within a folder, without a suffix."""
        return f"{self.model}/{self.task}/lr{self.learning_rate:g}-seed{self.seed}"


@dataclass
class Finetuned:
    """What a finetuning leaves."""

    model: Any
    steps: int
    seconds: float
    """Duration of this call's training."""
    peak_memory_bytes: int | None
    """Highest number of bytes that tensors held on the GPU; None on a CPU."""
    fresh: list[str] = field(default_factory=list)
    """What of the model below the head started at random."""


def find_model(source: str) -> str:
    """A Hub id or directory; of a run's directory the repository in it."""
    path = Path(source)
    return str(path / "final") if path.is_dir() and not (path / "config.json").is_file() else source


def check_model(source: str, revision: str | None, sequence_length: int) -> Any:
    """The config of an encoder that can be finetuned.

    Raises:
        UserError: It cannot be read, is quantised, is no encoder, or has fewer positions than asked for.
    """
    config: Any = load_config(source, revision=revision)
    refuse_quantized(source, config)
    if not is_encoder(config):
        known = ", ".join(name for name, backbone in BACKBONES.items() if backbone.encoder)
        raise UserError(f"{source} is a {config.model_type} model, which is no encoder: known are {known}.")
    if sequence_length > config.max_position_embeddings:
        raise UserError(
            f"data.sequence_length is {sequence_length}, but {source} has {config.max_position_embeddings} positions: "
            "lower it."
        )
    return config


def load_classifier(run: Finetuning, *, reset_pooler: bool = False) -> tuple[Any, list[str]]:
    """An encoder with a new head, the same for the same seed and width.

    Args:
        run: Whose.
        reset_pooler: Start the pooler at random too.

    Returns:
        The model in float32, and what of it started at random beside the head.

    Raises:
        UserError: The checkpoint cannot be read or lacks weights.
    """
    task = TASKS[run.task]
    names = dict(enumerate(task.labels or ("similarity",)))
    options = {
        "num_labels": task.num_labels,
        "problem_type": "regression" if task.is_regression else "single_label_classification",
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
    }
    with quiet_transformers(), explained(run.source):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            run.source,
            revision=run.revision,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of the head of another task
            **options,
        )
    odd = [name for name in info["unexpected_keys"] if not name.startswith(OTHER_HEADS) and "position_ids" not in name]
    missing = [name for name in info["missing_keys"] if not name.startswith((HEAD, POOLER))]
    clash = [str(entry[0]) for entry in info["mismatched_keys"] if not str(entry[0]).startswith(HEAD)]
    for names_found, what in ((missing, "lacks"), (odd, "does not know"), (clash, "has another shape for")):
        if names_found:
            raise UserError(
                f"The weights of {run.source} do not fit its config.json, which {what} {len(names_found)} of them, "
                f"first {min(names_found)}: give a complete checkpoint."
            )
    fresh = ["pooler"] if reset_pooler or any(name.startswith(POOLER) for name in info["missing_keys"]) else []
    _start_anew(model.classifier, run.seed, model.config.initializer_range)
    if fresh:
        _start_anew(model.base_model.pooler, run.seed + 1, model.config.initializer_range)
    return model, fresh


@torch.no_grad()
def _start_anew(module: nn.Module, seed: int, deviation: float) -> None:
    """Random weights as BERT's, from a generator of their own: they do not depend on what else was drawn."""
    draws = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * deviation)
        else:
            parameter.zero_()


class GlueTrainer(EncoderTrainer):
    """Trains an encoder with a head on labelled examples.

    Args:
        task: What the labels are.
        arguments, others: As in `StageTrainer`.
    """

    STAGE = "finetuning"

    config: Any

    def advice(self) -> str:
        """What to change when a loss is not finite."""
        return "resume with a lower one in training.learning_rates"

    def __init__(self, task: Task, *arguments: Any, **others: Any) -> None:
        self.task = task
        super().__init__(*arguments, **others)

    def counted(self, batch: Any) -> Tensor:
        """Its examples."""
        return torch.tensor(len(batch["labels"]))

    def losses(self, model: nn.Module, inputs: dict[str, Any], denominator: Any) -> tuple[Tensor, ...]:
        """The cross-entropy of the classes, or the squared error of a regression; a mean over the examples."""
        given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        logits, labels = model(**given).logits.float(), inputs["labels"]
        if self.task.is_regression:
            return ((logits[:, 0] - labels).square().sum() / denominator,)
        return (functional.cross_entropy(logits, labels, reduction="sum") / denominator,)


def finetune_on(
    run: Finetuning, settings: GlueRunConfig, rows: GlueRows, data_identity: str, directory: Path
) -> Finetuned:
    """Train a model on the examples of a task.

    Writes `checkpoints/KEY/step-N`, where the training is longer than `save_steps` or Ctrl-C stops it, and
    `logs/KEY.jsonl`; goes on from the latest checkpoint.

    Args:
        run: Which.
        settings: Of the whole run.
        rows: The training examples.
        data_identity: A hash of them, for the checkpoints.
        directory: The run directory.

    Raises:
        UserError: The checkpoint or the settings cannot be used; not finite losses; out of memory; a full disk.
        KeyboardInterrupt: After Ctrl-C, with a checkpoint left.
    """
    state = PartialState(cpu=settings.device == "cpu")
    model, fresh = load_classifier(run, reset_pooler=settings.reset_pooler)
    if model.config.model_type.startswith(PREFIX):
        model.set_op_backend(settings.op_backend)
    opened = _open(run, settings, rows, data_identity, directory, state)
    memory = PeakMemory(opened.arguments.device)
    padded = partial(collate, padding=model.config.pad_token_id or 0)
    with Interrupt() as interrupt:
        kind = partial(GlueTrainer, TASKS[run.task])
        trainer = opened.trainer(kind, model.to(opened.arguments.device), interrupt, data_collator=padded)
        start = time.perf_counter()
        trainer.run_stage(opened.checkpoint)
    return Finetuned(model.eval(), opened.plan.steps, time.perf_counter() - start, memory.bytes(), fresh)


def _open(
    run: Finetuning, settings: GlueRunConfig, rows: GlueRows, data_identity: str, directory: Path, state: PartialState
) -> OpenStage:
    """The stage of a finetuning; arguments as in `finetune_on`."""
    length, training = settings.data.sequence_length, settings.training
    config: GlueStage = training.stage(len(rows), length, run.learning_rate, state.num_processes)
    facts = {
        "model": run.source,
        "revision": run.revision,
        "weights": run.weights,
        "learning_rate": run.learning_rate,
        "epochs": training.epochs,
        "data": data_identity,
        "seed": run.seed,
        "batch": training.batch_size,
    }
    return open_named(
        run.key,
        config,
        rows,
        length,
        directory,
        lambda plan: {**facts, "steps": plan.steps},
        section="training",
        seed=run.seed,
        resume=True,
        report_to=settings.report_to,
        device="cpu" if settings.device == "cpu" else None,
        bf16=in_bfloat16(training.precision, on_cpu=state.device.type == "cpu"),
        save_strategy="steps" if config.save_steps < (config.max_steps or 0) else "no",
        # Texts within the window leave the feature maps without a gradient.
        ddp_find_unused_parameters=True,
    )


@torch.no_grad()
def predict(model: Any, rows: GlueRows, batch_size: int) -> list[Any]:
    """The class or the number that a model gives each example, in float32.

    Args:
        model: An encoder with a head.
        rows: The examples, in any order of lengths.
        batch_size: Examples scored together.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows.input_ids[index]))
    found: list[Any] = [None] * len(rows)
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = collate([rows[index] for index in indices], model.config.pad_token_id or 0)
            given = {name: to_device(tensor, model.device) for name, tensor in batch.items() if name != "labels"}
            logits = model(**given).logits
            best = logits[:, 0] if model.config.num_labels == 1 else logits.argmax(-1)
            for index, value in zip(indices, best.tolist(), strict=True):
                found[index] = value
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
