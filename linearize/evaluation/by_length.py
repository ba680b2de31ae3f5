"""Perplexity at the trained length and past it: whole pieces of 1, 4 and 8 times as many tokens, and by position.

A text is one row of tokens, documents joined by end-of-text tokens as in training. Its start is cut into pieces of
each length, so that every length scores the same tokens. A student is measured in all its arms, between two controls:
the teacher, as far as its positions reach, and the teacher with a plain window of as many bytes as the student has.

Legend: N tokens of a text, n tokens of the trained length, L tokens of a piece.
"""

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.evaluation.arms import (
    OWN_WEIGHTS,
    ROW_NAMES,
    SOFTMAX_ARM,
    STUDENT,
    TEACHER,
    adapters_off,
    arms_of,
    context_tokens,
    is_student,
    unwrap,
)
from linearize.evaluation.next_token import perplexity
from linearize.evaluation.plain_window import matched_window, plain_window
from linearize.tables import Table, format_number, markdown_tables, show_tables

TIMES = (1, 4, 8)
"""Lengths of the pieces, in trained lengths."""
PARTS = ((0, 1), (1, 2), (2, 4), (4, 8))
"""Positions of a piece, in trained lengths."""
TOKENS, TOKENS_ON_CPU = 65_536, 8_192
"""Tokens of each text that are scored at most, where nobody says how many."""
HELD_OUT = "held-out text"
MATCHED = "a plain window of as many bytes"
SAME = 1e-4  # of a perplexity: less is rounding


@dataclasses.dataclass(frozen=True)
class LengthText:
    """The start of a text: token ids and labels `(N,)` int64; `held`, tokens of all of it."""

    name: str
    ids: Tensor
    labels: Tensor
    held: int

    @classmethod
    def of(cls, name: str, blocks: Any, limit: int) -> "LengthText":
        """Lay the rows of `TokenBlocks` end to end, without padding, until they hold `limit` tokens."""
        held = blocks.tokens if blocks.lengths is None else int(blocks.lengths.sum())
        parts: list[tuple[Tensor, Tensor]] = []
        found = 0
        for i in range(len(blocks)):
            if found >= limit:
                break
            row = blocks[i]
            real = row["attention_mask"].bool() if "attention_mask" in row else slice(None)
            parts.append((row["input_ids"][real], row["labels"][real]))
            found += len(parts[-1][0])
        ids, labels = (torch.cat(part)[:limit] for part in zip(*parts, strict=True))
        return cls(name, ids, labels, held)

    def longest(self, trained: int) -> int | None:
        """The greatest of `TIMES` of which a piece fits; None without any."""
        return next((times for times in reversed(TIMES) if times * trained <= len(self.ids)), None)

    def pieces(self, length: int, longest: int) -> Any:
        """Whole pieces of `length` tokens, of the same tokens as those of `longest`."""
        from linearize.data.sequences import TokenBlocks

        used = len(self.ids) // longest * longest
        return TokenBlocks(self.ids[:used].reshape(-1, length), self.labels[:used].reshape(-1, length))


@dataclasses.dataclass(frozen=True)
class LengthFigure:
    """One arm on one text in pieces of `times` trained lengths.

    Fields: parts, the perplexity of each of `PARTS` that a piece has; window and sinks, of a plain window, else None.
    """

    text: str
    name: str
    times: int
    perplexity: float
    nll: float
    tokens: int
    seconds: float
    parts: list[float]
    window: int | None = None
    sinks: int | None = None


@dataclasses.dataclass
class LengthReport:
    """All figures by length; a plain value that prints, saves as JSON and comes back from it.

    Fields: trained, tokens of the trained length; read, tokens of each text; reference, the row that the others are
    compared with; figures, as measured; notes, what could not be measured and why.
    """

    trained: int
    read: dict[str, int] = dataclasses.field(default_factory=dict)
    reference: str = TEACHER
    figures: list[LengthFigure] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def figure(self, text: str, name: str, times: int) -> LengthFigure | None:
        found = (x for x in self.figures if (x.text, x.name, x.times) == (text, name, times))
        return next(found, None)

    def has(self, name: str) -> bool:
        """Whether a row has been measured."""
        return any(figure.name == name for figure in self.figures)

    def texts(self) -> list[str]:
        return list(dict.fromkeys(figure.text for figure in self.figures))

    def names(self) -> list[str]:
        return list(dict.fromkeys(figure.name for figure in self.figures))

    def worse(self) -> list[tuple[str, str, float, float]]:
        """Where the student is worse than its own window: text, positions, and both perplexities there."""
        found = []
        for text in self.texts():
            own, window = (self._longest(text, name) for name in (STUDENT, SOFTMAX_ARM))
            if own is not None and window is not None:
                pairs = zip(PARTS, own.parts, window.parts, strict=False)
                found += [(text, part_label(part), a, b) for part, a, b in pairs if a > b * (1 + SAME)]
        return found

    def warning(self) -> str | None:
        """One sentence where the student is worse than its own window; None where it never is."""
        places: dict[str, list[str]] = {}
        for text, place, own, window in self.worse():
            places.setdefault(text, []).append(f"{place} ({format_number(own)} against {format_number(window)})")
        if not places:
            return None
        listed = "; ".join(f"on {text} at positions {', '.join(found)}" for text, found in places.items())
        return f"The student is worse than its own window and sinks with the memory left out, in perplexity: {listed}."

    def warn(self) -> None:
        """Warn of what `warning` says, if anything."""
        if (sentence := self.warning()) is not None:
            warnings.warn(sentence, UserWarning, stacklevel=2)

    def sentences(self) -> list[str]:
        """The warning, the plain windows' sizes, and what could not be measured."""
        warning = self.warning()
        return ([warning] if warning else []) + self._windows() + self.notes

    def tables(self) -> list[Table]:
        """One of each text."""
        return [self._table(text) for text in self.texts()]

    def show(self, console: Any = None) -> None:
        show_tables(self.tables(), self.sentences(), console)

    def markdown(self, heading: str = "###") -> str:
        return markdown_tables(self.tables(), self.sentences(), heading)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LengthReport":
        return cls(**{**values, "figures": [LengthFigure(**figure) for figure in values["figures"]]})

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write by_length.json, .md and .png; returns the paths."""
        from linearize.evaluation.plots import plot_by_length
        from linearize.files import write_file

        paths = [Path(directory) / f"by_length.{kind}" for kind in ("json", "md", "png")]
        write_file(paths[0], (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        write_file(paths[1], self.markdown().encode())
        plot_by_length(self, paths[2])
        return paths

    def _longest(self, text: str, name: str) -> LengthFigure | None:
        times = max(x.times for x in self.figures if x.text == text)
        return self.figure(text, name, times)

    def _windows(self) -> list[str]:
        sizes = {x.times: (x.window, x.sinks) for x in self.figures if x.window is not None}
        if not sizes:
            return []
        parts = [f"{window:,} tokens and {sinks} sinks" for window, sinks in sizes.values()]
        if len(set(parts)) > 1:
            parts = [f"{part} at {times}x" for part, times in zip(parts, sizes, strict=True)]
        else:
            parts = parts[:1]
        return [f"The plain window of as many bytes as the student's state, bf16, in every layer: {', '.join(parts)}."]

    def _table(self, text: str) -> Table:
        lengths = [times for times in TIMES if any(x.text == text and x.times == times for x in self.figures)]
        parts = [part for part in PARTS if part[1] <= lengths[-1]] if len(lengths) > 1 else []
        header = [""] + [f"{times}x:\n{times * self.trained:,}" for times in lengths]
        header += [f"positions\n{part_label(part)}" for part in parts]
        rows = []
        for name in self.names():
            figures = [self.figure(text, name, times) for times in lengths]
            cells = [name, *(self._cell(figure) for figure in figures)]
            last = self._longest(text, name)
            cells += [format_number(last.parts[i] if last is not None else None) for i in range(len(parts))]
            rows.append(cells)
        tokens = max(x.tokens for x in self.figures if x.text == text)
        title = f"Perplexity by length, trained at {self.trained:,}: {text}, {tokens:,} tokens"
        if any(self.figure(text, self.reference, times) for times in lengths):
            title += f" (in brackets: / {self.reference})"
        return Table(title, header, rows)

    def _cell(self, figure: LengthFigure | None) -> str:
        if figure is None:
            return "-"
        reference = self.figure(figure.text, self.reference, figure.times)
        ratio = f" ({figure.perplexity / reference.perplexity:.3f})" if reference else ""
        return format_number(figure.perplexity) + ratio


def part_label(part: tuple[int, int]) -> str:
    """(2, 4) -> "2x-4x"."""
    return "up to 1x" if part[0] == 0 else f"{part[0]}x-{part[1]}x"


def load_lengths(
    paths: Sequence[str | Path], tokenizer: Any, trained: int, limit: int, *, text_field: str = "text"
) -> list[LengthText]:
    """The start of each file, under the file's name; a folder or pattern stands for its files.

    Args:
        limit: tokens of each to read at most.

    Raises:
        UserError: a file is missing or unreadable, or does not fill one trained length.
    """
    from linearize.data.sequences import load_text_blocks
    from linearize.data.sources import expand

    texts: dict[str, LengthText] = {}
    for file in (file for path in paths for file in expand(path)):
        blocks = load_text_blocks(file, tokenizer, trained, limit + trained, text_field=text_field)
        name = file.name if file.name not in texts else f"{file.name}, {len(texts) + 1}"
        texts[name] = LengthText.of(name, blocks, limit)
    return list(texts.values())


def run_texts(
    settings: Any, data: Any, held_out: Any, tokenizer: Any, device: torch.device, *, trains: bool = True
) -> list[LengthText]:
    """What a run scores by length: the held-out text, and those of other domains; nothing where it is switched off.

    Args:
        settings: a `LengthConfig`. data: a `DataConfig`. held_out: `TokenBlocks`.
        trains: whether the run trains on the dataset.

    Raises:
        UserError: a text is missing or unreadable, part of the training data, or shorter than a training sequence.
    """
    from linearize.data.sequences import refuse_training_files

    limit = default_tokens(device) if settings.length_tokens is None else settings.length_tokens
    if not limit:
        return []
    given = settings.foreign_texts or []
    files = [given] if isinstance(given, str) else given
    if trains and files:
        refuse_training_files(data.dataset, files, "evaluation.foreign_texts")
    foreign = load_lengths(files, tokenizer, data.sequence_length, limit, text_field=data.text_field)
    return [LengthText.of(HELD_OUT, held_out, limit), *foreign]


def default_tokens(device: torch.device) -> int:
    """Tokens of each text to score where nobody says how many."""
    return TOKENS_ON_CPU if device.type == "cpu" else TOKENS


def start_report(texts: Sequence[LengthText], trained: int) -> LengthReport:
    """An empty report, with a sentence for every text that is too short for a length."""
    report = LengthReport(trained, {text.name: len(text.ids) for text in texts})
    for text in texts:
        short = [times for times in TIMES if times * trained > len(text.ids)]
        if not short:
            continue
        lengths = " and ".join(f"{times}x ({times * trained:,} tokens)" for times in short)
        why = f"its whole sequences hold {text.held:,}"
        if text.held > len(text.ids):
            why = f"{len(text.ids):,} tokens of it are read at most"
        report.notes.append(f"{text.name} is not scored at {lengths}: {why}.")
    return report


def measure_row(
    report: LengthReport,
    name: str,
    model: Any,
    arm: str | None,
    texts: Sequence[LengthText],
    *,
    matched: bool = False,
    batch_size: int = 1,
) -> None:
    """Append one arm's figures of every text and length, unless they are there.

    Args:
        model: student, stock model, or peft wrapper of either (adapters count as they are set).
        arm: as in `perplexity`.
        matched: give softmax attention a plain window of as many bytes as the student's state at each length.
        batch_size: longest pieces read together; of shorter ones as many tokens.
    """
    if report.has(name):
        return
    base, trained, found = unwrap(model), report.trained, []
    for text in texts:
        longest = text.longest(trained)
        for times in TIMES:
            length = times * trained
            if longest is None or times > longest or not _reaches(report, base, arm, matched, length, name):
                continue
            window = matched_window(base.config, length) if matched else None
            limits = contextlib.nullcontext() if window is None else plain_window(base, *window)
            together, label = batch_size * longest // times, f"{name}, {text.name}, {times}x"
            pieces = text.pieces(length, longest * trained)
            with limits:
                result = perplexity(model, pieces, arm=arm, batch_size=together, description=label)
            spans = [result.span(start * trained, stop * trained) for start, stop in PARTS if stop <= times]
            parts = [span.perplexity for span in spans if span is not None]
            figures = (result.perplexity, result.nll, result.tokens, result.seconds, parts)
            found.append(LengthFigure(text.name, name, times, *figures, *(window or ())))
    report.figures += found


def measure_controls(
    report: LengthReport, model: Any, texts: Sequence[LengthText], name: str = TEACHER, batch_size: int = 1
) -> None:
    """The yardstick, which is then the reference, and the plain window of as many bytes, on the weights as they are.

    Args:
        model: student or peft wrapper, whose base weights (and active adapters) are the yardstick's.
        name: of the yardstick's row.
    """
    report.reference = name
    measure_row(report, name, model, "teacher", texts, batch_size=batch_size)
    measure_row(report, f"{name}, {MATCHED}", model, "teacher", texts, matched=True, batch_size=batch_size)


def measure_student(
    report: LengthReport, model: Any, texts: Sequence[LengthText], *, arms: bool = True, batch_size: int = 1
) -> None:
    """The student, and with `arms`, where it has them, its branches alone."""
    for arm in arms_of(model):
        if arm == "mixed" or (arms and arm != "teacher"):
            name = ROW_NAMES.get(arm, f"{STUDENT}, {arm} arm alone")
            measure_row(report, name, model, arm, texts, batch_size=batch_size)


def measure_by_length(
    model: Any,
    texts: Sequence[LengthText],
    trained: int,
    *,
    original: Any = None,
    merged: bool = False,
    controls: bool = True,
    batch_size: int = 1,
) -> LengthReport:
    """Measure a model between its controls; arguments as in `evaluate` and `measure_row`."""
    report = start_report(texts, trained)
    if not is_student(model):
        measure_row(report, TEACHER, model, None, texts, batch_size=batch_size)
        return report
    if controls:
        source = model if original is None else original
        name = OWN_WEIGHTS if merged and original is None else TEACHER
        with contextlib.nullcontext() if source is original else adapters_off(model):
            measure_controls(report, source, texts, name, batch_size)
    measure_student(report, model, texts, arms=controls, batch_size=batch_size)
    return report


def _reaches(report: LengthReport, base: Any, arm: str | None, matched: bool, length: int, name: str) -> bool:
    """Whether positions reach so far, else it is noted: no arm goes past learned ones, and softmax attention over all
    tokens not past those that the teacher was made for."""
    learned = getattr(base.config, "learned_positions", False)
    softmax = arm in (None, "teacher") and not matched
    positions = context_tokens(base.config, arm) if learned or softmax else None
    if positions is None or length <= positions:
        return True
    note = f"{name} is not scored at {length:,} tokens: its positions end at {positions:,}."
    if note not in report.notes:
        report.notes.append(note)
    return False
