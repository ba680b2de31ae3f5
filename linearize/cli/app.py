"""The command line: `linearize run | convert | select | transfer | finetune | evaluate | chat | info | push | glue |
import | diff | export-vectors | presets`.

Every setting of a run (`linearize/runs/settings.py`) is a flag of the commands that use it, those of a stage by its
name (`--transfer.tokens 1M`), with `_` or `-` in its name. Bad input ends with one sentence and exit
code 2, Ctrl-C with 130 (`linearize/failures.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.chat import chat
from linearize.cli.diff import differ
from linearize.cli.evaluate import evaluate
from linearize.cli.flags import complete, normalise, underscored, with_settings
from linearize.cli.help import ALL, Command
from linearize.cli.importing import importer
from linearize.cli.info import info
from linearize.cli.loading import Model, Output, Revision, converted_in, find_model
from linearize.cli.presets import presets
from linearize.cli.runs import Config, finetune, glue, run, transfer, values_asked_for
from linearize.cli.select import select
from linearize.cli.vectors import export_vectors
from linearize.config.yaml_io import flat_names
from linearize.errors import UserError
from linearize.evaluation.glue.settings import GlueRunConfig
from linearize.failures import EXIT_USER_ERROR, command, say, stage
from linearize.paths import expand_words
from linearize.runs import settings as run_settings

app = typer.Typer(
    help="Convert softmax transformers to linear attention, and train, measure and publish them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": underscored},
)
ENDED = ("pretrain", "gain-cell", "landmark", "encoder")
"""Commands of one kind of run, before there was one for all."""
WITHOUT_MODELS = ("presets",)
"""Commands that need no models."""


@command
@with_settings(
    "attention", "softmax_layers", "mixer_types", "mixers", "sliding_window", "revision", "dtype", "overwrite"
)
def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The teacher: a Hub id (ID@REVISION), a directory or a .gguf file.")
    ],
    output: Output,
    *,
    config: Config = None,
    overrides: dict[str, Any],
) -> None:
    """Give a model another attention; nothing is trained."""
    import torch

    import linearize
    from linearize.config.record import loaded_commit, make_record
    from linearize.config.yaml_io import to_values
    from linearize.hub.repository import save_final
    from linearize.hub.sentence_files import sentence_transformer_files
    from linearize.runs.attention import check_attention, complete, read_model
    from linearize.runs.settings import resolve_run, run_values

    named = {**run_values(config), "stages": {}, "yardstick": None}
    found = find_model(model, overrides.get("revision"))
    model, fixed = found.source, {"revision": found.revision, "output_dir": output}
    settings = resolve_run(named, {**overrides, **fixed, "model_name_or_path": model})
    _check_output(output, settings.overwrite)
    if settings.attention is None and settings.mixers is None:
        raise UserError("attention is softmax, which the model has already: choose another type.")
    settings = complete(settings)
    check_attention(settings, read_model(settings))
    tokenizer = linearize.load_tokenizer(model, revision=settings.revision)
    dtype = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
    where: dict[str, Any] = {"sliding_window": settings.sliding_window, "revision": settings.revision, "dtype": dtype}
    student: Any = linearize.convert(model, **settings.layers(), **where)
    recipe = {name: to_values(settings)[name] for name in (*settings.layers(), "sliding_window")}
    revision = loaded_commit(model, settings.revision)
    files = None if student.can_generate() else sentence_transformer_files(model, revision=settings.revision)
    with stage("saving the model"):
        save_final(student, tokenizer, output, make_record(model, revision=revision, recipe=recipe), files)
    print(
        f"Saved {output}: {len(student.mixer_attentions())} of {student.config.num_hidden_layers} layers converted, "
        "untrained"
    )


@command
def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="NAME or OWNER/NAME on the Hub.")],
    revision: Revision = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a repository that is made.")
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="Access token; else that of `hf auth login` or HF_TOKEN.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Commit message.")] = None,
) -> None:
    """Upload a converted model to the Hub."""
    from linearize.hub.repository import push as upload

    directory = converted_in(find_model(model, revision), weights=True)
    print(f"Pushed to {upload(directory, repo_id, private=private, token=token, message=message)}")


def _print_version(wanted: bool) -> None:
    if wanted:
        import linearize

        print(f"linearize {linearize.__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Before every command."""


for _name, _function in {
    "run": run,
    "presets": presets,
    "convert": convert,
    "select": select,
    "transfer": transfer,
    "finetune": finetune,
    "evaluate": evaluate,
    "chat": chat,
    "info": info,
    "push": push,
    "glue": glue,
    "export-vectors": export_vectors,
}.items():
    app.command(_name, cls=Command)(_function)
app.add_typer(importer, name="import")
app.add_typer(differ, name="diff")


def _check_output(output: str, overwrite: bool) -> None:
    path = Path(output)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not overwrite):
        raise UserError(f"{output} exists already: replace it with --overwrite, or name another directory.")


def _prepare(words: Sequence[str], values: dict[str, Any]) -> None:
    """Give the command that is called its flags, and register the models unless all that it does is to speak.

    Args:
        words: With the command.
        values: Settings of the config that they name.
    """
    speaks = bool({"-h", "--help"} & set(words))
    for declared in app.registered_commands:
        if words and words[0] == (declared.name or getattr(declared.callback, "__name__", "")) and declared.callback:
            complete(declared.callback, run_settings.stage_types(values), values["stages"], short=speaks)
    if words and words[0][0] != "-" and words[0] not in WITHOUT_MODELS and not speaks:
        import linearize.modeling  # noqa: F401


def completed_words() -> list[str]:
    """The words that a shell asks to complete, without the program's name."""
    return os.environ.get("COMP_WORDS", os.environ.get("_TYPER_COMPLETE_ARGS", "")).split()[1:]


def main(argv: Sequence[str] | None = None, *, default_config: str | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments; default those of this process.
        default_config: What a command of `runs.py` takes when neither a config nor a run to resume is named.
    """
    words = expand_words(list(sys.argv[1:] if argv is None else argv))
    words = [ALL if word == underscored(ALL) else word for word in words]
    if words and not words[0].startswith("-"):
        words[0] = words[0].replace("_", "-")
    if words and words[0] in ENDED:
        say(
            f"The command {words[0]} ended: every run is `linearize run PRESET [MODEL] --data FILE` "
            "(`linearize presets` lists them)."
        )
        return EXIT_USER_ERROR
    asked = words or completed_words()
    values = values_asked_for(asked, default_config)
    _prepare(asked, values)
    words = ["--help" if word == ALL else word for word in words]
    glue = words[:1] == ["glue"]
    arguments = normalise(words, flat_names(GlueRunConfig) if glue else run_settings.flat_names(values))
    try:
        app(arguments, prog_name="linearize", obj=default_config)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def run_recipe(default_config: str, argv: Sequence[str] | None = None, *, name: str = "run") -> int:
    """A command for a recipe: the same flags, over a config of its own when none is named.

    Args:
        default_config: Preset for a run that names neither a config nor a run to resume.
        argv: Flags; default those of this process.
        name: The command: `run` or `glue`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return main([name, *arguments], default_config=default_config)
