"""The command line: `linearize convert | select | transfer | finetune | evaluate | chat | info | push | run |
pretrain | gain-cell | landmark | encoder | glue | import | diff | export-vectors | presets`.

Every setting of `linearize/config/settings.py` (of their own files for the commands of `runs.py`) is a flag of the
commands that use it (`--transfer.tokens 1M`), with `_` or `-` in its name. Bad input ends with one sentence and exit
code 2, Ctrl-C with 130 (`linearize/failures.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.chat import chat
from linearize.cli.diff import differ
from linearize.cli.evaluate import evaluate
from linearize.cli.flags import complete, normalise, underscored, with_settings
from linearize.cli.importing import importer
from linearize.cli.info import info
from linearize.cli.loading import Directory
from linearize.cli.presets import presets
from linearize.cli.runs import KINDS, TRAINING, Config, add_run_commands, resolved, trained
from linearize.cli.select import select
from linearize.cli.vectors import export_vectors
from linearize.config.presets import find_preset
from linearize.config.settings import RunConfig
from linearize.config.yaml_io import read_values, resolve
from linearize.errors import UserError
from linearize.failures import command, stage
from linearize.paths import expand_words

app = typer.Typer(
    help="Convert softmax transformers to linear attention, and train, measure and publish them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": underscored},
)
WITHOUT_MODELS = ("presets",)
"""Commands that need no models."""

app.add_typer(importer, name="import")
app.add_typer(differ, name="diff")

Output = Annotated[str, typer.Argument(help="Directory to write.")]
Data = Annotated[
    list[str] | None, typer.Option("--data", help="Text to train on: path(s) or a Hub id; short for --data.dataset.")
]


@app.command()
@command
@with_settings(
    "attention", "softmax_layers", "mixer_types", "mixers", "sliding_window", "revision", "dtype", "overwrite"
)
def convert(
    model: Annotated[str, typer.Argument(help="The teacher: a Hub id, a directory or a .gguf file.")],
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
    from linearize.runs.plan import check_attention, complete_attention, read_teacher

    named = {} if config is None else read_values(config)
    typed = {} if "dtype" in named else {"dtype": "float32"}
    settings = resolve(config, {**typed, **overrides, "model_name_or_path": model, "output_dir": output})
    _check_output(output, settings.overwrite)
    settings = complete_attention(settings)
    check_attention(settings, read_teacher(settings))
    tokenizer = linearize.load_tokenizer(model, revision=settings.revision)
    dtype = getattr(torch, settings.dtype) if "dtype" in overrides or config else "auto"
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


@app.command()
@command
@with_settings("data", "transfer", *TRAINING)
def transfer(
    directory: Directory, output: Output, *, data: Data = None, config: Config = None, overrides: dict[str, Any]
) -> None:
    """Stage 1, attention transfer: train the mechanism to give each layer's softmax output."""
    _train(directory, output, data, config, overrides, skipped="finetune")


@app.command()
@command
@with_settings("data", "finetune", *TRAINING)
def finetune(
    directory: Directory, output: Output, *, data: Data = None, config: Config = None, overrides: dict[str, Any]
) -> None:
    """Stage 2: LoRA (and the mechanism along) on the language-modelling loss; saves merged weights and the adapter."""
    _train(directory, output, data, config, overrides, skipped="transfer")


def _train(
    directory: str, output: str, data: list[str] | None, config: str | None, overrides: dict[str, Any], *, skipped: str
) -> None:
    """One stage on a converted model, as a run without the others."""
    import linearize
    from linearize.config.record import find_converted
    from linearize.conversion.students import load_config

    source = str(find_converted(directory))
    # One stage must not change the type of the weights that the stage before saved.
    stored = str(load_config(source).dtype).removeprefix("torch.")
    if config is None and stored in ("bfloat16", "float16", "float32"):
        overrides = {"dtype": stored, **overrides}
    fixed: dict[str, Any] = {
        "model_name_or_path": source,
        "output_dir": output,
        skipped: None,
        "evaluation": None,
    }
    if data:
        fixed["data.dataset"] = data[0] if len(data) == 1 else data
    trained(resolved(config, {**overrides, **fixed}, RunConfig), linearize.run)


app.command()(evaluate)
app.command("export-vectors")(export_vectors)
app.command()(chat)
app.command()(info)


@app.command()
@command
def push(
    directory: Directory,
    repo_id: Annotated[str, typer.Argument(help="NAME or OWNER/NAME on the Hub.")],
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


app.command()(select)
app.command()(presets)
add_run_commands(app)


def _check_output(output: str, overwrite: bool) -> None:
    path = Path(output)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not overwrite):
        raise UserError(f"{output} exists already: replace it with --overwrite, or name another directory.")


def _with_its_command(words: list[str]) -> list[str]:
    """The words with the command as it is declared; `run` of another command's preset becomes that command."""
    if not words or words[0].startswith("-"):
        return words
    name, *rest = words[0].replace("_", "-"), *words[1:]
    if name == "run" and rest:
        named = rest[0] if not rest[0].startswith("-") else _value_of("--config", rest)
        preset = find_preset(named) if named else None
        if preset is not None and preset.command != name and not Path(preset.name).is_file():
            rest = rest if rest[0].startswith("-") else ["--config", *rest]
            name = preset.command
    return [name, *rest]


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    """What is given for a flag, as its next word or behind `=`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == flag:
            return value if equals else following
    return None


def _prepare(words: Sequence[str]) -> None:
    """Give the command that is called its flags, and register the models unless all that it does is to speak."""
    for declared in app.registered_commands:
        if words and words[0] == (declared.name or getattr(declared.callback, "__name__", "")) and declared.callback:
            complete(declared.callback)
    if words and words[0][0] != "-" and words[0] not in WITHOUT_MODELS and not {"-h", "--help"} & set(words):
        import linearize.modeling  # noqa: F401


def main(argv: Sequence[str] | None = None, *, default_config: str | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments; default those of this process.
        default_config: What a command of `runs.py` takes when neither a config nor a run to
            resume is named.
    """
    words = _with_its_command(expand_words(list(sys.argv[1:] if argv is None else argv)))
    _prepare(words)
    arguments = normalise(words, KINDS.get(words[0] if words else "", RunConfig))
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
        name: The command: `run`, `pretrain`, `gain-cell`, `landmark`, `encoder` or `glue`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return main([name, *arguments], default_config=default_config)
