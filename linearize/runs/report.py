"""What a run measures and when: teacher and control before training, the student after each stage, its arms last.

The rows are kept in `logs/evaluation.json` as they come, so that a resumed run has those that can no longer be
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Subset

from linearize.config.evaluation import EvaluationConfig
from linearize.conversion.quantization import is_quantized
from linearize.evaluation import by_length
from linearize.evaluation.arms import has_branches, is_student
from linearize.evaluation.report import (
    CONVERTED,
    LINEAR_ARM,
    OWN_WEIGHTS,
    SHARE_TOKENS,
    SOFTMAX_ARM,
    STUDENT,
    TEACHER,
    Report,
    control_name,
    linear_index,
    window_reach,
)
from linearize.hardware.memory import Forecast, format_bytes

if TYPE_CHECKING:
    from linearize.evaluation import TaskReport

MODEL = "model"
"""A stock one that was trained."""
FINISHED = (STUDENT, SOFTMAX_ARM, LINEAR_ARM, MODEL)
"""Rows of the finished model."""
QUANTIZED = (
    "All rows above the student's were measured on the quantised base, the student and its arms on full weights."
)
ALL_QUANTIZED = "All rows were measured on quantised weights: the full ones do not fit on this device."


class RunReport:
    """The measurements of one run."""

    def __init__(
        self,
        config: EvaluationConfig,
        blocks: Any,
        path: Path,
        *,
        keep: bool,
        ended: bool = False,
        texts: Sequence[by_length.LengthText] = (),
        trained: int = 0,
    ) -> None:
        """Start a report, or go on with the one that an interrupted run left.

        Args:
            config: What to measure.
            blocks: Held-out sequences.
            path: Where the rows are kept.
            keep: Whether rows that lie there belong to this run.
            ended: Whether those of a finished student do too; else it was one of fewer steps.
            texts: To score by length; none: no figures by length.
            trained: Tokens of a training sequence.
        """
        self.config, self.path = config, path
        self.blocks = Subset(blocks, range(min(len(blocks), max(1, config.max_tokens // blocks.sequence_length))))
        self.report = Report.from_json(path.read_text(encoding="utf-8")) if keep and path.is_file() else Report()
        self.texts = texts
        fresh = by_length.start_report(texts, trained) if texts else None
        kept = self.report.by_length
        if fresh is None or kept is None or kept.read != fresh.read:  # what a resumed run scores may be other text
            self.report.by_length = kept = fresh
        if not ended:
            self.report.rows = [row for row in self.report.rows if row.name not in FINISHED]
            if kept is not None:
                kept.figures = [x for x in kept.figures if x.name != STUDENT and not x.name.startswith(f"{STUDENT}, ")]

    def measure(self, name: str, model: Any, arm: str | None) -> None:
        """Append the perplexity of one arm, unless it is there."""
        from linearize.evaluation import perplexity

        if self.report.row(name) is None:
            self.report.add(name, perplexity(model, self.blocks, arm=arm, batch_size=self.config.batch_size))
            self.keep()

    def measure_lengths(self, measure: Callable[..., None], model: Any, **options: Any) -> None:
        """Append rows by length, unless they are there.

        Args:
            measure: `by_length.measure_controls` or `measure_student`.
        """
        if self.report.by_length is not None:
            measure(self.report.by_length, model, self.texts, batch_size=self.config.batch_size, **options)
            self.keep()

    def keep(self) -> None:
        """Write what has been measured."""
        from linearize.files import write_file

        write_file(self.path, self.report.to_json().encode("utf-8"))

    def before_training(self, model: Any, *, base_is_teacher: bool, yardstick: bool) -> None:
        """Measure the references on the student before anything trains; a stock model has none.

        Args:
            model: The untrained student, whose base weights are the teacher's.
            base_is_teacher: False for a model that was finetuned before: its own weights are then the reference, and
                there is no control.
            yardstick: Whether the student is compared by length with a teacher that was trained.
        """
        if not is_student(model):
            return
        self.report.reach = window_reach(model)
        self.report.reference = TEACHER if base_is_teacher else OWN_WEIGHTS
        if self.config.controls:
            if is_quantized(model) and QUANTIZED not in self.report.notes:
                self.report.notes.append(QUANTIZED)
            self.measure(self.report.reference, model, "teacher")
            if base_is_teacher and has_branches(model):
                self.report.control = control_name(model)
                self.measure(self.report.control, model, "softmax")
            self.measure(CONVERTED, model, "mixed")
            if not yardstick:
                self.measure_lengths(by_length.measure_controls, model, name=self.report.reference)

    def after_stage(self, name: str, model: Any) -> None:
        """Measure the student between the stages.

        Args:
            name: What the stage is called.
        """
        if self.config.controls:
            self.measure(after(name), model, _arm(model, "mixed"))

    def after_yardstick(self, model: Any, how: str) -> None:
        """Measure the softmax teacher after training of its own.

        Args:
            model: A student whose teacher's arm it is.
            how: It was trained.
        """
        name = f"{self.report.reference}{how}"
        self.measure(name, model, "teacher")
        self.measure_lengths(by_length.measure_controls, model, name=name)

    def finish(self, model: Any) -> Report:
        """Measure the finished student, and where it has branches their arms and the linear branch's share."""
        from linearize.evaluation import linear_share, state_bytes

        report = self.report
        if is_quantized(model):
            report.notes = [ALL_QUANTIZED if note == QUANTIZED else note for note in report.notes]
        self.measure(STUDENT if is_student(model) else MODEL, model, _arm(model, "mixed"))
        if not is_student(model):
            return report
        if self.config.controls and has_branches(model):
            self.measure(SOFTMAX_ARM, model, "softmax")
            self.measure(LINEAR_ARM, model, "linear")
            rows = [report.row(name) for name in (report.reference, STUDENT, SOFTMAX_ARM)]
            if all(rows):
                report.linear_index = linear_index(*(row.nll for row in rows if row))
            report.share = linear_share(model, self.blocks, batch_size=self.config.batch_size, max_tokens=SHARE_TOKENS)
        report.state = state_bytes(model.config)
        self.measure_lengths(by_length.measure_student, model, arms=self.config.controls)
        self.keep()
        return report


def after(stage: str) -> str:
    """The row of the student after a stage."""
    return f"student after {stage}"


def _arm(model: Any, arm: str) -> str | None:
    """The arm of a student; a stock model has none."""
    return arm if is_student(model) else None


def run_tasks_of(settings: EvaluationConfig, model: Any, tokenizer: Any, directory: Path) -> TaskReport:
    """The lm-eval tasks that a run asks for, shown and kept in its logs."""
    from linearize.evaluation import run_tasks

    tasks = run_tasks(
        model,
        tokenizer,
        settings.tasks,
        include_path=settings.include_path,
        limit=settings.limit,
        batch_size=settings.batch_size,
        output_path=directory / "logs" / "tasks.json",
    )
    tasks.show()
    return tasks


def stage_line(name: str, outcome: Any, forecast: Forecast | None) -> str:
    """One line after a stage: tokens, seconds, and the memory against its forecast."""
    line = f"{name}: {outcome.steps:,} steps, {outcome.tokens:,} tokens, {outcome.seconds:.0f} s"
    if outcome.peak_memory_bytes is not None:
        expected = f" ({format_bytes(forecast.total)} expected)" if forecast else ""
        line += f", peak memory {format_bytes(outcome.peak_memory_bytes)}{expected}"
    return line
