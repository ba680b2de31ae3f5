"""Sentence embeddings of an encoder: how far the student's are the teacher's, and what they are good for.

An embedding is the mean of the last states over the real tokens, scaled to length 1, as sentence-transformers' mean
pooling gives it. Legend: B rows, T tokens, D width, N sentences.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from linearize.data.rows import split_sentences
from linearize.errors import UserError
from linearize.evaluation.arms import input_device, measuring
from linearize.tables import Table, format_number, markdown_tables, show_tables
from linearize.training.losses import at_least_float32

TEACHER = "teacher"
PAIRS_SEED = 2357
"""Draws the sentence pairs, the same for every run."""
MOST_RANKED = 1000
"""Sentences whose pairwise similarities are ranked: half a million of them."""


def sentence_embeddings(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the real tokens, of length 1.

    Args:
        states: `(B, T, D)`. attention_mask: `(B, T)`, 1 at real tokens.

    Returns:
        `(B, D)` in float32 at least.
    """
    real = attention_mask.bool()[..., None]
    total = at_least_float32(states).masked_fill(~real, 0.0).sum(1)
    return functional.normalize(total / real.sum(1).clamp(min=1), dim=-1)


@dataclasses.dataclass(frozen=True)
class EmbeddingRow:
    """One model. Fields: cosine, the mean similarity of its embeddings to the teacher's; rank_correlation, Spearman's,
    of its pairwise similarities and the teacher's; recall, the share of sentences whose nearest among the followers of
    all is their own; masked_perplexity, of hidden tokens, where it was measured and there is a head for it.
    """

    name: str
    cosine: float | None
    rank_correlation: float | None
    recall: float | None
    masked_perplexity: float | None = None


@dataclasses.dataclass
class EmbeddingReport:
    """The models of an evaluation, the teacher first. Fields: sentences embedded; pairs of neighbours among them;
    seconds.
    """

    sentences: int
    pairs: int
    rows: list[EmbeddingRow] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def row(self, name: str) -> EmbeddingRow | None:
        return next((row for row in self.rows if row.name == name), None)

    def table(self) -> Table:
        header = ["", "cosine to the teacher", "rank correlation", f"recall@1 of {self.pairs:,}"]
        figures = [[row.cosine, row.rank_correlation, row.recall] for row in self.rows]
        if any(row.masked_perplexity is not None for row in self.rows):
            header.append("masked perplexity")
            figures = [[*x, row.masked_perplexity] for x, row in zip(figures, self.rows, strict=True)]
        rows = [[row.name, *map(format_number, x)] for x, row in zip(figures, self.rows, strict=True)]
        return Table(f"Embeddings of {self.sentences:,} held-out sentences", header, rows)

    def show(self, console: Any = None) -> None:
        show_tables([self.table()], (), console)

    def markdown(self, heading: str = "###") -> str:
        return markdown_tables([self.table()], (), heading)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EmbeddingReport":
        return cls(**{**values, "rows": [EmbeddingRow(**row) for row in values["rows"]]})

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write embeddings.json and embeddings.md; returns the paths."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "embeddings.json", folder / "embeddings.md"]
        paths[0].write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        paths[1].write_text(self.markdown(), encoding="utf-8")
        return paths


class EmbeddingEvaluation:
    """Held-out pairs of adjacent sentences, and the teacher's embeddings of them.

    Args:
        documents: Texts; a pair never crosses two of them.
        tokenizer: Of teacher and students.
        pairs: How many to draw at most, evenly over all documents.
        batch_size: Sentences per forward pass.
        max_length: Tokens of a sentence at most.

    Raises:
        UserError: the texts hold no two adjacent sentences.
    """

    def __init__(
        self,
        documents: Sequence[str],
        tokenizer: Any,
        *,
        pairs: int = 1000,
        batch_size: int = 64,
        max_length: int = 128,
    ) -> None:
        self.tokenizer, self.batch_size, self.max_length = tokenizer, batch_size, max_length
        self.pairs = adjacent_pairs(documents, pairs)
        self.sentences = [sentence for pair in zip(*self.pairs, strict=True) for sentence in pair]
        self.report = EmbeddingReport(len(self.sentences), len(self.pairs))
        self._reference: Tensor | None = None

    def measure(
        self, name: str, model: Any, arm: str | None = "mixed", masked_perplexity: float | None = None
    ) -> EmbeddingRow:
        """Append a model to the report; the first one is what the others are compared with.

        Args:
            model: an encoder, stock or converted, with or without a head.
            arm: of a converted one; None (or "teacher") for a stock one.
            masked_perplexity: measured elsewhere, for the same row.
        """
        started = time.perf_counter()
        found = self.embed(model, arm)
        recall = adjacent_recall(*found.chunk(2))
        if self._reference is None:
            self._reference = found
            row = EmbeddingRow(name, 1.0, 1.0, recall, masked_perplexity)
        else:
            cosine = (found * self._reference).sum(1).mean().item()
            ranks = rank_correlation(found[:MOST_RANKED], self._reference[:MOST_RANKED])
            row = EmbeddingRow(name, cosine, ranks, recall, masked_perplexity)
        self.report.rows.append(row)
        self.report.seconds += time.perf_counter() - started
        return row

    def embed(self, model: Any, arm: str | None) -> Tensor:
        """The embeddings of all sentences, `(N, D)` float64 on the CPU: the first ones of the pairs, then the
        second."""
        return embed(model, self.tokenizer, self.sentences, arm, self.batch_size, self.max_length)


def embed(
    model: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    arm: str | None = "mixed",
    batch_size: int = 64,
    max_length: int = 128,
) -> Tensor:
    """The embeddings of sentences, `(N, D)` float64 on the CPU; arguments as in `EmbeddingEvaluation`."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    parts = []
    with measuring(model, arm) as base, tqdm(total=len(order), desc="embeddings", unit="text", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            texts = [sentences[i] for i in order[start : start + batch_size]]
            inputs = tokenizer(
                texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt", padding_side="right"
            ).to(input_device(base))
            states = base.base_model(**inputs).last_hidden_state
            parts.append(sentence_embeddings(states, inputs["attention_mask"]).double().cpu())
            bar.update(len(texts))
    found = torch.cat(parts)
    return found[torch.tensor(order).argsort()]


def adjacent_pairs(documents: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Neighbouring sentences, no sentence twice, drawn with a fixed seed.

    Raises:
        UserError: there is none.
    """
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    for document in documents:
        sentences = [sentence for sentence in split_sentences(document) if sentence not in seen]
        sentences = list(dict.fromkeys(sentences))
        seen.update(sentences)
        pairs += zip(sentences[::2], sentences[1::2], strict=False)
    if not pairs:
        raise UserError("The held-out text holds no two adjacent sentences: give more text.")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(PAIRS_SEED)).tolist()
    return [pairs[i] for i in order[:count]]


def adjacent_recall(queries: Tensor, followers: Tensor) -> float:
    """Share of queries whose most similar follower is their own; both `(N, D)`, of length 1."""
    nearest = (queries @ followers.T).argmax(1)
    return (nearest == torch.arange(len(queries))).double().mean().item()


def rank_correlation(ours: Tensor, theirs: Tensor) -> float | None:
    """Spearman's correlation of the pairwise similarities of two `(N, D)`; None of fewer than three sentences."""
    if len(ours) < 3:
        return None
    above = torch.triu_indices(len(ours), len(ours), 1)
    ranks = [_ranks((x @ x.T)[above[0], above[1]]) for x in (ours, theirs)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values sharing their mean rank."""
    ordered, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    return (last - (counts - 1) / 2).double()[inverse]
