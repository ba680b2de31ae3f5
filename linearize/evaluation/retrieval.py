"""Does a model find a fact at any depth of a long prompt: the prompts' measure, and the report of it.

`passkey.py` and `natural.py` make the prompts. All prompts of a length have the same number of tokens, so that batches
need no padding; the answer is decoded greedily.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from linearize.evaluation.arms import input_device, is_student, measuring
from linearize.evaluation.context_lengths import wilson
from linearize.evaluation.context_reading import BAR, answer_greedily, end_tokens, piece_length
from linearize.evaluation.labels import depth_label, length_label
from linearize.files import write_file
from linearize.tables import Table, markdown_tables, show_tables

COLUMNS = 12  # more depths than that are in the files only


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt `(L,)` int64 whose fact begins at the token `position`, in one of the bins of depth, from 0."""

    input_ids: Tensor
    depth: int
    position: int
    fact: str
    question: str
    answer: str
    kind: Literal["number", "name"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote to one prompt, and whether it is right."""

    depth: int
    position: int
    fact: str
    question: str
    answer: str
    generated: str
    hit: bool


@dataclasses.dataclass(frozen=True)
class Score:
    """Hits among trials, with the 95% Wilson interval of the accuracy."""

    trials: int
    hits: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Score":
        hits = sum(answer.hit for answer in answers)
        return cls(len(answers), hits, hits / len(answers), *wilson(hits, len(answers)))


@dataclasses.dataclass(frozen=True)
class LengthResult:
    """All answers at one length, in tokens of the whole prompt."""

    length: int
    answers: list[Answer]
    seconds: float

    def score(self) -> Score:
        return Score.of(self.answers)

    def depths(self) -> dict[int, Score]:
        """Scores by bin of depth, from 0."""
        bins = sorted({answer.depth for answer in self.answers})
        return {depth: Score.of([answer for answer in self.answers if answer.depth == depth]) for depth in bins}


@dataclasses.dataclass
class RetrievalReport:
    """Retrieval over lengths and depths; a plain value that prints and saves as JSON, Markdown and a heat map.

    Fields: name, of the files (`passkey` or `natural`); title; depths, number of bins; seed; new_tokens, of an answer
    at most; lengths, those finished so far; notes, sentences for the reader.
    """

    name: str
    title: str
    depths: int
    seed: int
    new_tokens: int
    lengths: list[LengthResult] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def tables(self) -> list[Table]:
        rows = []
        for result in self.lengths:
            score = result.score()
            interval = f"{100 * score.low:.1f} to {100 * score.high:.1f}"
            rows.append([length_label(result.length), f"{score.trials:,}", f"{score.hits:,}"])
            rows[-1] += [f"{100 * score.accuracy:.1f}", interval, f"{result.seconds:.0f}"]
        header = ["tokens", "trials", "hits", "accuracy %", "95% interval", "seconds"]
        tables = [Table(self.title, header, rows)]
        if 1 < self.depths <= COLUMNS:
            tables.append(self._depth_table())
        return tables

    def show(self, console: Any = None) -> None:
        show_tables(self.tables(), self.notes, console)

    def markdown(self, heading: str = "###") -> str:
        return markdown_tables(self.tables(), self.notes, heading)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: the scores by length and by depth, and every answer."""
        values = {name: getattr(self, name) for name in ("title", "depths", "seed", "new_tokens", "notes")}
        lengths = []
        for result in self.lengths:
            bins = [
                {"from": depth / self.depths, "to": (depth + 1) / self.depths, **dataclasses.asdict(score)}
                for depth, score in result.depths().items()
            ]
            answers = [dataclasses.asdict(answer) for answer in result.answers]
            measured = {"length": result.length, **dataclasses.asdict(result.score()), "seconds": result.seconds}
            lengths.append({**measured, "depths": bins, "answers": answers})
        return {**values, "lengths": lengths}

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write NAME.json, NAME.md and the heat map NAME.png; returns the paths."""
        from linearize.evaluation.plots import plot_heat_map

        paths = [Path(directory) / f"{self.name}.{kind}" for kind in ("json", "md", "png")]
        write_file(paths[0], (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        write_file(paths[1], self.markdown().encode())
        plot_heat_map(self, paths[2])
        return paths

    def _depth_table(self) -> Table:
        rows = []
        for result in self.lengths:
            found = result.depths()
            cells = [f"{100 * found[depth].accuracy:.0f}" if depth in found else "-" for depth in range(self.depths)]
            rows.append([length_label(result.length), *cells])
        header = ["tokens", *(depth_label(depth, self.depths) for depth in range(self.depths))]
        return Table("Accuracy % by depth of the fact, from the start of the prompt", header, rows)


def spread_depths(trials: int, depths: int) -> list[tuple[int, float]]:
    """Bin and depth in [0, 1] of each trial: the bins in turn, and evenly spaced within each.

    Five trials in the first of ten bins stand at 1, 3, 5, 7 and 9% of the way.
    """
    sizes = [len(range(depth, trials, depths)) for depth in range(depths)]
    places = [(trial % depths, trial // depths) for trial in range(trials)]
    return [(depth, (depth + (number + 0.5) / sizes[depth]) / depths) for depth, number in places]


def is_hit(generated: str, answer: str, kind: str) -> bool:
    """A number must be the first integer of the text; a name must be in it as a word, in capitals or not."""
    if kind == "number":
        first = re.search(r"[0-9]+", generated)
        return first is not None and int(first[0]) == int(answer)
    return re.search(rf"\b{re.escape(answer.casefold())}\b", generated.casefold()) is not None


def measure_retrieval(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[int, Sequence[Prompt]],
    report: RetrievalReport,
    *,
    batch_size: int = 1,
    after_length: Callable[[RetrievalReport], Any] | None = None,
) -> RetrievalReport:
    """Let a model answer prompts, length by length.

    Args:
        model: student, stock model, or peft wrapper of either.
        prompts: by length; all of a length have that many tokens.
        report: without lengths; they are added to it.
        batch_size: prompts of one length read together.
        after_length: called with the report after each length, so that what is done can be saved.
    """
    with measuring(model, "mixed" if is_student(model) else None) as base:
        ends, piece = end_tokens(base, tokenizer), piece_length(base)
        for length, asked in prompts.items():
            started = time.perf_counter()
            answers: list[Answer] = []
            label = f"{report.name} {length_label(length)}"
            with tqdm(total=len(asked), desc=label, unit="prompts", leave=False, bar_format=BAR) as bar:
                for start in range(0, len(asked), batch_size):
                    batch = asked[start : start + batch_size]
                    input_ids = torch.stack([prompt.input_ids for prompt in batch]).to(input_device(base))
                    rows = answer_greedily(base, input_ids, report.new_tokens, ends, piece)
                    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
                    answers += map(_judge, batch, texts)
                    bar.update(len(batch))
                    bar.set_postfix_str(f"{sum(answer.hit for answer in answers)} right")
            report.lengths.append(LengthResult(length, answers, time.perf_counter() - started))
            if after_length is not None:
                after_length(report)
    return report


def _judge(prompt: Prompt, generated: str) -> Answer:
    hit = is_hit(generated, prompt.answer, prompt.kind)
    return Answer(prompt.depth, prompt.position, prompt.fact, prompt.question, prompt.answer, generated, hit)
