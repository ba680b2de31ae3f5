"""Long sequences through a model: prefill in pieces over whatever cache the model makes, then greedy decoding.

Legend: B sequences of equal length, L tokens, V vocabulary.
"""

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.errors import UserError
from linearize.evaluation.arms import context_tokens, is_student
from linearize.evaluation.labels import length_label
from linearize.modeling.cache_names import CACHE, NAMES, named

PIECE = 2048  # tokens of one forward pass over the cache; more take more memory and hardly less time
BAR = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}]{postfix}"  # time so far and no guess: lengths differ too much
CHANGING_ROPE = ("dynamic", "longrope")  # their frequencies follow the tokens of a call


def piece_length(base: Any) -> int | None:
    """Tokens of a prefill's piece; None where pieces would change the result.

    That is the case of stock recurrent layers, which take several tokens on an empty state only, and of rotary
    embeddings whose frequencies depend on how long the call is. A converted model's states take any pieces.
    """
    config = base.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [entry.get("rope_type") for entry in (rope, *rope.values()) if isinstance(entry, dict)]
    if any(kind in CHANGING_ROPE for kind in kinds):
        return None
    return None if getattr(base, "_is_stateful", False) and not is_student(base) else PIECE


def read(base: Any, input_ids: Tensor, keep: int = 1, piece: int | None = PIECE) -> tuple[Tensor, Any]:
    """Run sequences through the model, piece by piece over the cache.

    Args:
        base: any causal language model, ready to be measured.
        input_ids: `(B, L)`, no padding.
        keep: logits of the last `keep` positions are returned; those of the others are never computed.
        piece: tokens of one forward pass; None takes all at once. The last one is longer where `keep` asks for it.

    Returns:
        `(B, keep, V)` logits, and the cache; None of a model that keeps none under the usual name.
    """
    length = input_ids.shape[1]
    parameters = inspect.signature(base.forward).parameters
    few = {"logits_to_keep": keep} if "logits_to_keep" in parameters else {}
    if not parameters.keys() & set(NAMES):
        return base(input_ids, **few).logits[:, -keep:], None
    starts = list(range(0, length, piece or length))
    while len(starts) > 1 and length - starts[-1] < keep:
        starts.pop()
    logits = cache = None
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        output = base(input_ids[:, start:stop], use_cache=True, **named(cache), **few)
        logits, cache = output.logits[:, -keep:], output.get(CACHE)
    assert logits is not None
    return logits, cache


def answer_greedily(
    base: Any, input_ids: Tensor, new_tokens: int, ends: Collection[int] = (), piece: int | None = PIECE
) -> list[list[int]]:
    """Continue prompts of equal length with the likeliest token each time.

    Args:
        input_ids: `(B, L)`.
        new_tokens: tokens of an answer at most.
        ends: ids that end an answer; neither they nor what follows is returned.

    Returns:
        The new ids of each prompt.
    """
    logits, cache = read(base, input_ids, 1, piece)
    tokens = [logits[:, -1].argmax(-1)]
    stop = torch.tensor(sorted(ends), dtype=torch.int64, device=input_ids.device)
    over = torch.isin(tokens[0], stop)
    while len(tokens) < new_tokens and not bool(over.all()):
        token = tokens[-1][:, None]
        if cache is None:
            logits, _ = read(base, torch.cat([input_ids, torch.stack(tokens, 1)], 1), 1, piece)
        else:
            output = base(token, use_cache=True, **named(cache))
            logits, cache = output.logits, output.get(CACHE)
        tokens.append(logits[:, -1].argmax(-1))
        over = over | torch.isin(tokens[-1], stop)
    return [_until(row, set(ends)) for row in torch.stack(tokens, 1).tolist()]


def end_tokens(base: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: those of the model's generation settings and the tokenizer's."""
    found = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


def check_positions(model: Any, flag: str, lengths: Sequence[int], answer: int = 0) -> None:
    """Refuse lengths past the last position of a model that looks its positions up in a table.

    Rotary embeddings go on past the trained context, which is what the measurement is about.

    Args:
        flag: what asks for the lengths.
        answer: tokens that are generated at most; the last of them is not read.

    Raises:
        UserError: the longest does not fit.
    """
    config = model.config.get_text_config()
    positions = context_tokens(config)
    computed = getattr(config, "rope_parameters", None) or not getattr(config, "learned_positions", True)
    if positions is None or computed:
        return
    longest = positions - max(answer - 1, 0)
    if lengths and max(lengths) > longest:
        room = f" and an answer of up to {answer} tokens" if answer else ""
        raise UserError(
            f"{flag} asks for {length_label(max(lengths))} tokens{room}, but this {config.model_type} model looks "
            f"its positions up in a table that ends at {config.max_position_embeddings:,}: ask for at most "
            f"{longest:,}."
        )


def _until(tokens: list[int], ends: Collection[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place]
    return tokens
