"""The commands `linearize import gain-cell | landmark | cosine`."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.failures import command

importer = typer.Typer(help="Checkpoints of published research code.", no_args_is_help=True)

Output = Annotated[str, typer.Argument(help="Directory to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the directory.")]


@importer.command("gain-cell")
@command
def import_gain_cell(
    source: Annotated[str, typer.Argument(help="The checkpoint (.pt) of the published gain-cell code.")],
    output: Output,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Directory or Hub id of the tokenizer to save along.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a converted repository of a checkpoint of the published gain-cell code (GPT-2)."""
    from linearize.cli.commands import import_published_gain_cell
    from linearize.conversion.sources import check_output

    check_output(output, overwrite)
    import_published_gain_cell(source, output, tokenizer)


@importer.command("landmark")
@command
def import_landmark(
    source: Annotated[
        str, typer.Argument(help="The checkpoint of the published landmark code (Llama): a directory or a Hub id.")
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
        typer.Option("--tokenizer", help="Directory or Hub id of the tokenizer, where SOURCE has none to be read."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of the checkpoint on the Hub.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Make a converted repository of a checkpoint of the published landmark code (Llama)."""
    from linearize.cli.commands import import_published_landmark
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


@importer.command("cosine")
@command
def import_cosine(
    source: Annotated[
        str, typer.Argument(help="The checkpoint of the published cosine code (BERT, GPT-J): a directory or a Hub id.")
    ],
    output: Output,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Directory or Hub id of the tokenizer, where SOURCE has none.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of the checkpoint on the Hub.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Make a converted repository of a checkpoint of the published cosine-attention code (BERT or GPT-J)."""
    from linearize.cli.commands import import_published_cosine
    from linearize.conversion.sources import check_output

    check_output(output, overwrite)
    import_published_cosine(source, output, tokenizer=tokenizer, revision=revision, dtype=dtype)
