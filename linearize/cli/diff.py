"""The commands `linearize diff make | recover`."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.cli.help import Command
from linearize.cli.loading import Output, Overwrite
from linearize.failures import command
from linearize.hub.repository import MAX_SHARD_SIZE

differ = typer.Typer(help="A model as its difference from the base it was made from.", no_args_is_help=True)

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="The base: a directory or a Hub id, weights in safetensors.")
]


@differ.command(cls=Command)
@command
def make(
    base: Base,
    converted: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The model made from it: a directory (of a model or a run) or a Hub id."),
    ],
    out: Output,
    revision: Annotated[str | None, typer.Option("--revision", help="Of the base on the Hub.")] = None,
    converted_revision: Annotated[
        str | None, typer.Option("--converted_revision", help="Of the converted model on the Hub.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max_shard_size", help="Largest file of the diff, bytes or like 5GB.")
    ] = MAX_SHARD_SIZE,
    overwrite: Overwrite = False,
) -> None:
    """Write what a model differs by from its base.

    Whoever has the base can recover the model.
    """
    from linearize.hub.diff.difference import make_diff

    summary = make_diff(
        base,
        converted,
        out,
        revision=revision,
        converted_revision=converted_revision,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    for note in summary.notes():
        print(note)
    print(f"Saved {out}: {summary.sentence()}")


@differ.command(cls=Command)
@command
def recover(
    base: Base,
    diff: Annotated[
        str, typer.Argument(metavar="DIFF", help="What `linearize diff make` wrote: a directory or a Hub id.")
    ],
    out: Output,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Of the base on the Hub; default the commit that the diff names.")
    ] = None,
    diff_revision: Annotated[str | None, typer.Option("--diff_revision", help="Of the diff on the Hub.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the model of a base and a difference, byte for byte.

    Every tensor is checked.
    """
    from linearize.hub.diff.difference import recover as recover_model

    summary = recover_model(base, diff, out, revision=revision, diff_revision=diff_revision, overwrite=overwrite)
    print(f"Saved {out}: {summary.sentence()}")
