"""The command `linearize evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
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
from linearize.cli.loading import Device, Dtype, check_context, choose_device, load, model_of, read_config
from linearize.errors import UserError
from linearize.failures import command, stage

MAX_TOKENS = 65_536
"""Tokens that are scored where nobody says how many."""


@command
def evaluate(
    directory: Annotated[
        str, typer.Argument(help="Directory of a converted model or of a run, or any Hub id or model directory.")
    ],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="Text to take the perplexity on (.txt, .jsonl, .parquet); repeat for more."),
    ] = None,
    text_field: Annotated[str, typer.Option("--text_field", help="Column that holds the text.")] = "text",
    tasks: Annotated[str | None, typer.Option("--tasks", help="Tasks of lm-eval, separated by commas.")] = None,
    include_path: Annotated[str | None, typer.Option("--include_path", help="Folder with local task files.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Documents per task.")] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="The teacher, for the rows that merged weights cannot give.")
    ] = None,
    sequence_length: Annotated[
        int, typer.Option("--sequence_length", parser=tokens, help="Tokens of one scored sequence.")
    ] = 1024,
    max_tokens: Annotated[
        int | None, typer.Option("--max_tokens", parser=tokens, help="Tokens to score.", show_default="65536")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Sequences scored together.")] = 1,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls/--no_controls", help="Measure teacher, control and single arms too, where there are any."
        ),
    ] = True,
    speed: Annotated[bool, typer.Option("--speed", help="Time prefill and decoding too.")] = False,
    noise: Annotated[
        str | None,
        typer.Option(
            "--noise", help="Deviations of gain cells, e.g. read=0.01,mismatch=0.05 (also write, leak_spread)."
        ),
    ] = None,
    passkey: PasskeyLengths = None,
    natural: NaturalLengths = None,
    context_perplexity: PerplexityLengths = None,
    by_length: ByLength = None,
    trials: TrialNumbers = None,
    depths: Depths = 10,
    seed: ContextSeed = 0,
    rope_scaling: RopeScalingFlag = None,
    cell_sweeps: Annotated[
        bool, typer.Option("--cell_sweeps", help="Perplexity over the leak and the weight levels of gain cells.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            help="Folder for evaluation.json, evaluation.md, tasks.json and plots. Default none, but `evaluation` "
            "with --noise, --cell_sweeps, --passkey, --natural, --context_perplexity or --by_length, which draw "
            "a plot.",
        ),
    ] = None,
) -> None:
    """Measure a model: perplexity, context length, tasks.

    Perplexity of its arms on any text, retrieval and perplexity over the context length, and tasks of the lm-eval
    harness.
    """
    from linearize.evaluation import plan_contexts

    how: dict[str, Any] = {"depths": depths, "seed": seed, "rope_scaling": rope_scaling}
    contexts = plan_contexts(passkey, natural, context_perplexity, trials=trials, **how)
    if not text and not tasks and not contexts.lengths() and by_length is None:
        raise UserError(
            "Nothing to measure: give --text FILE, --tasks NAMES, or lengths by --passkey, --natural, "
            "--context_perplexity or --by_length."
        )
    if (noise is not None or cell_sweeps) and not text:
        raise UserError("--noise and --cell_sweeps measure a perplexity: give --text FILE.")
    evaluate_model(
        directory,
        texts=text or [],
        text_field=text_field,
        tasks=[name.strip() for name in tasks.split(",") if name.strip()] if tasks else [],
        include_path=include_path,
        limit=limit,
        teacher=teacher,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        batch_size=batch_size,
        controls=controls,
        speed=speed,
        noise=noise,
        trials=trials,
        cell_sweeps=cell_sweeps,
        contexts=contexts,
        by_length=by_length,
        dtype=dtype,
        device=device,
        output=output,
    )


def evaluate_model(
    source: str,
    *,
    texts: Sequence[str],
    text_field: str,
    tasks: Sequence[str],
    include_path: str | None,
    limit: int | None,
    teacher: str | None,
    sequence_length: int,
    max_tokens: int | None,
    batch_size: int,
    controls: bool,
    speed: bool,
    noise: str | None,
    trials: str | None,
    cell_sweeps: bool,
    contexts: Any,
    by_length: str | None,
    dtype: str,
    device: str,
    output: str | None,
) -> None:
    """Print the tables of all that is measured, and write them where `output` says.

    Args:
        contexts: a `ContextPlan`.
        by_length: the trained length, as a person writes it, or auto.
    """
    from linearize.config.record import base_is_teacher, read_record
    from linearize.data.sequences import load_text_blocks
    from linearize.evaluation import evaluate, measure_noise, parse_noise, run_tasks, sweep_cells
    from linearize.evaluation.arms import gain_cell_layers
    from linearize.evaluation.context_lengths import parse_trials
    from linearize.evaluation.context_run import prepare_by_length, prepare_contexts, trained_length
    from linearize.modeling import is_encoder

    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, but it must be at least 1.")
    if is_encoder(read_config(model_of(source))):
        if tasks or noise is not None or cell_sweeps or contexts.lengths() or speed or by_length is not None:
            raise UserError(f"{source} is an encoder, which is measured by its embeddings: give --text FILE alone.")
        plain: dict[str, Any] = {"batch_size": batch_size, "controls": controls, "max_length": sequence_length}
        evaluate_encoder(source, texts, text_field, teacher, device=device, output=output, **plain)
        return
    deviations = None if noise is None else parse_noise(noise)
    draws = 16 if trials is None else parse_trials(trials).default
    trained = None if by_length is None else trained_length(by_length, source)
    if output is None and (noise is not None or cell_sweeps or contexts.lengths() or trained is not None):
        output = "evaluation"
    limit, max_tokens = max_tokens, max_tokens or MAX_TOKENS
    model, tokenizer, converted = load(source, dtype, device, contexts)
    if deviations is not None:
        gain_cell_layers(model, "--noise")
    if cell_sweeps:
        gain_cell_layers(model, "--cell_sweeps")
    if texts:
        check_context(model, "sequence_length", sequence_length)
    with stage("evaluation", f"lower --batch_size (now {batch_size}) or --sequence_length (now {sequence_length})"):
        measured: dict[str, Any] = {"max_tokens": max_tokens, "batch_size": batch_size, "output": output}
        parts = prepare_contexts(model, tokenizer, contexts, texts=texts, text_field=text_field, **measured)
        scored = bool(texts) or trained is not None
        merged = scored and converted and not base_is_teacher(read_record(source))
        original = _original(model, teacher) if scored and converted and teacher else None
        if trained is not None:
            how: dict[str, Any] = {"texts": texts, "text_field": text_field, "limit": limit, "batch_size": batch_size}
            how |= {"original": original, "merged": merged, "controls": controls}
            parts.append(prepare_by_length(model, tokenizer, trained, **how))
        if texts:
            blocks = load_text_blocks(list(texts), tokenizer, sequence_length, max_tokens, text_field=text_field)
            report = evaluate(
                model, blocks, original=original, merged=merged, controls=controls, batch_size=batch_size, speed=speed
            )
            report.show()
            if output:
                report.save(output)
            extra: list[Any] = []
            if deviations is not None:
                extra.append(measure_noise(model, blocks, deviations, trials=draws, batch_size=batch_size))
            if cell_sweeps:
                extra.append(sweep_cells(model, blocks, batch_size=batch_size))
            for found in extra:
                _show_and_save(found, output)
        for part in parts:
            _show_and_save(part(), output)
        if tasks:
            path_of_scores = Path(output) / "tasks.json" if output else None
            arm = "mixed" if converted else None
            run_tasks(
                model,
                tokenizer,
                tasks,
                include_path=include_path,
                limit=limit,
                batch_size=batch_size,
                output_path=path_of_scores,
                arm=arm,
            ).show()


def evaluate_encoder(
    source: str,
    texts: Sequence[str],
    text_field: str,
    teacher: str | None,
    *,
    batch_size: int,
    controls: bool,
    max_length: int,
    device: str,
    output: str | None,
) -> None:
    """Print how an encoder's sentence embeddings compare with its teacher's, and write it where `output` says.

    A stock encoder is its own teacher; so are the weights of a converted one of which the mechanism alone has trained.
    """
    from linearize.config.record import base_is_teacher, read_record
    from linearize.conversion.students import load_encoder, load_model_tokenizer
    from linearize.data.rows import read_documents
    from linearize.evaluation.arms import has_branches, is_student
    from linearize.evaluation.embeddings import TEACHER, EmbeddingEvaluation

    place, source = choose_device(device), model_of(source)
    with stage("loading the model"):
        model: Any = load_encoder(source).to(place)
        tokenizer = load_model_tokenizer(source)
        original: Any = load_encoder(teacher).to(place) if teacher else None
    if is_student(model) and original is None and not base_is_teacher(read_record(source)):
        raise UserError(f"The weights of {source} are not its teacher's: name the teacher with --teacher.")
    length = min(max_length, model.config.max_position_embeddings)
    with stage("evaluation", f"lower --batch_size (now {batch_size})"):
        documents = read_documents(list(texts), text_field)
        evaluation = EmbeddingEvaluation(documents, tokenizer, batch_size=batch_size, max_length=length)
        evaluation.measure(TEACHER, model if original is None else original, "teacher")
        if is_student(model):
            evaluation.measure("student", model)
            for arm in ("softmax", "linear") if controls and has_branches(model) else ():
                evaluation.measure(f"student, {arm} arm", model, arm)
        elif original is not None:
            evaluation.measure(source, model, "teacher")
    evaluation.report.show()
    if output:
        print(f"Saved {', '.join(map(str, evaluation.report.save(output)))}")


def _show_and_save(report: Any, output: str | None) -> None:
    report.show()
    print(f"Saved {', '.join(map(str, report.save(output)))}")


def _original(model: Any, teacher: str) -> Any:
    """The untrained student of the same settings, which gives the teacher's and the control's rows."""
    from linearize.conversion.students import convert_like

    original: Any = convert_like(teacher, model.config, dtype=model.dtype)
    return original.to(model.device)
