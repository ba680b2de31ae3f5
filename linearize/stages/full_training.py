"""All weights of a model, or some of them, trained on text: the next token, or hidden ones of an encoder.

    result = train_all(model, train, FullTrainingConfig(tokens=10_000_000), output_dir="out")

AdamW on float32 weights, a teacher's distribution and hidden states beside the labels where there is one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from linearize.data.documents import tokenizer_identity
from linearize.data.masking import Masking
from linearize.data.rows import collate
from linearize.errors import UserError
from linearize.evaluation.arms import is_student
from linearize.paths import user_path
from linearize.stages.distillation import Distiller
from linearize.stages.encoder_training import attention_parameters, without_dropout
from linearize.stages.full_trainers import DistillationTrainer, FullTrainer, MaskedTrainer, full_arguments
from linearize.stages.identity import base_identity, data_identity, require_same_run
from linearize.stages.transfer import mixer_parameters, training_only
from linearize.training.checkpointing import checkpoint_to_resume
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
        seed: Of the order of the data, the masks and the dropout.
        resume: True goes on from the latest checkpoint of this stage, if there is one; a path from that one.
        report_to: Trackers of accelerate.
        device: "cpu" keeps to the CPU; None takes the process's GPU where there is one.

    Raises:
        UserError: Settings that do not fit the model, the data or the processes; not finite losses; out of memory; a
            full disk.
    """
    if not len(train):
        raise UserError("the training data has no whole sequence: lower data.sequence_length or give more text")
    if config.eval_steps is not None and not len(validation):
        raise UserError(f"{config.section}.eval_steps is set, but there is no validation text: give data.validation.")
    name, output, length = config.section, Path(user_path(output_dir)), train.sequence_length
    checkpoints, log_path = output / "checkpoints" / name, output / "logs" / f"{name}.jsonl"
    validation_path = output / "logs" / f"{name}_validation.jsonl"
    arguments, plan = full_arguments(config, length, checkpoints, seed, report_to, device)
    if is_student(model):
        arguments.ddp_find_unused_parameters = True  # texts within the window leave the maps without a gradient
    distiller = None if teacher is None else Distiller(teacher, model, config)
    run = {
        "sequence_length": length,
        "tokens_per_step": plan.tokens_per_step,
        "num_blocks": len(train),
        "data": data_identity(train),
        "base": base_identity(model),
        "teacher": None if teacher is None else base_identity(teacher),
        "seed": seed,
        "tokenizer": None if tokenizer is None else tokenizer_identity(tokenizer)[:12],
    }
    checkpoint = checkpoint_to_resume(checkpoints, resume)
    if checkpoint is not None:
        require_same_run(checkpoint, run, plan.steps)
    log = validation_log = None
    if arguments.process_index == 0:
        after = checkpoint.step if checkpoint else None
        log = TrainingLog(log_path, after, report_to, asdict(config))
        validation_log = TrainingLog(validation_path, after)
    kind, others = _trainer_kind(distiller, tokenizer, mask_probability)
    memory = PeakMemory(arguments.device)
    quiet = nullcontext() if config.dropout else without_dropout(model)
    errors = readable_memory_errors("training", name, config, length)
    with (
        errors,
        training_only(model, trained_parameters(model, config)),
        quiet,
        Interrupt() as interrupt,
        _compiled(config),
    ):
        trainer = kind(
            model,
            arguments,
            config=config,
            train_dataset=train,
            validation=validation,
            interrupt=interrupt,
            log=log,
            validation_log=validation_log,
            run=run,
            window=list(checkpoint.state["window"]) if checkpoint else [],
            **others,
        )
        start = time.perf_counter()
        losses = trainer.run_stage(checkpoint)
        seconds = time.perf_counter() - start - trainer.measuring_seconds
        measured = trainer.measure(plan.steps)
    PartialState().wait_for_everyone()
    tokens = plan.steps * plan.tokens_per_step
    return FullTrainingResult(
        steps=plan.steps,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=len(losses) * plan.tokens_per_step / seconds if losses else None,
        losses=_curve(log_path, "loss"),
        validation=_curve(validation_path, "perplexity"),
        perplexity=measured.perplexity if measured else None,
        perplexity_tokens=measured.tokens if measured else None,
        accuracy=getattr(measured, "accuracy", None),
        peak_memory_bytes=memory.bytes(),
    )


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


def _compiled(config: FullTrainingConfig) -> Any:
    from linearize.modeling.compiled import compiled_training

    return compiled_training() if config.compile else nullcontext()


def _curve(log: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of each record of a log, one a step: a run that was resumed at its end measures again."""
    return list({record["step"]: record[name] for record in read_log(log)}.items())
