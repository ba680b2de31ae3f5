"""The evaluation of a converted model: its arms against the teacher and the training-free control, in one report.

That removing the linear branch hurts proves little by itself, so the report always carries the control (the softmax
window and sinks without any training), the linear arm alone, and the linear branch's share of the output. A
mechanism without branches has none of these: its report holds the teacher and the student.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.errors import UserError
from linearize.evaluation.arms import (
    CONVERTED,
    LINEAR_ARM,
    OWN_WEIGHTS,
    SOFTMAX_ARM,
    STUDENT,
    TEACHER,
    adapters_off,
    has_branches,
    is_student,
    unwrap,
)
from linearize.evaluation.by_length import LengthReport
from linearize.evaluation.generation import Speed, measure_speed
from linearize.evaluation.next_token import PerplexityResult, perplexity
from linearize.evaluation.share import LinearShare, linear_share
from linearize.hardware.state_bytes import StateBytes, state_bytes, state_table
from linearize.tables import Table, format_number, markdown_tables, show_tables

MERGED_NOTE = (
    "These weights were trained or have LoRA merged, so the teacher cannot be measured on them: the reference is the "
    "same weights with softmax attention. Give the teacher to compare with it."
)
MERGED_BRANCHES_NOTE = (
    "These weights were trained or have LoRA merged, so neither the teacher nor the training-free control can be "
    "measured on them: the reference is the same weights with softmax attention. Give the teacher to compare with it."
)
UNTOUCHED_NOTE = (
    "Without LoRA the softmax arm is the control, by construction: the softmax branch has no trained parameters."
)
SHARE_TOKENS = 4096  # the share is a mean over tokens, heads and layers: a few thousand tokens settle it


@dataclasses.dataclass
class Row:
    """One measured perplexity: over all scored tokens, and over those inside and past the window's reach."""

    name: str
    perplexity: float
    nll: float
    tokens: int
    inside: float | None
    past: float | None
    seconds: float


@dataclasses.dataclass
class Report:
    """Everything that the evaluation found; a plain value that prints, saves as JSON and comes back from it.

    Fields: rows in the order measured; reference and control, names of the rows that the others are compared with;
    reach, window + sinks in tokens (the largest of the layers): from there on the linear branch has keys; None without
    branches;
    linear_index, see the function; state, bytes per sequence; speed, by row name; seconds, by stage; samples, texts by
    name; notes, sentences for the reader; by_length, perplexity at and past the trained length.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    reference: str = TEACHER
    control: str | None = None
    reach: int | None = None
    share: LinearShare | None = None
    linear_index: float | None = None
    state: list[StateBytes] = dataclasses.field(default_factory=list)
    speed: dict[str, Speed] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    samples: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    by_length: LengthReport | None = None

    def add(self, name: str, result: PerplexityResult) -> Row:
        """Append a measured row."""
        inside, past = (result.span(0, self.reach), result.span(self.reach)) if self.reach else (None, None)
        row = Row(
            name,
            result.perplexity,
            result.nll,
            result.tokens,
            inside.perplexity if inside else None,
            past.perplexity if past else None,
            result.seconds,
        )
        self.rows.append(row)
        return row

    def row(self, name: str | None) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def nll(self, name: str) -> float:
        """Nats per token of a row that is there."""
        row = self.row(name)
        if row is None:
            raise KeyError(name)
        return row.nll

    def tables(self) -> list[Table]:
        tables = [self._perplexity_table()] if self.rows else []
        if self.by_length is not None:
            tables += self.by_length.tables()
        if self.share is not None:
            tables.append(self._share_table())
        if self.state:
            tables.append(state_table(self.state))
        if self.speed:
            rows = [[name, format_number(s.prefill), format_number(s.decode)] for name, s in self.speed.items()]
            tables.append(
                Table("Speed on this machine, one sequence", ["", "prefill tokens/s", "decode tokens/s"], rows)
            )
        if self.seconds:
            rows = [[name, f"{seconds:.0f}"] for name, seconds in self.seconds.items()]
            tables.append(Table("Time", ["", "seconds"], rows))
        if self.samples:
            rows = [[name, text.strip()] for name, text in self.samples.items()]
            tables.append(Table("Sample", ["", "text"], rows, text=True))
        return tables

    def show(self, console: Any = None) -> None:
        """Print the tables in the terminal."""
        show_tables(self.tables(), self.sentences(), console)

    def markdown(self, heading: str = "###") -> str:
        """The tables for a model card."""
        return markdown_tables(self.tables(), self.sentences(), heading)

    def sentences(self) -> list[str]:
        """What stands below the tables: whether the student is worse than its own window first, then the notes."""
        return self.notes if self.by_length is None else [*self.by_length.sentences(), *self.notes]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        values = dict(values)
        values["rows"] = [Row(**row) for row in values["rows"]]
        values["state"] = [StateBytes(**figures) for figures in values["state"]]
        values["speed"] = {name: Speed(**speed) for name, speed in values["speed"].items()}
        if values["share"] is not None:
            per_layer = {int(layer): share for layer, share in values["share"]["per_layer"].items()}
            values["share"] = LinearShare(**{**values["share"], "per_layer": per_layer})
        if values.get("by_length") is not None:
            values["by_length"] = LengthReport.from_dict(values["by_length"])
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        return cls.from_dict(json.loads(text))

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write evaluation.json, evaluation.md and, where there is something to draw, the plots; returns the paths."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "evaluation.json", folder / "evaluation.md"]
        paths[0].write_text(self.to_json() + "\n")
        paths[1].write_text(self.markdown())
        return paths + self.draw(folder)

    def draw(self, folder: Path) -> list[Path]:
        """Write the plots of what there is; returns the paths."""
        from linearize.evaluation.plots import plot_arms, plot_by_length, plot_linear_share

        paths = []
        if self.rows:
            paths.append(folder / "evaluation_arms.png")
            values = {row.name: row.perplexity for row in self.rows}
            untrained = [name for name in (self.reference, self.control, CONVERTED) if name is not None]
            plot_arms(values, paths[-1], reference=self.reference, untrained=untrained)
        if self.by_length is not None and self.by_length.figures:
            paths.append(folder / "evaluation_by_length.png")
            plot_by_length(self.by_length, paths[-1])
        if self.share is not None and self.share.per_layer:
            paths.append(folder / "evaluation_linear_share.png")
            plot_linear_share(self.share.per_layer, paths[-1], mean=self.share.mean)
        return paths

    def _perplexity_table(self) -> Table:
        reference, control = self.row(self.reference), self.row(self.control)
        header = ["", "perplexity", *([f"/ {self.reference}"] if reference else [])]
        header += ["/ control"] if control else []
        header += [f"first {self.reach}\ntokens", "after\nthem"] if self.reach else []
        rows = []
        for row in self.rows:
            cells = [row.name, format_number(row.perplexity)]
            cells += [f"{row.perplexity / reference.perplexity:.3f}"] if reference else []
            cells += [f"{row.perplexity / control.perplexity:.3f}"] if control else []
            cells += [format_number(row.inside), format_number(row.past)] if self.reach else []
            rows.append(cells)
        tokens = f" over {self.rows[0].tokens:,} tokens" if self.rows else ""
        return Table(f"Held-out perplexity{tokens}", header, rows)

    def _share_table(self) -> Table:
        assert self.share is not None
        layers = self.share.per_layer
        rows = [["share of the output, mean over heads and layers", f"{self.share.mean:.3f}"]]
        if layers:
            low, high = min(layers, key=layers.__getitem__), max(layers, key=layers.__getitem__)
            rows.append([f"least, layer {low}; most, layer {high}", f"{layers[low]:.3f}; {layers[high]:.3f}"])
        if self.linear_index is not None:
            index = f"index: (student - softmax arm) / ({self.reference} - softmax arm), in log-perplexity"
            rows.append([index, format_number(self.linear_index, 3)])
        return Table(f"The linear branch, on {self.share.tokens:,} tokens past the window", ["", "value"], rows)


def linear_index(teacher_nll: float, mixed_nll: float, softmax_nll: float) -> float | None:
    """Part of the gap between the softmax arm and the teacher that the linear branch closes, in log-perplexity.

    0: the branch does nothing; 1: it closes the gap. None where the softmax arm is no worse than the teacher: there
    is no gap then, which finetuning alone can bring about.
    """
    gap = softmax_nll - teacher_nll
    return (softmax_nll - mixed_nll) / gap if gap > 0 else None


def window_reach(model: Any) -> int | None:
    """Largest window + sinks of the converted layers, before which the linear branch is empty; None without any."""
    if not has_branches(model):
        return None
    config = unwrap(model).config
    mixers = [config.mixer(i) for i in range(config.num_hidden_layers)]
    return max((mixer.window + mixer.sinks for mixer in mixers if mixer is not None), default=None)


def control_name(model: Any) -> str:
    """Name of the control's row of a model with branches: its window and sinks (each once where layers differ)."""
    config = unwrap(model).config
    mixers = [config.mixer(i) for i in range(config.num_hidden_layers)]
    sizes = sorted({(mixer.window, mixer.sinks) for mixer in mixers if mixer is not None})
    return "control: softmax window " + ", ".join(f"{w} + {s} sinks" for w, s in sizes) + ", no training"


def evaluate(
    model: Any,
    blocks: Any,
    *,
    original: Any = None,
    merged: bool = False,
    yardsticks: Mapping[str, PerplexityResult] | None = None,
    controls: bool = True,
    batch_size: int = 1,
    share_tokens: int = SHARE_TOKENS,
    speed: bool = False,
) -> Report:
    """Measure a student's arms, its teacher, and the control on the same blocks.

    Teacher and control come from the student itself where its base weights are the teacher's: its teacher and softmax
    arms with the adapters off (the softmax branch has no parameters of its own, so an untrained student's softmax arm
    is the training-free window). Once LoRA is merged, or they were trained, the base weights are others, and both need
    `original`. Control, single arms and linear share are those of a mechanism with branches; other mechanisms have no
    such rows.

    Args:
        model: student, peft-wrapped student, or stock model (which gets its perplexity and nothing else).
        blocks: held-out `TokenBlocks`, no padding.
        original: an untrained student of the same teacher and settings (`linearize.convert`), for merged students.
        merged: the base weights of `model` are no longer the teacher's.
        yardsticks: further rows, already measured (the teacher after the same LoRA steps).
        controls: False leaves out teacher, control and the single arms.
        batch_size: blocks per forward pass.
        share_tokens: tokens on which the linear share is measured; 0 leaves it out.
        speed: also time prefill and decode of teacher and student.
    """
    report = Report(reach=window_reach(model))
    if not is_student(model):
        report.add(TEACHER, perplexity(model, blocks, arm=None, batch_size=batch_size))
        return report
    if original is not None and not is_student(original):
        raise UserError(
            "The original must be an untrained student, linearize.convert(teacher, attention): a stock model "
            "has none of its arms."
        )
    arms = _Arms(report, model, blocks, original, own_weights=merged and original is None, batch_size=batch_size)
    arms.measure_references(controls=controls, speed=speed)
    for name, result in (yardsticks or {}).items():
        report.add(name, result)
    arms.measure(STUDENT, model, "mixed")
    if controls:
        arms.measure_controls()
    if share_tokens and arms.branches:
        report.share = linear_share(model, blocks, batch_size=batch_size, max_tokens=share_tokens)
    if speed:
        report.speed[STUDENT] = measure_speed(model)
    report.state = state_bytes(unwrap(model).config)
    return report


@dataclasses.dataclass
class _Arms:
    """The arms of a student, and of what it is compared with; arguments as in `evaluate`."""

    report: Report
    model: Any
    blocks: Any
    original: Any
    own_weights: bool
    """Whether the reference is the student's own weights with softmax attention: the teacher's are not at hand."""
    batch_size: int

    @property
    def source(self) -> Any:
        """What gives the rows of teacher and control."""
        return self.model if self.original is None else self.original

    @property
    def branches(self) -> bool:
        """Whether there are single arms."""
        return has_branches(self.model)

    def measure(self, name: str, model: Any, arm: str) -> None:
        """Add a row."""
        found = perplexity(model, self.blocks, arm=arm, batch_size=self.batch_size, description=name)
        self.report.add(name, found)

    def measure_references(self, *, controls: bool, speed: bool) -> None:
        """The teacher's row and the control's, and the teacher's speed, without adapters."""
        report, source = self.report, self.source
        report.reference = OWN_WEIGHTS if self.own_weights else TEACHER
        with contextlib.nullcontext() if source is self.original else adapters_off(self.model):
            if controls:
                self.measure(report.reference, source, "teacher")
            if controls and self.branches and not self.own_weights:
                report.control = control_name(self.model)
                self.measure(report.control, source, "softmax")
            if speed:
                report.speed[report.reference] = measure_speed(source, arm="teacher")

    def measure_controls(self) -> None:
        """The student's single arms, and what a reader must know of the rows that stand for the teacher's."""
        report, model = self.report, self.model
        if self.branches:
            control = report.row(report.control)
            if control is not None and self.source is model and unwrap(model) is model:
                report.rows.append(dataclasses.replace(control, name=SOFTMAX_ARM, seconds=0.0))
                report.notes.append(UNTOUCHED_NOTE)
            else:
                self.measure(SOFTMAX_ARM, model, "softmax")
            self.measure(LINEAR_ARM, model, "linear")
            names = (report.reference, STUDENT, SOFTMAX_ARM)
            report.linear_index = linear_index(*(report.nll(name) for name in names))
        if self.own_weights:
            report.notes.append(MERGED_BRANCHES_NOTE if self.branches else MERGED_NOTE)
