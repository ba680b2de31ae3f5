"""The commands `linearize import gain-cell | landmark | cosine`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.help import Command
from linearize.cli.loading import Dtype, Output, Overwrite, Revision, choose_dtype
from linearize.failures import command, stage

importer = typer.Typer(help="Convert checkpoints of published research code.", no_args_is_help=True)


@importer.command("gain-cell", cls=Command)
@command
def import_gain_cell(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="The checkpoint (.pt) of the published gain-cell code.")
    ],
    output: Output,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Directory or Hub id of the tokenizer to save along.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """A checkpoint of the published gain-cell code (GPT-2)."""
    from linearize.conversion.sources import check_output

    check_output(output, overwrite)
    import_published_gain_cell(source, output, tokenizer)


@importer.command("landmark", cls=Command)
@command
def import_landmark(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="The checkpoint (Llama): a directory or a Hub id."),
    ],
    output: Output,
    mem_id: Annotated[
        int | None,
        typer.Option("--mem_id", help="Id of the landmark, where config.json does not say it.  [default: 32001]"),
    ] = None,
    mem_freq: Annotated[
        int | None,
        typer.Option("--mem_freq", help="Tokens between landmarks, where config.json does not say it.  [default: 50]"),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option("--block_size", help="Tokens of a block, its landmark included: mem_freq + 1.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top_k", help="Blocks that a query reads; default what the trained context has room for."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Directory or Hub id of the tokenizer, where SRC has none to be read."),
    ] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """A checkpoint of the published landmark code (Llama)."""
    from linearize.conversion.sources import check_output

    check_output(output, overwrite)
    import_published_landmark(
        source,
        output,
        mem_id=mem_id,
        mem_freq=mem_freq,
        block_size=block_size,
        top_k=top_k,
        tokenizer=tokenizer,
        revision=revision,
        dtype=dtype,
    )


@importer.command("cosine", cls=Command)
@command
def import_cosine(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="The checkpoint (BERT, GPT-J): a directory or a Hub id."),
    ],
    output: Output,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Directory or Hub id of the tokenizer, where SRC has none.")
    ] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """A checkpoint of the published cosine code (BERT, GPT-J)."""
    from linearize.conversion.sources import check_output

    check_output(output, overwrite)
    import_published_cosine(source, output, tokenizer=tokenizer, revision=revision, dtype=dtype)


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
    from linearize.conversion.importers.landmark import import_landmark

    numbers = {"mem_id": mem_id, "mem_freq": mem_freq, "block_size": block_size, "top_k": top_k}
    settings, vocabulary = _save_published(
        import_landmark, source, output, tokenizer=tokenizer, revision=revision, dtype=dtype, **numbers
    )
    where = "its landmark" if settings["include_landmark_in_loss"] else "its last token"
    print(
        f"Saved {output}: blocks of {settings['block_size']} tokens with their landmark, {settings['top_k']} read "
        f"at a time; behind a block, {where} predicts the next token; {vocabulary} ids, "
        f"{settings['mem_id']} was the landmark"
    )


def import_published_cosine(
    source: str, output: str, *, tokenizer: str | None, revision: str | None, dtype: str
) -> None:
    """Write the repository of a published cosine checkpoint."""
    from linearize.conversion.importers.cosine import import_cosine

    settings, _ = _save_published(import_cosine, source, output, tokenizer=tokenizer, revision=revision, dtype=dtype)
    (low, high), key = settings["exponents"], settings["scale_side"] == "key"
    print(
        f"Saved {output}: {settings['layers']} layers of cosine attention, exponents {low} to {high} of the "
        f"{'place of a key' if key else 'length of the text'}"
    )


def _save_published(
    read: Callable[..., Any], source: str, output: str, *, dtype: str, **options: Any
) -> tuple[dict[str, Any], int]:
    """Read a checkpoint with its importer, write its repository and print the notes: its settings, and its ids."""
    from linearize.config.record import make_record
    from linearize.conversion.importers.checkpoint_files import find_checkpoint
    from linearize.conversion.sources import check_apart
    from linearize.hub.repository import save_final

    weights = choose_dtype(dtype)
    if Path(source).is_dir():
        check_apart(output, find_checkpoint(source))
    with stage("reading the checkpoint", "choose a smaller --dtype"):
        found = read(source, dtype=weights, **options)
    record = make_record(source, revision=found.source.origin.revision, recipe={"imported": found.settings})
    with stage("saving the model"):
        save_final(found.model, found.tokenizer, output, record)
    for note in found.notes:
        print(note)
    return found.settings, found.model.config.vocab_size
