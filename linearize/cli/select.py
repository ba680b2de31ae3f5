"""`linearize select`: measure a teacher's layers and place windows and softmax layers; nothing is converted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.flags import with_settings
from linearize.cli.loading import Found, choose_device, find_model, read_config, record_of
from linearize.cli.runs import Config, Data, said, with_data
from linearize.errors import UserError
from linearize.failures import command, stage

FLAGS = (
    *("state_budget", "softmax_layers", "attention", "select", "data", "sliding_window", "revision"),
    *("dtype", "device", "load_in_4bit", "load_in_8bit", "op_backend", "output_dir", "overwrite"),
)


@command
@with_settings(*FLAGS)
def select(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The teacher: a Hub id (ID@REVISION), a directory or a .gguf file; or an untrained conversion of it.",
        ),
    ],
    *,
    data: Data = None,
    config: Config = None,
    overrides: dict[str, Any],
) -> None:
    """Place windows and softmax layers under a budget of state.

    \b
    linearize select MODEL --state_budget 7MB --data text.jsonl --output_dir out
    linearize select MODEL --softmax_layers 4 --data text.jsonl --output_dir out
    """
    from linearize.conversion.students import load_model_tokenizer
    from linearize.data.sequences import prepare_data
    from linearize.runs.attention import check_attention, complete, read_model
    from linearize.runs.settings import RunConfig, resolve_run, run_values
    from linearize.stages.select import select as choose
    from linearize.stages.select_plan import plan_selection, selects

    named, overrides = {**run_values(config), "stages": {}, "yardstick": None}, with_data(overrides, data)
    if "data.dataset" not in overrides and not (named.get("data") or {}).get("dataset"):
        raise UserError("There is no text to measure on: give --data FILE, or a config that names data.dataset.")
    attention = named.get("attention") or any(name.startswith("attention") for name in overrides)
    teacher, revision, own = _teacher_of(find_model(model, overrides.get("revision")))
    if own is not None and not attention:
        overrides["attention"] = own
    fixed = {"model_name_or_path": teacher, "revision": revision, "evaluation": None}
    said(config, named, overrides, RunConfig)
    settings = complete(resolve_run(named, {**overrides, **fixed}))
    settings = dataclasses.replace(settings, dtype=settings.weights_dtype)
    if not selects(settings):
        raise UserError("There is nothing to select: give --state_budget, or a number or share of --softmax_layers.")
    stock = read_model(settings)
    _refuse_encoder(teacher, stock)
    check_attention(settings, stock)
    plan = plan_selection(settings, stock)
    tokenizer = load_model_tokenizer(teacher, revision=revision)
    with stage("preparing the data"):
        rows, _ = prepare_data(settings.data, tokenizer, seed=settings.seed)
    with stage("the selection", "lower --select.sequence_length or --select.batch_size, or set --load_in_4bit"):
        earlier = None if settings.overwrite else settings.output_dir
        chosen = choose(plan, rows, lambda attention: _load(settings, attention), earlier)
    chosen.show()
    print(f"Saved {', '.join(map(str, chosen.save(settings.output_dir)))}")
    print(
        f"Next: linearize run {Path(settings.output_dir) / 'selection.yaml'} --data TEXT --output_dir OUT "
        "--transfer.tokens 1M --finetune.tokens 10M"
    )


def _teacher_of(found: Found) -> tuple[str, str | None, dict[str, Any] | None]:
    """The teacher, its revision and None; of an untrained conversion those that it was made from, and its attention.

    Raises:
        UserError: the conversion has trained, or nothing says what it was made from.
    """
    config = read_config(found)
    if not hasattr(config, "mixer_types"):
        return found.source, found.revision, None
    record = record_of(found)
    if any((record.get("tokens") or {}).values()) or not record.get("teacher_on_hub"):
        raise UserError(
            f"{found.name} is converted already, and its layers are measured on its teacher: give the teacher to "
            "linearize select."
        )
    first = next(iter(config.mixers.values()), None)
    return record["teacher"], record.get("teacher_revision"), first and dict(first)


def _refuse_encoder(source: str, config: Any) -> None:
    from linearize.modeling import is_encoder

    if is_encoder(config):
        raise UserError(
            f"{source} is an encoder, which keeps no state and predicts no next token: list its softmax_layers."
        )


def _load(settings: Any, attention: dict[str, Any]) -> Any:
    """The untrained student with one attention in every layer, on its device."""
    import torch

    from linearize.conversion.quantization import quantization_config
    from linearize.conversion.students import convert

    device, dtype = choose_device(settings.device), getattr(torch, settings.dtype)
    bits = quantization_config(
        load_in_4bit=settings.load_in_4bit, load_in_8bit=settings.load_in_8bit, compute_dtype=dtype
    )
    placed: dict[str, Any] = {} if bits is None else {"quantization_config": bits, "device_map": {"": device}}
    where = {name: getattr(settings, name) for name in ("sliding_window", "revision")}
    model: Any = convert(settings.model_name_or_path, attention, **where, dtype=dtype, **placed)
    model.set_op_backend(settings.op_backend)
    return model.to(device) if bits is None else model
