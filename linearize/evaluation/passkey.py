"""Passkey prompts: a number among repeated sentences, asked for at the end.

A prompt has exactly the asked number of tokens of the model's tokenizer, BOS included where it puts one. Each part is
tokenised by itself and the ids are laid end to end; the filler fills what the other parts leave, and is cut between
tokens, so it may stop within a sentence before the fact and before the question.

Source: the task is that of Mohtashami and Jaggi, Landmark Attention, https://arxiv.org/abs/2305.16300, where
the filler is counted in characters.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from linearize.data.documents import leading_ids
from linearize.errors import UserError
from linearize.evaluation.context_lengths import DEPTHS, Trials
from linearize.evaluation.labels import length_label
from linearize.evaluation.retrieval import Prompt, RetrievalReport, spread_depths

TASK = (
    "A pass key is hidden somewhere in a long and otherwise pointless text. Find it and keep it in mind, for you will "
    "be asked about it at the end.\n"
)
FILLER = " The hills are quiet. The river runs to the sea. A cloud drifts by. The day goes on, and nothing happens."
FACT = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LARGEST_KEY = 50_000
NEW_TOKENS = 10


def passkey_prompts(
    tokenizer: Any, lengths: Sequence[int], *, trials: Trials | None = None, depths: int = DEPTHS, seed: int = 0
) -> dict[int, list[Prompt]]:
    """Prompts by length; those of one length depend on the seed and on it alone.

    Args:
        lengths: tokens of the whole prompt.
        trials: prompts of each length; default 50 of each.
        depths: bins of depth, from the first filler token to the last.

    Raises:
        UserError: a length that has no room for the fixed parts.
    """
    trials = trials or Trials()
    pieces = {text: encode(tokenizer, text) for text in (TASK, "\n" + QUESTION)}
    start, end = [*leading_ids(tokenizer), *pieces[TASK]], pieces["\n" + QUESTION]
    unit = encode(tokenizer, FILLER)
    filler = unit * (1 + max(lengths, default=0) // max(1, len(unit)))
    prompts: dict[int, list[Prompt]] = {}
    for length in lengths:
        generator = random.Random(f"passkey {length} {seed}")
        prompts[length] = []
        for depth, share in spread_depths(trials.of(length), depths):
            key = str(generator.randint(1, LARGEST_KEY))
            fact = encode(tokenizer, f"\n{FACT.format(key=key)}\n")
            room = room_left(length, "--passkey", start, fact, end)
            before = round(share * room)
            ids = [*start, *filler[:before], *fact, *filler[: room - before], *end]
            position = len(start) + before
            prompts[length].append(
                Prompt(torch.tensor(ids), depth, position, FACT.format(key=key), QUESTION, key, "number")
            )
    return prompts


def passkey_report(depths: int, seed: int) -> RetrievalReport:
    """An empty report that says what is measured."""
    title = f"Passkey retrieval: a number from 1 to {LARGEST_KEY:,} in repeated sentences, greedy decoding"
    return RetrievalReport("passkey", title, depths, seed, NEW_TOKENS)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids without BOS and EOS."""
    return encode_all(tokenizer, [text])[0]


def encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text by itself, without BOS and EOS."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def room_left(length: int, flag: str, *fixed: Sequence[int]) -> int:
    """Tokens between the fixed parts of a prompt.

    Raises:
        UserError: none.
    """
    needed = sum(map(len, fixed))
    if length <= needed:
        raise UserError(
            f"{flag} asks for {length_label(length)} tokens, but the prompt's fixed parts alone take {needed}: ask "
            "for more."
        )
    return length - needed
