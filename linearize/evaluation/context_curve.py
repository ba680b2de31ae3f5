"""Perplexity of the same tokens, read with more and more of the text before them.

From every document that has enough tokens for the longest context, stretches of S tokens are scored, S = min(256, half
of the shortest length): the document's last S tokens, the S before those, and so on. A context of L tokens ends with
the stretch, so L - S tokens of the same document stand before it. All lengths score the same tokens, and only what the
model may read before them differs.

Legend: B stretches of a batch, S tokens of a stretch, L tokens of a context.
"""

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from linearize.data.documents import leading_ids, resolve_format, tokenize_records
from linearize.data.sources import open_files
from linearize.errors import UserError
from linearize.evaluation.arms import input_device, is_student, measuring
from linearize.evaluation.context_reading import BAR, piece_length, read
from linearize.evaluation.labels import length_label
from linearize.files import write_file
from linearize.tables import Table, format_number, markdown_tables, show_tables

LONGEST_STRETCH = 256
ENOUGH_TEXT = 2**22  # tokens of long documents: no more are read once they hold what is to be scored


@dataclasses.dataclass(frozen=True)
class Stretches:
    """Tokens to score, each `(L,)` int64 with the longest context before them; what precedes may be cut at will."""

    contexts: list[Tensor]
    scored: int
    documents: int
    leading: list[int]

    def inputs(self, start: int, stop: int, length: int) -> Tensor:
        """`(B, length)`: some stretches under a context of `length` tokens, BOS among them where there is one."""
        rows = torch.stack(self.contexts[start:stop])[:, -length:].clone()
        if self.leading:
            rows[:, : len(self.leading)] = torch.tensor(self.leading)
        return rows


@dataclasses.dataclass(frozen=True)
class LengthPerplexity:
    """One context length: perplexity, nats per token, nats per token of each stretch, seconds."""

    length: int
    perplexity: float
    nll: float
    stretch_nll: list[float]
    seconds: float


@dataclasses.dataclass
class ContextPerplexityReport:
    """Perplexity over the context length, of the same tokens at each.

    Fields: scored, tokens of a stretch; stretches and documents, their numbers; lengths, those finished so far; notes.
    """

    scored: int
    stretches: int
    documents: int
    lengths: list[LengthPerplexity] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def describe(self) -> str:
        """What was scored."""
        parts = [(self.stretches, "stretch", "es"), (self.documents, "document", "s")]
        counts = [f"{number:,} {word}{many if number > 1 else ''}" for number, word, many in parts]
        return f"{counts[0]} of {self.scored} tokens from {counts[1]}"

    def table(self) -> Table:
        rows = []
        for found in self.lengths:
            ratio = found.perplexity / self.lengths[0].perplexity
            rows.append(
                [length_label(found.length), f"{found.length - self.scored:,}", format_number(found.perplexity)]
            )
            rows[-1] += [f"{ratio:.3f}", f"{found.seconds:.0f}"]
        header = ["context", "tokens before\nthe scored", "perplexity", "/ the shortest\ncontext's", "seconds"]
        return Table(f"Perplexity of the same tokens under longer contexts: {self.describe()}", header, rows)

    def show(self, console: Any = None) -> None:
        show_tables([self.table()], self.notes, console)

    def markdown(self, heading: str = "###") -> str:
        return markdown_tables([self.table()], self.notes, heading)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write context_perplexity.json, .md and .png; returns the paths."""
        from linearize.evaluation.plots import plot_context_perplexity

        paths = [Path(directory) / f"context_perplexity.{kind}" for kind in ("json", "md", "png")]
        write_file(paths[0], (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        write_file(paths[1], self.markdown().encode())
        plot_context_perplexity(self, paths[2])
        return paths


def load_stretches(
    paths: Sequence[str | Path],
    tokenizer: Any,
    lengths: Sequence[int],
    max_tokens: int,
    *,
    text_field: str = "text",
) -> Stretches:
    """Choose what is scored: the end of each long document first, then the stretch before each, until it is enough.

    Args:
        paths: local text files; a `.txt` file is one document.
        lengths: of contexts, in tokens, BOS included.
        max_tokens: tokens to score at most, at each length.

    Raises:
        UserError: the files cannot be read, no document is long enough, or a length is below 4 tokens.
    """
    if min(lengths) < 4:
        raise UserError(f"--context_perplexity has the length {min(lengths)}, but a context needs at least 4 tokens.")
    scored, longest = min(LONGEST_STRETCH, min(lengths) // 2), max(lengths)
    wanted = max(1, max_tokens // scored)
    leading = leading_ids(tokenizer)
    documents = _long_documents(paths, tokenizer, longest, scored, wanted, text_field)
    ends = [range(len(document), longest - 1, -scored) for document in documents]
    rounds = itertools.zip_longest(*ends)
    chosen = [(i, end) for row in rounds for i, end in enumerate(row) if end is not None][:wanted]
    contexts = [torch.from_numpy(documents[i][end - longest : end]) for i, end in chosen]
    return Stretches(contexts, scored, len({i for i, _ in chosen}), leading)


def context_perplexity(
    model: Any,
    stretches: Stretches,
    lengths: Sequence[int],
    *,
    batch_size: int = 1,
    report: ContextPerplexityReport | None = None,
    after_length: Callable[[ContextPerplexityReport], Any] | None = None,
) -> ContextPerplexityReport:
    """Take the perplexity of the same tokens at every context length.

    Args:
        model: student, stock model, or peft wrapper of either.
        stretches: from `load_stretches` with the same lengths.
        batch_size: stretches read together.
        report: one to go on with, for its notes; default a new one.
        after_length: called with the report after each length, so that what is done can be saved.
    """
    count = len(stretches.contexts)
    report = report or ContextPerplexityReport(stretches.scored, count, stretches.documents)
    with measuring(model, "mixed" if is_student(model) else None) as base:
        piece = piece_length(base)
        for length in lengths:
            started = time.perf_counter()
            nll: list[float] = []
            label = f"perplexity at {length_label(length)}"
            with tqdm(total=count, desc=label, unit="stretches", leave=False, bar_format=BAR) as bar:
                for start in range(0, count, batch_size):
                    rows = stretches.inputs(start, start + batch_size, length).to(input_device(base))
                    nll += _losses(base, rows, stretches.scored, piece).mean(1).tolist()
                    bar.update(min(batch_size, count - start))
            mean = float(np.mean(nll))
            value = math.exp(mean) if mean < 700 else math.inf
            report.lengths.append(LengthPerplexity(length, value, mean, nll, time.perf_counter() - started))
            if after_length is not None:
                after_length(report)
    return report


def _losses(base: Any, input_ids: Tensor, scored: int, piece: int | None) -> Tensor:
    """`(B, S)` float64 nats of the last tokens."""
    logits, _ = read(base, input_ids[:, :-1], scored, piece)
    targets = input_ids[:, -scored:].to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double()


def _long_documents(
    paths: Sequence[str | Path], tokenizer: Any, longest: int, scored: int, wanted: int, text_field: str
) -> list[np.ndarray]:
    """The documents of at least `longest` tokens, without BOS and EOS, until they are enough."""
    source = open_files(list(paths), text_field)
    resolve_format(source, "text", text_field, "")
    found: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    most = stretches = tokens = 0
    opening = len(leading_ids(tokenizer))
    for segment in tokenize_records(source.records(), tokenizer, "text", text_field=text_field):
        parts.append(segment.ids)
        if not segment.ends_document:
            continue
        document = np.concatenate(parts)[opening:-1]
        parts, most = [], max(most, len(document))
        if len(document) >= longest:
            found.append(document)
            tokens += len(document)
            stretches += 1 + (len(document) - longest) // scored
            if len(found) >= wanted or (stretches >= wanted and tokens >= ENOUGH_TEXT):
                break
    if not found:
        raise UserError(
            f"--context_perplexity asks for a context of {length_label(longest)} tokens, but the longest document of "
            f"{source.name} has {most:,}: give --data with longer documents (a .txt file is one), or ask for less."
        )
    return found
