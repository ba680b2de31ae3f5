"""The command `linearize export-vectors`."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.cli.context_flags import tokens
from linearize.cli.loading import (
    Device,
    Dtype,
    Found,
    Model,
    Overwrite,
    Revision,
    check_context,
    find_model,
    load,
)
from linearize.errors import UserError
from linearize.failures import command


@command
def export_vectors(
    model: Model,
    output: Annotated[str, typer.Argument(metavar="FILE", help="The .npz file to write.")],
    layer: Annotated[int, typer.Option("--layer", help="Index of the layer, from 0.")] = 0,
    head: Annotated[int, typer.Option("--head", help="Query head of the layer, from 0.")] = 0,
    length: Annotated[int, typer.Option("--tokens", parser=tokens, help="Tokens of the text.")] = 64,
    text: Annotated[
        str | None,
        typer.Option("--data", "--text", help="Text to run (.txt, .jsonl, .parquet), else some sentences."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Write test vectors of one head of gain cells.

    What it stores, reads and converts, for circuit simulation.
    """
    export_test_vectors(
        find_model(model, revision),
        output,
        layer=layer,
        head=head,
        tokens=length,
        text=text,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
    )


def export_test_vectors(
    found: Found,
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
    model, tokenizer, _ = load(found, dtype, device)
    check_context(model, "tokens", tokens)
    if text is not None:
        input_ids = load_text_blocks(text, tokenizer, tokens, tokens)[0]["input_ids"]
    else:
        sample = TEXT * (1 + tokens // 32)  # even a tokenizer of whole words fills 32 tokens with it
        input_ids = tokenizer(sample, return_tensors="pt")["input_ids"][0, :tokens]
    save_vectors(output, export_vectors(model, input_ids, layer=layer, head=head), overwrite=overwrite)
    print(f"Saved {output}: head {head} of layer {layer} on {tokens} tokens")
