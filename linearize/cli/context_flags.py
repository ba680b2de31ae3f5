"""Flags of `linearize evaluate` about context length, for `linearize/cli/app.py`, and how a flag reads tokens."""

from typing import Annotated

import typer

from linearize.config.sizes import parse_tokens


def tokens(value: str | int) -> int:
    """A number of tokens as a flag gives it: 1024, 1k or 20M.

    Raises:
        typer.BadParameter: it is none.
    """
    number = parse_tokens(str(value))
    if number is None:
        raise typer.BadParameter(f"{value!r} is no number of tokens, such as 1024, 1k or 20M.")
    return number


PasskeyLengths = Annotated[
    str | None,
    typer.Option("--passkey", help="Retrieval of a pass key at these prompt lengths in tokens, e.g. 1k,2k,32k."),
]
NaturalLengths = Annotated[
    str | None,
    typer.Option(
        "--natural",
        help="Retrieval of a fact from ordinary text (--data, default the demo's) by a question in other words, at "
        "these prompt lengths.",
    ),
]
PerplexityLengths = Annotated[
    str | None,
    typer.Option(
        "--context_perplexity",
        help="Perplexity of the same tokens of long documents (--data, default the demo's) under contexts of these "
        "lengths; --max_tokens are scored at each.",
    ),
]
ByLength = Annotated[
    str | None,
    typer.Option(
        "--by_length",
        help="Perplexity at 1, 4 and 8 times this trained length (1k, or auto: as the record has it) of each --data "
        "(default the demo's): a student's arms, the teacher, and a plain window of as many bytes. At most "
        "--max_tokens of each, on a CPU 8192 unless given.",
    ),
]
TrialNumbers = Annotated[
    str | None,
    typer.Option(
        "--trials",
        help="Prompts of each length (50), for some lengths another number: 50,32k=200. Draws of the noise (16).",
    ),
]
Depths = Annotated[int, typer.Option("--depths", help="Bins of the depth at which a fact is hidden.")]
ContextSeed = Annotated[int, typer.Option("--seed", help="Of the prompts.")]
RopeScalingFlag = Annotated[
    str | None,
    typer.Option(
        "--rope_scaling",
        help="yarn=FACTOR, or yarn=auto for the longest length asked over the model's context: a stock model with "
        "its RoPE stretched, the baseline without training.",
    ),
]
