"""Prompts with a fact in ordinary text, asked for by a question in other words (`natural_facts.py`).

A prompt has exactly the asked number of tokens, each part tokenised by itself. Its hay is a stretch of the text that
ends with a sentence and is cut short at its start, between two tokens of its first sentence; the fact stands between
two sentences, as near to its depth as they allow. Every trial takes its stretch from another place, and what runs past
the text's end goes on at its beginning.
"""

import logging
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from linearize.data.documents import leading_ids, resolve_format
from linearize.data.sources import open_files, string_field
from linearize.errors import UserError
from linearize.evaluation.context_lengths import DEPTHS, Trials
from linearize.evaluation.labels import length_label
from linearize.evaluation.natural_facts import FACTS, NAMES, WHO, Fact
from linearize.evaluation.passkey import encode, encode_all, room_left
from linearize.evaluation.retrieval import Prompt, RetrievalReport, spread_depths

logger = logging.getLogger(__name__)

TASK = "Read the following text, then answer the question at its end.\n\n"
NEW_TOKENS = 20  # a whole sentence that holds the answer fits in
SENTENCE = re.compile(r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)[\"'”’)\]]*\s+|\n+\s*")
BATCH = 1024  # sentences tokenised together


class Hay:
    """Text as tokens that knows where its sentences end.

    Args:
        documents: their texts, in order; those without words are left out.
        tokens: reading stops once there are so many.

    Raises:
        UserError: there is no text.
    """

    def __init__(self, documents: Iterable[str], tokenizer: Any, tokens: int):
        ids: list[int] = []
        ends: list[int] = []
        texts: list[str] = []
        for text in documents:
            texts.append(text)
            sentences = split_sentences(text)
            for start in range(0, len(sentences), BATCH):
                for sentence in encode_all(tokenizer, sentences[start : start + BATCH]):
                    ids += sentence
                    ends.append(len(ids))
            if len(ids) >= tokens:
                break
        if not ids:
            raise UserError("--natural hides facts in text, and there is none: give --data FILE with some.")
        self.ids, self.ends, self.text = np.array(ids, dtype=np.int64), np.array(ends), "\n\n".join(texts)
        self._last = np.zeros(len(ids), dtype=bool)
        self._last[self.ends - 1] = True

    def __len__(self) -> int:
        return len(self.ids)

    def stretch(self, sentence: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The `length` tokens up to the end of a sentence, and where sentences end among them: 0 < place <= length."""
        end = int(self.ends[sentence])
        index = np.arange(end - length, end) % len(self)
        return self.ids[index], np.flatnonzero(self._last[index]) + 1


def natural_prompts(
    tokenizer: Any,
    lengths: Sequence[int],
    documents: Iterable[str],
    *,
    trials: Trials | None = None,
    depths: int = DEPTHS,
    seed: int = 0,
) -> dict[int, list[Prompt]]:
    """Prompts by length; those of one length depend on the text, the seed and the length.

    Args:
        lengths: tokens of the whole prompt.
        documents: texts to hide facts in; too few are repeated, with a warning.
        trials: prompts of each length; default 50 of each.
        depths: bins of depth, from the first token of the hay to the last.

    Raises:
        UserError: no text, or a length that has no room for the fixed parts.
    """
    trials = trials or Trials()
    hay = Hay(documents, tokenizer, max((length * trials.of(length) for length in lengths), default=0))
    start = [*leading_ids(tokenizer), *encode(tokenizer, TASK)]
    prompts: dict[int, list[Prompt]] = {}
    for length in lengths:
        generator = random.Random(f"natural {length} {seed}")
        count, asked = trials.of(length), _Draw(hay.text, generator)
        first = generator.randrange(len(hay.ends))
        prompts[length] = []
        for trial, (depth, share) in enumerate(spread_depths(count, depths)):
            fact, question, answer, kind = asked.next()
            parts = [encode(tokenizer, f" {fact}"), encode(tokenizer, f"\n\n{question}")]
            room = room_left(length, "--natural", start, *parts)
            ids, places = hay.stretch((first + trial * len(hay.ends) // count) % len(hay.ends), room)
            before = int(places[np.abs(places - share * room).argmin()])
            whole = np.concatenate([start, ids[:before], parts[0], ids[before:], parts[1]])
            position = len(start) + before
            prompts[length].append(Prompt(torch.from_numpy(whole), depth, position, fact, question, answer, kind))
    if lengths and len(hay) < max(lengths):
        logger.warning(
            "The text for --natural has %s tokens, fewer than the %s of the longest prompt: it is repeated.",
            f"{len(hay):,}",
            length_label(max(lengths)),
        )
    return prompts


def natural_report(depths: int, seed: int) -> RetrievalReport:
    """An empty report that says what is measured."""
    title = "Retrieval from ordinary text: a fact asked for in other words, greedy decoding"
    return RetrievalReport("natural", title, depths, seed, NEW_TOKENS)


def split_sentences(text: str) -> list[str]:
    """The sentences of a document, each with the space before it; the first begins with a blank line."""
    starts = [0, *(match.end() for match in SENTENCE.finditer(text)), len(text)]
    sentences = []
    space = "\n\n"
    for start, stop in zip(starts, starts[1:], strict=False):
        piece = text[start:stop]
        if words := piece.strip():
            sentences.append(space + words)
            space = ""
        space = space or piece[len(piece.rstrip()) :]
    return sentences


def read_documents(paths: Sequence[str | Path], text_field: str = "text") -> Iterable[str]:
    """The texts of local files, as they are asked for.

    Raises:
        UserError: the files are missing or unreadable, or have no such field.
    """
    source = open_files(list(paths), text_field)
    resolve_format(source, "text", text_field, "")
    for where, record in source.records():
        if (text := string_field(record, text_field, where)).strip():
            yield text


class _Draw:
    """Facts in random order, each template once before any comes again, with answers that the text does not hold."""

    def __init__(self, text: str, generator: random.Random):
        self.text, self.generator, self.waiting = text.casefold(), generator, list[Fact]()

    def next(self) -> tuple[str, str, str, Any]:
        if not self.waiting:
            self.waiting = self.generator.sample(FACTS, len(FACTS))
        template = self.waiting.pop()
        who, answer = self.generator.choice(WHO), self._answer(template)
        kind = "number" if template.answer == "number" else "name"
        question = f"Question: {template.question}\nAnswer: {template.cue}".format(who=who)
        fact = template.fact.format(who=who, answer=answer)
        return fact, question, answer, kind

    def _answer(self, template: Fact) -> str:
        """One that is not in the text; where the text holds them all, any."""
        if template.answer == "number":
            draws = [str(self.generator.randint(template.least, template.most)) for _ in range(32)]
        else:
            names = NAMES[template.answer]
            draws = self.generator.sample(names, len(names))
        return next((draw for draw in draws if draw.casefold() not in self.text), draws[0])
