"""All weights of a model, or some of them, trained on text: the next token, or hidden ones of an encoder.

    result = train_all(model, train, FullTrainingConfig(tokens=10_000_000), output_dir="out")

AdamW on float32 weights, a teacher's distribution and hidden states beside the labels where there is one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from linearize.data.documents import tokenizer_identity
from linearize.data.masking import Masking
from linearize.data.rows import collate
from linearize.errors import UserError
from linearize.evaluation.arms import is_student
from linearize.stages.distillation import Distiller
from linearize.stages.encoder_training import attention_parameters, without_dropout
from linearize.stages.full_trainers import DistillationTrainer, FullTrainer, MaskedTrainer, full_arguments
from linearize.stages.identity import base_identity
from linearize.stages.opening import OpenStage, log_of, open_stage
from linearize.stages.transfer import mixer_parameters, training_only
from linearize.training.log import TrainingLog, read_log
from linearize.training.loop import Interrupt, PeakMemory, readable_memory_errors

if TYPE_CHECKING:
    from linearize.config.full_training import FullTrainingConfig


@dataclass
class FullTrainingResult:
    """What the training leaves beside the trained model."""

    steps: int
    """Steps of the whole stage, those before a resume included."""
    tokens: int
    """Tokens of the whole stage, over all processes."""
    seconds: float
    """Duration of this call's training, checkpoints included and validation not."""
    tokens_per_second: float | None
    """Of this call; None if it had no step left to run."""
    losses: list[tuple[int, float]]
    """Step, and the mean training loss since the line before it, in nats per token (per hidden one of an encoder)."""
    validation: list[tuple[int, float]]
    """Step, and the perplexity of the validation text after it."""
    perplexity: float | None
    """Of the validation text at the end, in float32; None without validation text, and beside the main process."""
    perplexity_tokens: int | None
    """Tokens that it was taken over."""
    accuracy: float | None
    """Share of the hidden tokens of the validation text that an encoder finds; None of a decoder."""
    peak_memory_bytes: int | None
    """Highest number of bytes that tensors held on the GPU; None on a CPU."""


def train_all(
    model: Any,
    train: Any,
    config: FullTrainingConfig,
    *,
    output_dir: str | os.PathLike[str],
    validation: Any = (),
    tokenizer: Any = None,
    mask_probability: float | None = None,
    teacher: Any = None,
    seed: int = 0,
    resume: bool | str | os.PathLike[str] = False,
    report_to: str | Sequence[str] = ("none",),
    device: str | None = None,
) -> FullTrainingResult:
    """Train a model, stock or converted, in place.

    Writes `checkpoints/NAME/step-N`, `logs/NAME.jsonl` and `logs/NAME_validation.jsonl` under the output directory, by
    the name of the stage (`config.section`). Ctrl-C ends the step, saves a checkpoint and raises `KeyboardInterrupt`.

    Args:
        model: With a language modelling head, in float32.
        train: Packed sequences, or rows of an encoder.
        config: Settings of the stage.
        output_dir: The run directory.
        validation: Held-out sequences or rows; none: nothing is measured.
        tokenizer: Of the text.
        mask_probability: Share of the tokens that an encoder must find; None: the next token is.
        teacher: A frozen model of the same vocabulary, layers and width, in float32; None: the labels alone.
        seed, resume, report_to, device: As in `finetune`.

    Raises:
        UserError: Settings that do not fit the model, the data or the processes; not finite losses; out of memory; a
            full disk.
    """
    _check(model, train, config, validation, hides=mask_probability is not None)
    distiller = None if teacher is None else Distiller(teacher, model, config)
    facts = {
        "teacher": None if teacher is None else base_identity(teacher),
        "tokenizer": None if tokenizer is None else tokenizer_identity(tokenizer)[:12],
    }
    where: dict[str, Any] = {"seed": seed, "resume": resume, "report_to": report_to, "device": device}
    opened = open_stage(config, train, model, output_dir, **where, facts=facts, **full_arguments(config, device))
    if is_student(model):
        opened.arguments.ddp_find_unused_parameters = True  # texts within the window leave the maps without a gradient
    kind, others = _trainer_kind(distiller, tokenizer, mask_probability)
    others["validation_log"] = _validation_log(opened)
    memory = PeakMemory(opened.arguments.device)
    errors = readable_memory_errors("training", config.section, config, train.sequence_length)
    with errors, training_only(model, trained_parameters(model, config)), _arithmetic(model, config):
        with Interrupt() as interrupt:
            trainer = opened.trainer(kind, model, interrupt, validation=validation, **others)
            start = time.perf_counter()
            losses = trainer.run_stage(opened.checkpoint)
            seconds = time.perf_counter() - start - trainer.measuring_seconds
            measured = trainer.measure(opened.plan.steps)
    PartialState().wait_for_everyone()
    return _result(opened, len(losses), seconds, measured, memory.bytes())


def _check(model: Any, train: Any, config: FullTrainingConfig, validation: Any, *, hides: bool) -> None:
    """Refuse what cannot train; `hides`: an encoder's tokens are."""
    if not len(train):
        raise UserError("the training data has no whole sequence: lower data.sequence_length or give more text")
    if hides and model.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__} has no head that finds hidden tokens: load a checkpoint whose architectures in "
            "config.json are BertForMaskedLM."
        )
    if config.eval_steps is not None and not len(validation):
        raise UserError(f"{config.section}.eval_steps is set, but there is no validation text: give data.validation.")


def _result(opened: OpenStage, steps: int, seconds: float, measured: Any, peak: int | None) -> FullTrainingResult:
    """What a training leaves.

    Args:
        steps: That this call ran, in so many seconds.
        measured: On the validation text at the end; None where there is none, and beside the main process.
        peak: Bytes.
    """
    return FullTrainingResult(
        steps=opened.plan.steps,
        tokens=opened.tokens,
        seconds=seconds,
        tokens_per_second=steps * opened.plan.tokens_per_step / seconds if steps else None,
        losses=_curve(opened.log_path, "loss"),
        validation=_curve(_validation_path(opened), "perplexity"),
        perplexity=measured.perplexity if measured else None,
        perplexity_tokens=measured.tokens if measured else None,
        accuracy=getattr(measured, "accuracy", None),
        peak_memory_bytes=peak,
    )


def _validation_path(opened: OpenStage) -> Path:
    return log_of(opened.output, f"{opened.config.section}_validation")


def _validation_log(opened: OpenStage) -> TrainingLog | None:
    """Of the main process."""
    after = opened.checkpoint.step if opened.checkpoint else None
    return TrainingLog(_validation_path(opened), after) if opened.is_main else None


def _trainer_kind(distiller: Distiller | None, tokenizer: Any, mask_probability: float | None) -> tuple[Any, dict]:
    """The Trainer, and what it is given beside."""
    if mask_probability is not None:
        return partial(MaskedTrainer, Masking.of(tokenizer, mask_probability)), {"data_collator": collate}
    if distiller is not None:
        return partial(DistillationTrainer, distiller), {}
    return FullTrainer, {}


def trained_parameters(model: Any, config: FullTrainingConfig) -> list[Any]:
    """What trains."""
    if config.weights == "all":
        return list(model.parameters())
    if config.weights == "attention":
        return attention_parameters(model)
    return [parameter for group in mixer_parameters(model).values() for parameter in group.values()]


@contextlib.contextmanager
def _arithmetic(model: Any, config: FullTrainingConfig) -> Iterator[None]:
    """Compiled, and without dropout, as the settings say."""
    from linearize.modeling.compiled import compiled_training

    with contextlib.ExitStack() as stack:
        if config.compile:
            stack.enter_context(compiled_training())
        if not config.dropout:
            stack.enter_context(without_dropout(model))
        yield


def _curve(log: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of each record of a log, one a step: a run that was resumed at its end measures again."""
    return list({record["step"]: record[name] for record in read_log(log)}.items())
