"""The command `linearize evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.context_flags import (
    ByLength,
    ContextSeed,
    Depths,
    NaturalLengths,
    PasskeyLengths,
    PerplexityLengths,
    RopeScalingFlag,
    TrialNumbers,
    tokens,
)
from linearize.cli.flags import with_options
from linearize.cli.loading import (
    Device,
    Dtype,
    Found,
    Model,
    Revision,
    check_context,
    choose_device,
    find_model,
    load,
    read_config,
    record_of,
)
from linearize.errors import UserError
from linearize.failures import command, stage

MAX_TOKENS = 65_536
"""Tokens that are scored where nobody says how many."""


@dataclass
class Measures:
    """What is measured and how; a flag each."""

    texts: Annotated[
        list[str] | None,
        typer.Option("--data", "--text", help="Text to score (.txt, .jsonl, .parquet); repeat for more."),
    ] = None
    text_field: Annotated[str, typer.Option("--text_field", help="Column that holds the text.")] = "text"
    tasks: Annotated[str | None, typer.Option("--tasks", help="Tasks of lm-eval, separated by commas.")] = None
    include_path: Annotated[str | None, typer.Option("--include_path", help="Folder with local task files.")] = None
    limit: Annotated[int | None, typer.Option("--limit", help="Documents per task.")] = None
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="The teacher, for the rows that merged weights cannot give.")
    ] = None
    sequence_length: Annotated[
        int, typer.Option("--sequence_length", parser=tokens, help="Tokens of one scored sequence.")
    ] = 1024
    max_tokens: Annotated[
        int | None, typer.Option("--max_tokens", parser=tokens, help="Tokens to score.  [default: 65536]")
    ] = None
    batch_size: Annotated[int, typer.Option("--batch_size", help="Sequences scored together.")] = 1
    controls: Annotated[
        bool,
        typer.Option(
            "--controls/--no_controls", help="Measure teacher, control and single arms too, where there are any."
        ),
    ] = True
    speed: Annotated[bool, typer.Option("--speed", help="Time prefill and decoding too.")] = False
    noise: Annotated[
        str | None,
        typer.Option(
            "--noise", help="Deviations of gain cells, e.g. read=0.01,mismatch=0.05 (also write, leak_spread)."
        ),
    ] = None
    passkey: PasskeyLengths = None
    natural: NaturalLengths = None
    context_perplexity: PerplexityLengths = None
    by_length: ByLength = None
    trials: TrialNumbers = None
    depths: Depths = 10
    seed: ContextSeed = 0
    rope_scaling: RopeScalingFlag = None
    cell_sweeps: Annotated[
        bool, typer.Option("--cell_sweeps", help="Perplexity over the leak and the weight levels of gain cells.")
    ] = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            help="Folder for evaluation.json, evaluation.md, tasks.json and plots. Default none, but `evaluation` "
            "with --noise, --cell_sweeps, --passkey, --natural, --context_perplexity or --by_length, which draw "
            "a plot.",
        ),
    ] = None

    def contexts(self) -> Any:
        """The `ContextPlan`.

        Raises:
            UserError: A length is malformed.
        """
        from linearize.evaluation import plan_contexts

        how: dict[str, Any] = {"depths": self.depths, "seed": self.seed, "rope_scaling": self.rope_scaling}
        return plan_contexts(self.passkey, self.natural, self.context_perplexity, trials=self.trials, **how)

    def of_cells(self) -> bool:
        """Whether gain cells are varied."""
        return self.noise is not None or self.cell_sweeps

    def task_names(self) -> list[str]:
        """Tasks of lm-eval."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


MAIN = (
    *("texts", "tasks", "teacher", "sequence_length", "max_tokens", "batch_size", "speed", "noise"),
    *("passkey", "natural", "context_perplexity", "by_length", "dtype", "device", "output"),
)
"""Flags of the short help."""


@command
@with_options(Measures, MAIN)
def evaluate(model: Model, *, revision: Revision = None, options: Measures) -> None:
    """Measure a model: perplexity, context length, tasks.

    Perplexity of its arms on any text, retrieval and perplexity over the context length, and tasks of the lm-eval
    harness.
    """
    contexts, texts = options.contexts(), options.texts
    if not texts and not options.tasks and not contexts.lengths() and options.by_length is None:
        raise UserError(
            "Nothing to measure: give --data FILE, --tasks NAMES, or lengths by --passkey, --natural, "
            "--context_perplexity or --by_length."
        )
    if options.of_cells() and not texts:
        raise UserError("--noise and --cell_sweeps measure a perplexity: give --data FILE.")
    for name in ("batch_size", "max_tokens", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, but it must be at least 1.")
    evaluate_model(find_model(model, revision), replace(options, texts=texts or []), contexts)


def evaluate_model(found: Found, asked: Measures, contexts: Any) -> None:
    """Print the tables of all that is measured, and write them where `output` says.

    Args:
        contexts: a `ContextPlan`.
    """
    from linearize.evaluation import parse_noise, run_tasks
    from linearize.evaluation.arms import gain_cell_layers
    from linearize.evaluation.context_run import prepare_contexts, trained_length
    from linearize.modeling import is_encoder

    if is_encoder(read_config(found)):
        others = (asked.tasks, asked.of_cells(), contexts.lengths(), asked.speed, asked.by_length is not None)
        if any(others):
            raise UserError(f"{found.name} is an encoder, measured by its embeddings: give --data FILE alone.")
        evaluate_encoder(found, asked)
        return
    deviations = None if asked.noise is None else parse_noise(asked.noise)
    trained = None if asked.by_length is None else trained_length(asked.by_length, found.source, found.revision)
    if asked.output is None and (asked.of_cells() or contexts.lengths() or trained is not None):
        asked = replace(asked, output="evaluation")
    model, tokenizer, converted = load(found, asked.dtype, asked.device, contexts)
    for flag, wanted in (("--noise", deviations is not None), ("--cell_sweeps", asked.cell_sweeps)):
        if wanted:
            gain_cell_layers(model, flag)
    if asked.texts:
        check_context(model, "sequence_length", asked.sequence_length)
    batch, length = asked.batch_size, asked.sequence_length
    with stage("evaluation", f"lower --batch_size (now {batch}) or --sequence_length (now {length})"):
        where: dict[str, Any] = {"texts": asked.texts, "text_field": asked.text_field, "batch_size": batch}
        scored = asked.max_tokens or MAX_TOKENS
        parts = prepare_contexts(model, tokenizer, contexts, max_tokens=scored, output=asked.output, **where)
        compared = _compared(found, asked, model, converted and bool(asked.texts or trained is not None))
        if trained is not None:
            parts.append(_by_length(model, tokenizer, trained, asked, compared))
        if asked.texts:
            _perplexity(model, tokenizer, asked, compared, deviations)
        for part in parts:
            _show_and_save(part(), asked.output)
        if names := asked.task_names():
            how: dict[str, Any] = {"include_path": asked.include_path, "limit": asked.limit, "batch_size": batch}
            path = Path(asked.output) / "tasks.json" if asked.output else None
            run_tasks(model, tokenizer, names, output_path=path, arm="mixed" if converted else None, **how).show()


def _compared(found: Found, asked: Measures, model: Any, scored: bool) -> dict[str, Any]:
    """What a student is compared with: `original` and `merged` of `linearize.evaluation.evaluate`, and `controls`.

    Args:
        scored: Whether a perplexity of a student is asked for.
    """
    from linearize.config.record import base_is_teacher

    merged = scored and not base_is_teacher(record_of(found))
    original = _original(model, asked.teacher) if scored and asked.teacher else None
    return {"original": original, "merged": merged, "controls": asked.controls}


def _by_length(model: Any, tokenizer: Any, trained: int, asked: Measures, compared: dict[str, Any]) -> Any:
    """What measures the perplexity at and past the trained length."""
    from linearize.evaluation.context_run import prepare_by_length

    where: dict[str, Any] = {"texts": asked.texts, "text_field": asked.text_field, "limit": asked.max_tokens}
    return prepare_by_length(model, tokenizer, trained, batch_size=asked.batch_size, **where, **compared)


def _perplexity(model: Any, tokenizer: Any, asked: Measures, compared: dict[str, Any], deviations: Any) -> None:
    """Measure the arms on the texts, and gain cells under deviations and sweeps; print and write what is found."""
    from linearize.data.sequences import load_text_blocks
    from linearize.evaluation import evaluate, measure_noise, sweep_cells
    from linearize.evaluation.context_lengths import parse_trials

    batch, scored = asked.batch_size, asked.max_tokens or MAX_TOKENS
    texts = list(asked.texts or [])
    blocks = load_text_blocks(texts, tokenizer, asked.sequence_length, scored, text_field=asked.text_field)
    report = evaluate(model, blocks, batch_size=batch, speed=asked.speed, **compared)
    report.show()
    if asked.output:
        report.save(asked.output)
    if deviations is not None:
        draws = 16 if asked.trials is None else parse_trials(asked.trials).default
        _show_and_save(measure_noise(model, blocks, deviations, trials=draws, batch_size=batch), asked.output)
    if asked.cell_sweeps:
        _show_and_save(sweep_cells(model, blocks, batch_size=batch), asked.output)


def evaluate_encoder(found: Found, asked: Measures) -> None:
    """Print how an encoder's sentence embeddings compare with its teacher's, and write it where `output` says.

    A stock encoder is its own teacher; so are the weights of a converted one of which the mechanism alone has trained.
    """
    from linearize.config.record import base_is_teacher
    from linearize.conversion.students import load_encoder, load_model_tokenizer
    from linearize.data.rows import read_documents
    from linearize.evaluation.arms import has_branches, is_student
    from linearize.evaluation.embeddings import TEACHER, EmbeddingEvaluation

    place, source = choose_device(asked.device), found.source
    teacher = find_model(asked.teacher) if asked.teacher else None
    with stage("loading the model"):
        model: Any = load_encoder(source, revision=found.revision).to(place)
        tokenizer = load_model_tokenizer(source, revision=found.revision)
        original: Any = load_encoder(teacher.source, revision=teacher.revision).to(place) if teacher else None
    if is_student(model) and original is None and not base_is_teacher(record_of(found)):
        raise UserError(f"The weights of {source} are not its teacher's: name the teacher with --teacher.")
    length = min(asked.sequence_length, model.config.max_position_embeddings)
    with stage("evaluation", f"lower --batch_size (now {asked.batch_size})"):
        documents = read_documents(list(asked.texts or []), asked.text_field)
        evaluation = EmbeddingEvaluation(documents, tokenizer, batch_size=asked.batch_size, max_length=length)
        evaluation.measure(TEACHER, model if original is None else original, "teacher")
        if is_student(model):
            evaluation.measure("student", model)
            for arm in ("softmax", "linear") if asked.controls and has_branches(model) else ():
                evaluation.measure(f"student, {arm} arm", model, arm)
        elif original is not None:
            evaluation.measure(source, model, "teacher")
    evaluation.report.show()
    if asked.output:
        print(f"Saved {', '.join(map(str, evaluation.report.save(asked.output)))}")


def _show_and_save(report: Any, output: str | None) -> None:
    report.show()
    print(f"Saved {', '.join(map(str, report.save(output)))}")


def _original(model: Any, teacher: str) -> Any:
    """The untrained student of the same settings, which gives the teacher's and the control's rows."""
    from linearize.conversion.students import convert_like

    found = find_model(teacher)
    original: Any = convert_like(found.source, model.config, dtype=model.dtype, revision=found.revision)
    return original.to(model.device)
