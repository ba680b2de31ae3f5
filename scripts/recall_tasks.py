"""Recall behind a window: association, copying and passkeys as token ids, to be read in one forward (teacher-forced).

    items = tasks(tokenizer, text, length=4096, count=20, seed=0)
    for name, (ids, answers) in items.items():
        predictions = logits.argmax(-1)                        # (N, T): the token after each position
        accuracy(predictions, ids, answers).mean()

Running text fills what the task leaves: `text` is one array of token ids, e.g. the validation text of `tokens.npz`.
An answer's source is at least `FAR` tokens before it, so no window up to `FAR` reads it in one step. Chance is 1 in
10 a token for passkeys, below 1 in 1000 for the others. Items are paired: the same arguments give the same items.

- `association`: multi-query associative recall (Zoology: Arora et al. 2023, arXiv 2312.04927). Pairs of words lie
  scattered in the first part of the text, one line each, and half of them are asked at the end in another order; the
  answer is the second word.
- `copying`: 64 random words lie somewhere in the text and come again at its end; the answer is all of them but the
  first `CUE` (Jelassi et al. 2024, arXiv 2402.01032).
- `passkey`: five digits at one of five depths, asked for at the end (Mohtashami & Jaggi 2023, arXiv 2305.16300).
"""

import re

import numpy as np
import torch
from torch import Tensor

FAR = 512
"""Least tokens from an answer back to where it was said."""
SPAN, CUE = 64, 4
"""Words that are copied, and how many of them come before the first that must be foretold."""
DEPTHS = 5
NAMES = ("association", "copying", "passkey")


def tasks(tokenizer, text, length: int, count: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Items of the three tasks.

    Args:
        tokenizer: the model's (a byte-level or a SentencePiece one; digits may be tokens of their own or not).
        text: token ids of running text, 1-D, at least `length`; what lies between.
        length: tokens of an item, at least 1024.
        count: items a task.
        seed: of everything that is drawn.

    Returns:
        name -> `(ids, answers)`, int64 and bool, both `(count, length)`; an answer's token is foretold by the logits
        one place before it, and no answer is at place 0.

    Raises:
        ValueError: a length or a text that is too short, or a tokenizer without enough words of one token.
    """
    text = np.asarray(text)
    if length < 1024 or len(text) < length:
        raise ValueError(f"recall needs 1024 tokens or more and a text as long: got {length} and {len(text)}")
    words = one_token_words(tokenizer)
    if len(words) < 1000:
        raise ValueError(f"the tokenizer has {len(words)} words of one token: recall needs 1000")
    results = {}
    for name, make in zip(NAMES, (association, copying, passkey), strict=True):
        draw = np.random.default_rng([seed, length, NAMES.index(name)])
        items = [make(tokenizer, words, text, length, item, draw) for item in range(count)]
        ids, answers = (torch.from_numpy(np.stack(parts)) for parts in zip(*items, strict=True))
        results[name] = (ids, answers)
    return results


def accuracy(predictions: Tensor, ids: Tensor, answers: Tensor) -> Tensor:
    """Share of each item's answer tokens that are foretold: `(N,)`, float32.

    Args:
        predictions: token ids `(N, T)`, or logits `(N, T, V)`, each of the token after its position.
        ids: `(N, T)`.
        answers: `(N, T)`, bool.
    """
    best = predictions.argmax(-1) if predictions.dim() == 3 else predictions
    right = (best[:, :-1] == ids[:, 1:]) & answers[:, 1:]
    return right.sum(1).float() / answers.sum(1)


def one_token_words(tokenizer) -> np.ndarray:
    """Ids of words of 4 to 8 small letters with a space before them that are one token, most frequent 20 000 ids."""
    word = re.compile("[Ġ▁][a-z]{4,8}")  # byte-level and SentencePiece spaces
    return np.array(sorted(i for token, i in tokenizer.get_vocab().items() if i < 20_000 and word.fullmatch(token)))


def association(tokenizer, words, text, length: int, item: int, draw) -> tuple[np.ndarray, np.ndarray]:
    pairs, asked = 16, 8
    said = draw.choice(words, (pairs, 2), replace=False)
    line, colon = _encode(tokenizer, "\n"), _encode(tokenizer, ":")
    lines = [np.concatenate([line, [key], colon, [value], line]) for key, value in said]
    queries = draw.permutation(said)[:asked]
    end = np.concatenate([part for key, value in queries for part in (line, [key], colon, [value])])
    answers = np.zeros(length, bool)
    each = len(end) // asked
    answers[length - len(end) + each - 1 :: each] = True
    return _scatter(lines, end, text, length, draw, late=length - len(end) - FAR), answers


def copying(tokenizer, words, text, length: int, item: int, draw) -> tuple[np.ndarray, np.ndarray]:
    span, line = draw.choice(words, SPAN, replace=False), _encode(tokenizer, "\n")
    block = np.concatenate([line, span, line])
    answers = np.zeros(length, bool)
    answers[-(SPAN - CUE) - len(line) : length - len(line)] = True
    return _scatter([block], block, text, length, draw, late=length - len(block) - FAR), answers


def passkey(tokenizer, words, text, length: int, item: int, draw) -> tuple[np.ndarray, np.ndarray]:
    key = "".join(map(str, draw.integers(0, 10, 5)))
    block = _encode(tokenizer, f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
    asked, answer = "\nWhat is the pass key? The pass key is", f" {key}"
    end = _encode(tokenizer, asked + answer)
    digits = len(end) - len(_common(end, _encode(tokenizer, asked + " ")))
    answers = np.zeros(length, bool)
    answers[-digits:] = True
    room = length - len(end) - len(block) - FAR
    filler = _filler(text, length - len(end) - len(block), draw)
    place = room * (item % DEPTHS) // (DEPTHS - 1)
    return np.concatenate([filler[:place], block, filler[place:], end]), answers


def _scatter(blocks, end, text, length: int, draw, late: int) -> np.ndarray:
    """The blocks at random places, all over before `late`, in running text; then `end`."""
    inside = sum(map(len, blocks))
    filler = _filler(text, length - inside - len(end), draw)
    places = np.sort(draw.integers(0, late - inside, len(blocks), endpoint=True))
    parts = [part for block, piece in zip(blocks, np.split(filler, places), strict=False) for part in (piece, block)]
    return np.concatenate([*parts, filler[places[-1] :], end])


def _filler(text: np.ndarray, length: int, draw) -> np.ndarray:
    start = draw.integers(0, len(text) - length, endpoint=True)
    return text[start : start + length].astype(np.int64)


def _encode(tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int64)


def _common(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    size = min(len(one), len(other))
    same = one[:size] == other[:size]
    return one[: size if same.all() else int(same.argmin())]
