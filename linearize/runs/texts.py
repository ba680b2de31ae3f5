"""The text of a run: what it trains on, validates and measures on, and what measures it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from linearize.errors import UserError
from linearize.failures import stage

if TYPE_CHECKING:
    from linearize.evaluation.by_length import LengthText
    from linearize.runs.directory import StagesDirectory
    from linearize.runs.plan import RunPlan


@dataclass
class RunTexts:
    """Tokenizer and text of a run, as far as it needs them."""

    tokenizer: Any
    train: Any = None
    """`TokenBlocks`, or of an encoder `TextRows`; None: nothing trains."""
    validation: Any = None
    held_out: Any = None
    """What the evaluation reads: `TokenBlocks`, or of an encoder documents."""
    by_length: list[LengthText] = field(default_factory=list)
    """What the main process scores by length."""


def prepare_texts(plan: RunPlan, state: Any) -> RunTexts:
    """Load the tokenizer, and tokenise what the run trains and measures on.

    Raises:
        UserError: Text is missing, unreadable, too short, or part of what the run trains on.
    """
    from linearize.conversion.own_tokenizers import make_tokenizer
    from linearize.conversion.students import load_model_tokenizer

    config, encoder = plan.config, plan.start.encoder
    with stage("preparing the data"):
        if config.architecture is not None:
            texts = RunTexts(make_tokenizer(config, encoder))
        else:
            texts = RunTexts(load_model_tokenizer(config.source, revision=config.revision))
        (_prepare_rows if encoder else _prepare_blocks)(plan, texts, state)
    _check_validation(plan, texts)
    return texts


def _check_validation(plan: RunPlan, texts: RunTexts) -> None:
    """Refuse measurements while all weights train without the text for them."""
    for current in plan.stages:
        measures = current.what in ("all", "mechanism") and getattr(current.values, "eval_steps", None) is not None
        if measures and current.values.kind == "train" and not texts.validation:
            raise UserError(
                f"{current.name}.eval_steps is set, but there is no validation text: give data.validation, or set it "
                "to none."
            )


def _reads_text(plan: RunPlan) -> bool:
    return bool(plan.stages) or plan.selection is not None


def _prepare_blocks(plan: RunPlan, texts: RunTexts, state: Any) -> None:
    from linearize.data.sequences import load_text_blocks, prepare_data, refuse_training_files
    from linearize.evaluation.by_length import run_texts
    from linearize.stages.finetune_lengths import training_rows

    config, data, evaluation = plan.config, plan.config.data, plan.config.evaluation
    trains = _reads_text(plan)
    if trains and evaluation is not None and evaluation.texts is not None:
        refuse_training_files(data.dataset, evaluation.texts)
    if trains or (evaluation is not None and evaluation.texts is None):
        texts.train, texts.validation = prepare_data(data, texts.tokenizer, seed=config.seed)
        texts.held_out = texts.validation
        for settings in config.stages.values():
            if hasattr(settings, "lengths"):
                training_rows(texts.train, settings)  # refused here, not after the hours of the stages before
    if evaluation is None:
        return
    if evaluation.texts is not None:
        length = evaluation.sequence_length or data.sequence_length
        limit, column = evaluation.max_tokens, data.text_field
        texts.held_out = load_text_blocks(evaluation.texts, texts.tokenizer, length, limit, text_field=column)
    if not texts.held_out:
        if not plan.start.mechanisms:
            return
        raise UserError(
            "There is no held-out text to evaluate on: give data.validation or evaluation.texts, raise "
            "data.validation_documents, or set evaluation to none."
        )
    if state.is_main_process and plan.start.mechanisms and config.architecture is None:
        where = (texts.tokenizer, state.device)
        texts.by_length = run_texts(evaluation, data, texts.held_out, *where, trains=trains)


def _prepare_rows(plan: RunPlan, texts: RunTexts, state: Any) -> None:
    from linearize.data.rows import held_out_documents, prepare_rows, read_documents
    from linearize.data.sequences import refuse_training_files

    config, evaluation = plan.config, plan.config.evaluation
    texts.train, texts.validation = prepare_rows(config.data, texts.tokenizer)
    if evaluation is None or not plan.start.mechanisms or config.architecture is not None:
        return
    if evaluation.texts is not None:
        refuse_training_files(config.data.dataset, evaluation.texts)
        texts.held_out = read_documents(evaluation.texts, config.data.text_field)
    else:
        texts.held_out = held_out_documents(config.data)


def make_measures(plan: RunPlan, texts: RunTexts, directory: StagesDirectory, *, ended: bool) -> Any:
    """What measures the models of a run; None where there is nothing to compare them with.

    Args:
        ended: Whether the finished model is there, so that what was measured of one is this one's.
    """
    config = plan.config
    assert config.evaluation is not None
    keep = config.resume_from_checkpoint
    if not plan.start.encoder:
        from linearize.runs.report import RunReport

        if not texts.held_out:
            return None
        return RunReport(
            config.evaluation,
            texts.held_out,
            directory.measurements,
            keep=keep,
            ended=ended,
            texts=texts.by_length,
            trained=config.data.sequence_length,
        )
    if texts.held_out is None:
        return None
    from linearize.data.masking import Masking
    from linearize.runs.encoder_report import EncoderReport

    hides = any(getattr(stage, "objective", "") == "masked" for stage in config.stages.values())
    masking = Masking.of(texts.tokenizer, config.data.mask_probability) if hides else None
    length = config.data.sequence_length
    return EncoderReport(
        config.evaluation,
        texts.held_out,
        texts.tokenizer,
        length,
        texts.validation,
        masking,
        directory.measurements,
        keep=keep,
        ended=ended,
    )
