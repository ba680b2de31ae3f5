"""Whether the ids of a tokenizer have rows in a model's embedding."""

from typing import Any

from linearize.errors import UserError


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id, which a vocabulary with holes has beyond its number of entries."""
    return max([*tokenizer.get_vocab().values(), len(tokenizer) - 1]) + 1


def check_vocabulary(tokenizer: Any, rows: int, source: str) -> None:
    """Refuse a tokenizer whose ids an embedding does not hold: on a GPU the lookup ends the process.

    Args:
        rows: Of the embedding.
        source: The model, for the message.

    Raises:
        UserError: An id has no row.
    """
    if (size := vocabulary_size(tokenizer)) > rows:
        raise UserError(
            f"The tokenizer of {source} has ids up to {size - 1}, but the model's embedding has {rows} rows: resize "
            "the embedding (resize_token_embeddings) and save the model again, or give the tokenizer it was trained "
            "with."
        )
