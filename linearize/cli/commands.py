"""What `linearize evaluate`, `chat`, `export-vectors`, `info --hardware` and `import` do once their flags are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.config.record import is_converted
from linearize.errors import UserError
from linearize.failures import stage
from linearize.modeling import is_encoder

HARDWARE = ("gain-cell",)
DTYPES = ("auto", "bfloat16", "float16", "float32")
MAX_TOKENS = 65_536
"""Tokens that `linearize evaluate` scores where nobody says how many."""


def choose_device(name: str) -> Any:
    """`auto`, `cpu` or `cuda` as a torch device."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is {name!r}, but it must be one of auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but no GPU is visible: use auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(name: str) -> Any:
    """`auto`, or a dtype of torch."""
    import torch

    if name not in DTYPES:
        raise UserError(f"--dtype is {name!r}, but it must be one of {', '.join(DTYPES)}.")
    return name if name == "auto" else getattr(torch, name)


def load(source: str, dtype: str, device: str, contexts: Any = None) -> tuple[Any, Any, bool]:
    """A model with its tokenizer, on its device, and whether it is a converted one.

    Args:
        contexts: a `ContextPlan` whose scaling of the RoPE a stock model gets.
    """
    from transformers import AutoModelForCausalLM

    from linearize.conversion.students import load_model_tokenizer, load_student, refuse_encoder
    from linearize.evaluation.rope_scaling import check_scaled
    from linearize.load_errors import explained

    weights = choose_dtype(dtype)
    place = choose_device(device)
    source = _model_of(source)
    config = _config(source)
    refuse_encoder(source, config)
    converted = hasattr(config, "mixer_types")
    scaled = _scaled_config(source, config, contexts)
    tokenizer = load_model_tokenizer(source)
    with stage("loading the model", "choose a smaller --dtype"):
        if converted:
            model = load_student(source, dtype=weights)
        else:
            with explained(source):
                model = AutoModelForCausalLM.from_pretrained(source, dtype=weights, **scaled)
        if scaled:
            check_scaled(model, source)
        return model.to(place).eval(), tokenizer, converted


def _model_of(source: str) -> str:
    """The converted model of a run directory; any other source as it is."""
    if Path(source).is_dir() and not is_converted(source) and is_converted(Path(source) / "final"):
        return str(Path(source) / "final")
    return source


def _config(source: str) -> Any:
    from linearize.conversion.students import load_config

    return load_config(source)


def _scaled_config(source: str, config: Any, contexts: Any) -> dict[str, Any]:
    """`config=...` where the plan scales the RoPE; nothing where it does not, or where all lengths fit as it is."""
    from linearize.evaluation.rope_scaling import with_yarn

    scaling = contexts.rope_scaling if contexts is not None else None
    if scaling is None:
        return {}
    with_yarn(config, 1.0, source)  # refused before its factor is asked for
    factor = scaling.choose(config, contexts.lengths())
    if factor == 1 and scaling.factor is None:
        print("The longest length fits the trained context: --rope_scaling yarn=auto leaves RoPE as it is.")
        return {}
    return {"config": with_yarn(config, factor, source)}


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

    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, but it must be at least 1.")
    if is_encoder(_config(_model_of(source))):
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
        _check_context(model, "sequence_length", sequence_length)
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

    place, source = choose_device(device), _model_of(source)
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


def _check_context(model: Any, flag: str, tokens: int) -> None:
    """Refuse sequences that are longer than the model's context, where it has one."""
    from linearize.evaluation.arms import context_tokens

    context = context_tokens(model.config)
    if context is not None and tokens > context:
        raise UserError(f"--{flag} is {tokens}, but the model's context is {context} tokens.")


def export_test_vectors(
    source: str,
    output: str,
    *,
    layer: int,
    head: int,
    tokens: int,
    text: str | None,
    dtype: str,
    device: str,
    overwrite: bool,
) -> None:
    """Follow one head of gain cells on the first tokens of a text, and write the vectors."""
    from linearize.data.sequences import load_text_blocks
    from linearize.evaluation import export_vectors, save_vectors
    from linearize.evaluation.vectors import TEXT, check_vectors_path

    if tokens < 2:
        raise UserError(f"--tokens is {tokens}, but it must be at least 2.")
    check_vectors_path(output, overwrite)
    model, tokenizer, _ = load(source, dtype, device)
    _check_context(model, "tokens", tokens)
    if text is not None:
        input_ids = load_text_blocks(text, tokenizer, tokens, tokens)[0]["input_ids"]
    else:
        sample = TEXT * (1 + tokens // 32)  # even a tokenizer of whole words fills 32 tokens with it
        input_ids = tokenizer(sample, return_tensors="pt")["input_ids"][0, :tokens]
    save_vectors(output, export_vectors(model, input_ids, layer=layer, head=head), overwrite=overwrite)
    print(f"Saved {output}: head {head} of layer {layer} on {tokens} tokens")


def _original(model: Any, teacher: str) -> Any:
    """The untrained student of the same settings, which gives the teacher's and the control's rows."""
    from linearize.conversion.students import convert_like

    original: Any = convert_like(teacher, model.config, dtype=model.dtype)
    return original.to(model.device)


def chat_with_model(
    source: str, *, prompt: str | None, max_new_tokens: int, temperature: float, dtype: str, device: str
) -> None:
    """Answer one prompt, or hold a conversation until the input ends."""
    if max_new_tokens < 1 or temperature < 0:
        raise UserError("--max_new_tokens must be at least 1 and --temperature must not be negative.")
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty: give a text to answer, or leave it out for a conversation.")
    model, tokenizer, _ = load(source, dtype, device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    messages: list[dict[str, str]] = []
    if prompt is not None:
        _answer(model, tokenizer, messages, prompt, max_new_tokens, sampling)
        return
    print("An empty line or Ctrl-D ends the conversation.")
    while text := _read_line():
        _answer(model, tokenizer, messages, text, max_new_tokens, sampling)


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _answer(
    model: Any,
    tokenizer: Any,
    messages: list[dict[str, str]],
    text: str,
    max_new_tokens: int,
    sampling: dict[str, Any],
) -> None:
    """Stream one answer; the conversation so far goes along where there is a chat template."""
    from transformers import TextStreamer

    messages.append({"role": "user", "content": text})
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    inputs = inputs.to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": answer})


def estimate_model(source: str, hardware: str, *, window: int | None, cell: str | None) -> Any:
    """The hardware report of a model, stock or converted."""
    from linearize.conversion.gain_cells import load_cell
    from linearize.hardware import hardware_report
    from linearize.hardware.estimate import DEFAULT_WINDOW, gain_cell_layers

    if hardware not in HARDWARE:
        raise UserError(f"--hardware is {hardware!r}, but it must be one of {', '.join(HARDWARE)}.")
    chosen = None if cell is None else load_cell(cell)
    config = _config(_model_of(source))
    if is_encoder(config):
        raise UserError(f"{source} is an encoder, which gain cells cannot run: their ring holds earlier tokens alone.")
    if gain_cell_layers(config) and (window is not None or cell is not None):
        raise UserError(f"The gain-cell layers of {source} have their own window and cell: omit --window and --cell.")
    return hardware_report(source, config, DEFAULT_WINDOW if window is None else window, chosen)


def import_published_gain_cell(source: str, output: str, tokenizer_name: str | None) -> None:
    """Write the repository of a published gain-cell checkpoint, its target statistics along."""
    import linearize
    from linearize.config.record import make_record
    from linearize.conversion.importers.gain_cell import import_gain_cell
    from linearize.hub.repository import save_final
    from linearize.stages.adaptation import save_statistics

    tokenizer = linearize.load_tokenizer(tokenizer_name) if tokenizer_name else None
    model, statistics, read = import_gain_cell(source)
    with stage("saving the model"):
        save_final(model, tokenizer, output, make_record(source, recipe={"imported": read}))
        if statistics:
            save_statistics(statistics, output)
    levels = {name: read["cell"][name] for name in ("input_levels", "weight_levels", "output_levels", "leak")}
    print(f"Saved {output}: {read['cell_kind']} cell, window {read['window']}, {levels}")
    if tokenizer is None:
        print("No tokenizer is in it: published checkpoints use GPT-2's; give --tokenizer gpt2 to save it along.")


def import_published_landmark(
    source: str,
    output: str,
    *,
    mem_id: int | None,
    mem_freq: int | None,
    block_size: int | None,
    top_k: int | None,
    tokenizer: str | None,
    revision: str | None,
    dtype: str,
) -> None:
    """Write the repository of a published landmark checkpoint."""
    from linearize.config.record import make_record
    from linearize.conversion.importers.checkpoint_files import find_checkpoint
    from linearize.conversion.importers.landmark import import_landmark
    from linearize.conversion.sources import check_apart
    from linearize.hub.repository import save_final

    weights = choose_dtype(dtype)
    if Path(source).is_dir():
        check_apart(output, find_checkpoint(source))
    with stage("reading the checkpoint", "choose a smaller --dtype"):
        found = import_landmark(
            source,
            mem_id=mem_id,
            mem_freq=mem_freq,
            block_size=block_size,
            top_k=top_k,
            tokenizer=tokenizer,
            revision=revision,
            dtype=weights,
        )
    record = make_record(source, revision=found.source.origin.revision, recipe={"imported": found.settings})
    with stage("saving the model"):
        save_final(found.model, found.tokenizer, output, record)
    for note in found.notes:
        print(note)
    settings = found.settings
    where = "its landmark" if settings["include_landmark_in_loss"] else "its last token"
    print(
        f"Saved {output}: blocks of {settings['block_size']} tokens with their landmark, {settings['top_k']} read "
        f"at a time; behind a block, {where} predicts the next token; {found.model.config.vocab_size} ids, "
        f"{settings['mem_id']} was the landmark"
    )


def import_published_cosine(
    source: str, output: str, *, tokenizer: str | None, revision: str | None, dtype: str
) -> None:
    """Write the repository of a published cosine checkpoint."""
    from linearize.config.record import make_record
    from linearize.conversion.importers.checkpoint_files import find_checkpoint
    from linearize.conversion.importers.cosine import import_cosine
    from linearize.conversion.sources import check_apart
    from linearize.hub.repository import save_final

    weights = choose_dtype(dtype)
    if Path(source).is_dir():
        check_apart(output, find_checkpoint(source))
    with stage("reading the checkpoint", "choose a smaller --dtype"):
        found = import_cosine(source, tokenizer=tokenizer, revision=revision, dtype=weights)
    record = make_record(source, revision=found.source.origin.revision, recipe={"imported": found.settings})
    with stage("saving the model"):
        save_final(found.model, found.tokenizer, output, record)
    for note in found.notes:
        print(note)
    settings = found.settings
    (low, high), key = settings["exponents"], settings["scale_side"] == "key"
    print(
        f"Saved {output}: {settings['layers']} layers of cosine attention, exponents {low} to {high} of the "
        f"{'place of a key' if key else 'length of the text'}"
    )
