"""How long a run will take on this machine, how often it reads its text, and what it writes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.failures import stage
from linearize.hardware.memory import format_bytes

if TYPE_CHECKING:
    from linearize.runs.plan import RunPlan
    from linearize.stages.kinds.base import Stage

HOUR = 3600
MANY_EPOCHS = 20
"""From so many readings of the same text on a plan says so."""


@dataclass
class RunForecast:
    """What a plan shows beside steps and memory."""

    tokens: int | None = None
    """Of the training text; None: not known before it is fetched."""
    exact: bool = False
    """Whether they are counted rather than estimated from a part of the text."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> what is left of it, from a measured micro-batch."""
    disk: int = 0
    """Bytes that the run's repositories and checkpoints take."""
    free: int | None = None
    """Bytes that are free there."""

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def headline(self) -> str:
        """The first line of a run."""
        if not self.seconds:
            return ""
        much = "More than an hour: about" if self.total > HOUR else "About"
        return f"{much} {duration(self.total)} of training on this machine, by a measured micro-batch of each stage."

    def epochs(self, tokens: int) -> float | None:
        """How often a stage of so many tokens reads the text."""
        return None if not self.tokens else tokens / self.tokens

    def rows(self) -> list[list[str]]:
        """What the plan's first table has of it."""
        rows = []
        if self.tokens is not None:
            rows.append(["training text", f"{'' if self.exact else 'about '}{self.tokens:,} tokens"])
        if self.disk:
            free = "" if self.free is None else f", {format_bytes(self.free)} are free"
            rows.append(["disk", f"{format_bytes(self.disk)}{free}"])
        return rows

    def notes(self, plans: list[Any]) -> list[str]:
        """Sentences about what a person may not want."""
        notes = []
        for plan in plans:
            epochs = self.epochs(plan.tokens)
            if epochs is not None and epochs > MANY_EPOCHS:
                notes.append(
                    f"Stage {plan.name} reads the text {epochs:,.0f} times: give more text, or fewer tokens "
                    f"({plan.name}.tokens)."
                )
        if self.free is not None and self.disk > self.free:
            notes.append(
                f"The run writes about {format_bytes(self.disk)}, and {format_bytes(self.free)} are free: make room, "
                "or lower save_total_limit."
            )
        return notes


def duration(seconds: float) -> str:
    """As a person says it: `40 s`, `12 min`, `3 h 20 min`, `2 days 5 h`."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"


def time_stages(
    plan: RunPlan, model: Any, directory: Path, done: int, yardstick: Stage | None = None
) -> dict[str, float]:
    """Stage -> seconds of what is left of it, from a measured micro-batch.

    Args:
        model: As the run starts; its weights stay.
        directory: The run's, whose checkpoints say how far a stage is.
        done: Stages that are over.
        yardstick: The stage that trains the teacher, if it is still to come.

    Raises:
        UserError: Memory ends, with what to lower.
    """
    from linearize.training.checkpointing import step_directories

    found = {}
    for place, current in enumerate(plan.stages):
        steps = plan.plans[place].steps
        if place < done or steps is None:
            continue
        title = f"a trial of {current.name}"
        with stage(title, current.advice(plan.config.data.sequence_length)):
            seconds = current.trial(model, plan.start)
        there = step_directories(directory / "checkpoints" / current.name)
        left = steps.steps - (int(there[-1].name.rpartition("-")[2]) if there else 0)
        if seconds is not None:
            found[current.name] = seconds * steps.accumulation * max(left, 0)
    if yardstick is not None:
        planned = yardstick.plan(plan.start).steps
        with stage("a trial of the yardstick"), model.use_arm("teacher"):
            seconds = yardstick.trial(model, plan.start)
        if seconds is not None and planned is not None:
            found[yardstick.name] = seconds * planned.accumulation * planned.steps
    return found


def disk_bytes(plan: RunPlan) -> int:
    """Bytes of the repositories and checkpoints that a run leaves at most at one time."""
    from linearize.hardware.memory import BYTES
    from linearize.hardware.memory_full import parameter_count

    parameters = parameter_count(plan.start.student)
    repository = BYTES[plan.config.dtype] * parameters
    kept = [current for current in plan.stages[:-1] if current.keeps]
    total = repository * (len(kept) + 1)
    for current, planned in zip(plan.stages, plan.plans, strict=True):
        trained = 4 * sum(planned.trained.values())
        total += 3 * trained * getattr(current.values, "save_total_limit", 0)  # weights and two moments
    return int(total)


def free_bytes(directory: Path) -> int | None:
    """Bytes that are free where a run's directory is or will be."""
    place = next((path for path in (directory, *directory.absolute().parents) if path.exists()), None)
    return None if place is None else shutil.disk_usage(place).free
