"""The commands that run a whole training from a YAML file and flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.flags import with_settings
from linearize.config.encoder import EncoderRunConfig
from linearize.config.pretraining import PretrainConfig
from linearize.config.settings import RunConfig, RunSettings
from linearize.config.values import field_types
from linearize.config.yaml_io import Settings, left_behind, read_values, resolve
from linearize.evaluation.glue.settings import GlueRunConfig
from linearize.failures import command, is_main_process
from linearize.runs.gain_cell import GainCellRunConfig
from linearize.runs.landmark import LandmarkRunConfig

Config = Annotated[
    str | None, typer.Option("--config", help="YAML file, or the name of a shipped preset, that the flags lay over.")
]
TRAINING = (
    "calibration_sequences",
    "seed",
    "dtype",
    "device",
    "load_in_4bit",
    "load_in_8bit",
    "overwrite",
    "resume_from_checkpoint",
    "report_to",
    "op_backend",
)
KINDS: dict[str, type[RunSettings]] = {
    "run": RunConfig,
    "pretrain": PretrainConfig,
    "gain-cell": GainCellRunConfig,
    "landmark": LandmarkRunConfig,
    "encoder": EncoderRunConfig,
    "glue": GlueRunConfig,
}
"""Settings of each of the commands."""
RUN_SETTINGS = (
    "model_name_or_path",
    "revision",
    "output_dir",
    *TRAINING,
    "attention",
    "softmax_layers",
    "state_budget",
    "select",
    "mixer_types",
    "mixers",
    "sliding_window",
    "data",
    "transfer",
    "finetune",
    "evaluation",
    "push_to_hub",
)


def resolved(config: str | None, overrides: dict[str, Any], settings: type[Settings]) -> Settings:
    """Settings of a config and flags; says which of the config's settings of data another dataset leaves behind."""
    left = [] if config is None else left_behind(read_values(config, settings), overrides, settings)
    if left and is_main_process():
        names = ", ".join(f"data.{name}" for name in left)
        print(f"{config} has {names} for its own dataset: left out, as --data.dataset names another.", flush=True)
    return resolve(config, overrides, settings=settings)


def run_settings(
    config: str | None, overrides: dict[str, Any], default_config: str | None, settings: type[Settings]
) -> Settings:
    """The settings of a run; one that resumes needs to name its directory alone."""
    resume, output = overrides.get("resume_from_checkpoint"), overrides.get("output_dir")
    if config is None and resume and output and (Path(output) / "config.yaml").is_file():
        config = str(Path(output) / "config.yaml")
        overrides = {"overwrite": False, **overrides}
    return resolved(config or default_config, overrides, settings)


def trained(settings: Any, train: Callable[[Any], Any]) -> None:
    """Train as the settings say, then print where all of it lies and what to do with it."""
    from linearize.runs.directory import RunDirectory

    train(settings)
    if is_main_process():
        print(RunDirectory(settings).ending(), flush=True)


@command
@with_settings(*RUN_SETTINGS)
def run(
    context: typer.Context,
    preset: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="YAML file or the name of a shipped preset; the same as --config."),
    ] = None,
    *,
    config: Config = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Check everything and print the plan, then end.")] = False,
    overrides: dict[str, Any],
) -> None:
    """Convert, transfer, finetune, evaluate and save, as a YAML file and flags say (flags win)."""
    import linearize
    from linearize.runs.pipeline import plan

    settings = run_settings(preset or config, overrides, context.obj, RunConfig)
    if dry_run:
        plan(settings).show()
    else:
        trained(settings, linearize.run)


@command
@with_settings(*field_types(PretrainConfig), settings=PretrainConfig)
def pretrain(context: typer.Context, *, config: Config = None, overrides: dict[str, Any]) -> None:
    """Train a GPT-2, Llama or BERT from scratch on text, softmax or any mechanism, as a YAML file and flags say."""
    import linearize

    trained(run_settings(config, overrides, context.obj, PretrainConfig), linearize.pretrain)


@command
@with_settings(*field_types(GainCellRunConfig), settings=GainCellRunConfig)
def gain_cell(context: typer.Context, *, config: Config = None, overrides: dict[str, Any]) -> None:
    """Train a model onto analog gain cells: linear cell, adaptation, nonlinear cell."""
    import linearize

    trained(run_settings(config, overrides, context.obj, GainCellRunConfig), linearize.run_gain_cell)


@command
@with_settings(*field_types(LandmarkRunConfig), settings=LandmarkRunConfig)
def landmark(context: typer.Context, *, config: Config = None, overrides: dict[str, Any]) -> None:
    """Train a model onto landmark attention, all weights, at a short context."""
    import linearize

    trained(run_settings(config, overrides, context.obj, LandmarkRunConfig), linearize.run_landmark)


@command
@with_settings(*field_types(EncoderRunConfig), settings=EncoderRunConfig)
def encoder(context: typer.Context, *, config: Config = None, overrides: dict[str, Any]) -> None:
    """Convert a BERT and train it: attention transfer, then its sentence embeddings or masked language modelling."""
    import linearize

    trained(run_settings(config, overrides, context.obj, EncoderRunConfig), linearize.run_encoder)


@command
@with_settings(*field_types(GlueRunConfig), settings=GlueRunConfig)
def glue(context: typer.Context, *, config: Config = None, overrides: dict[str, Any]) -> None:
    """Finetune encoders, stock or converted, on the tasks of GLUE, and print a table of them side by side."""
    import linearize

    linearize.run_glue(run_settings(config, overrides, context.obj, GlueRunConfig))


COMMANDS = {
    "run": run,
    "pretrain": pretrain,
    "gain-cell": gain_cell,
    "landmark": landmark,
    "encoder": encoder,
    "glue": glue,
}


def add_run_commands(app: typer.Typer) -> None:
    """Make them commands of `app`."""
    for name, function in COMMANDS.items():
        app.command(name)(function)
