"""The commands that run stages: `run`, its short forms, and the GLUE benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.flags import with_settings
from linearize.cli.loading import Found, Model, Output, find_model
from linearize.config.presets import find_preset
from linearize.config.values import field_types
from linearize.config.yaml_io import left_behind, resolve
from linearize.errors import UserError
from linearize.evaluation.glue.settings import GlueRunConfig
from linearize.failures import command, is_main_process
from linearize.runs.settings import RunConfig, resolve_run, run_values

Config = Annotated[str | None, typer.Option("--config", help="YAML file or preset, in place of the first argument.")]
Data = Annotated[
    list[str] | None, typer.Option("--data", help="Text to run on: a file, repeated for more, or a Hub id.")
]
DryRun = Annotated[bool, typer.Option("--dry_run", help="Check everything and print the plan, then end.")]
TRAINING = (
    "seed",
    "dtype",
    "device",
    "load_in_4bit",
    "load_in_8bit",
    "overwrite",
    "resume_from_checkpoint",
    "report_to",
    "op_backend",
    "revision",
    "push_to_hub",
)
SHORT = {
    "transfer": {"calibrate": {"kind": "calibrate"}, "transfer": {"kind": "transfer"}},
    "finetune": {"calibrate": {"kind": "calibrate"}, "finetune": {"kind": "train", "weights": "lora"}},
}
"""Command -> the stages of the run that it is short for; a model that was fitted or trained is not calibrated."""


def config_of(words: Sequence[str], default: str | None) -> str | None:
    """The config that the words after `run` name: a preset or file, or the run that is to go on."""
    named = words[0] if words and not words[0].startswith("-") else value_of("--config", words)
    if named is not None:
        return named
    resumes = any(word.partition("=")[0] in ("--resume_from_checkpoint", "--resume-from-checkpoint") for word in words)
    output = value_of("--output_dir", words) or value_of("--output-dir", words)
    stored = Path(output, "config.yaml") if output else None
    return str(stored) if resumes and stored is not None and stored.is_file() else default


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """What is given for a flag, as its next word or behind `=`."""
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name == flag:
            return value if equals else following
    return None


def values_asked_for(words: Sequence[str], default: str | None) -> dict[str, Any]:
    """The settings that the config of a command has, unchecked; those of no config where it cannot be read, which the
    command itself says.

    Args:
        words: With the command.
        default: What a recipe takes where no config is named.
    """
    name = words[0] if words else ""
    if name in SHORT:
        return {"stages": SHORT[name]}
    if name == "run":
        try:
            return run_values(config_of(words[1:], default))
        except (UserError, OSError):
            pass
    return run_values(None)


def said(config: str | None, values: Mapping[str, Any], overrides: Mapping[str, Any], settings: type) -> None:
    """Say which of the config's settings of data another dataset leaves behind."""
    left = left_behind(values, overrides, settings)
    if left and is_main_process():
        names = ", ".join(f"data.{name}" for name in left)
        print(f"{config} has {names} for its own dataset: left out, as --data.dataset names another.", flush=True)


def with_data(overrides: dict[str, Any], data: list[str] | None) -> dict[str, Any]:
    """The overrides with what `--data` gives."""
    if not data:
        return overrides
    if "data.dataset" in overrides:
        raise UserError("--data and --data.dataset both name the text: give one of them.")
    return {**overrides, "data.dataset": data[0] if len(data) == 1 else data}


def trained(settings: Any, train: Callable[[Any], Any]) -> None:
    """Train as the settings say, then print where all of it lies and what to do with it."""
    from linearize.runs.directory import StagesDirectory

    train(settings)
    if is_main_process():
        print(StagesDirectory(settings).ending(), flush=True)


def run_or_plan(settings: RunConfig, dry_run: bool) -> None:
    """Run, or print what would be done."""
    from linearize.runs import engine

    if dry_run:
        engine.rehearse(settings).show()
    else:
        trained(settings, engine.run)


@command
@with_settings(*(name for name in field_types(RunConfig) if name != "stages"), stages=True)
def run(
    context: typer.Context,
    preset: Annotated[
        str | None,
        typer.Argument(metavar="PRESET", help="A shipped preset (`linearize presets`), or a YAML file."),
    ] = None,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="What to start from; short for --model_name_or_path.")
    ] = None,
    *,
    config: Config = None,
    data: Data = None,
    dry_run: DryRun = False,
    overrides: dict[str, Any],
) -> None:
    """Convert, train, measure and save, stage by stage.

    \b
    linearize run smollm2_135m --data text.jsonl --output_dir out
    linearize run my.yaml --finetune.learning_rate 3e-4 --dry_run
    linearize run --output_dir out --resume_from_checkpoint
    """
    if preset is not None and config is not None:
        raise UserError(f"{preset} and --config {config} are both named: give one of them.")
    named = preset or config
    stored = _stored(overrides) if named is None else None
    if stored is not None:
        overrides = {"overwrite": False, **overrides}
    chosen = named or stored or context.obj
    if model is not None:
        overrides = {**overrides, **start_of(find_model(model, overrides.get("revision")))}
    overrides = with_data(overrides, data)
    said(chosen, run_values(chosen), overrides, RunConfig)
    run_or_plan(resolve_run(chosen, overrides), dry_run)


def _stored(overrides: Mapping[str, Any]) -> str | None:
    """The settings of the run that is to go on, where its directory alone is named."""
    resume, output = overrides.get("resume_from_checkpoint"), overrides.get("output_dir")
    path = Path(output, "config.yaml") if resume and output else None
    return str(path) if path is not None and path.is_file() else None


@command
@with_settings("data", *TRAINING, stages=True)
def transfer(
    model: Model,
    output: Output,
    *,
    data: Data = None,
    config: Config = None,
    dry_run: DryRun = False,
    overrides: dict[str, Any],
) -> None:
    """Train the mechanism alone to give each layer's output."""
    _one_stage("transfer", model, output, config, with_data(overrides, data), dry_run)


@command
@with_settings("data", *TRAINING, stages=True)
def finetune(
    model: Model,
    output: Output,
    *,
    data: Data = None,
    config: Config = None,
    dry_run: DryRun = False,
    overrides: dict[str, Any],
) -> None:
    """Train a LoRA, and the mechanism along."""
    _one_stage("finetune", model, output, config, with_data(overrides, data), dry_run)


def start_of(found: Found) -> dict[str, Any]:
    """Settings of a run that say what it starts from."""
    return {"model_name_or_path": found.source, "revision": found.revision}


def _one_stage(
    name: str, model: str, output: str, config: str | None, overrides: dict[str, Any], dry_run: bool
) -> None:
    """One stage on a converted model, as a run of it alone."""
    from linearize.cli.loading import read_config

    found = find_model(model, overrides.get("revision"))
    start = read_config(found)
    if not hasattr(start, "mixer_types"):
        raise UserError(f"{found.source} holds no converted model: make one with `linearize convert MODEL OUT`.")
    values = run_values(config)
    kind = SHORT[name][name]
    given = [stage for stage in values["stages"].values() if isinstance(stage, Mapping)]
    fitting = [stage for stage in given if kind.items() <= stage.items()]
    if config is not None and not fitting:
        raise UserError(f"{config} has no stage that `linearize {name}` runs: leave --config out.")
    # One stage must not change the type of the weights that the stage before saved.
    stored = str(start.dtype).removeprefix("torch.")
    if config is None and stored in ("bfloat16", "float16", "float32"):
        overrides = {"dtype": stored, **overrides}
    first = {"calibrate": given[0]} if given and given[0].get("kind") == "calibrate" else {}
    values = {**values, "stages": {**first, name: dict(fitting[0] if config is not None else kind)}}
    fixed = {**start_of(found), "output_dir": output, "evaluation": None, "yardstick": None}
    for conversion in ("attention", "softmax_layers", "state_budget", "mixer_types", "mixers", "architecture"):
        values.pop(conversion, None)
    run_or_plan(resolve_run(values, {**overrides, **fixed}), dry_run)


@command
@with_settings(*field_types(GlueRunConfig), settings=GlueRunConfig)
def glue(context: typer.Context, *, config: Config = None, overrides: dict[str, Any]) -> None:
    """Finetune encoders on the tasks of GLUE, side by side."""
    import linearize

    preset = None if config is None else find_preset(config)
    if preset is not None and preset.command != "glue":
        raise UserError(f"{config} is no preset of the GLUE benchmark: linearize {preset.command} {config}.")
    stored = _stored(overrides) if config is None else None
    if stored is not None:
        overrides = {"overwrite": False, **overrides}
    linearize.run_glue(resolve(config or stored or context.obj, overrides, settings=GlueRunConfig))
