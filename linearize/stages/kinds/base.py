"""What every kind of stage is: its settings, what is checked and planned before anything is loaded, and its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from linearize.config.settings import StepPlan
    from linearize.hardware.memory import Forecast
    from linearize.hardware.shape import Shape


@dataclass(frozen=True)
class Start:
    """What a run starts from, as far as configs tell, before text and weights."""

    config: Any
    """The run's settings, complete."""
    model: Any
    """Config of the model that the run starts from; of random weights their own."""
    student: Any
    """Config of the student; the model's own where it is not converted here."""
    converted: bool
    """Whether the model is a converted one already."""
    encoder: bool
    num_processes: int
    shape: Shape
    mechanisms: list[dict[str, Any]]
    """Settings of every mechanism that the student has."""
    arms: tuple[str, ...]
    """Of its attention, for attention transfer."""
    mixer_parameters: int
    """Of the mechanism, in all converted layers."""
    forecast_settings: Any
    """The run's settings as if all layers had the widest window, for the forecast of memory."""
    forecasts: bool
    """Whether there are forecasts for the mechanism."""
    fused: bool
    """Whether its kernels run fused here."""


@dataclass(frozen=True)
class StagePlan:
    """One stage before it starts: its steps, what it trains and what memory it should take."""

    name: str
    settings: Any
    steps: StepPlan | None = None
    """None of a stage without steps."""
    trained: dict[str, int] = field(default_factory=dict)
    """What trains -> parameters."""
    forecast: Forecast | None = None
    """Expected memory; None where there is no forecast."""
    least: dict[str, int] = field(default_factory=dict)
    """What is held all the time, bytes by part, where activations are not forecast."""
    note: str = ""
    """What there is to say beside."""

    @property
    def tokens(self) -> int:
        """Tokens of the stage over all processes."""
        return 0 if self.steps is None else self.steps.steps * self.steps.tokens_per_step


@dataclass
class Context:
    """What the engine gives a stage."""

    config: Any
    """The run's settings."""
    path: Path
    """The run directory."""
    state: Any
    """accelerate's `PartialState`."""
    tokenizer: Any
    train: Any
    """Training sequences (rows of an encoder)."""
    validation: Any
    encoder: bool
    load_teacher: Callable[[str], Any]
    """The frozen model that a stage's `teacher` names."""
    save: Callable[[Any], tuple[str, str | None]]
    """Leaves the repository of the stages before, which an adapter belongs on; its path or Hub id, and revision."""
    measure: Callable[[str, Any], None]
    """Adds a model to the report under a name."""
    arm: Literal["mixed", "teacher"] = "mixed"
    """What trains: the student, or, of the yardstick, its teacher's arm."""

    def options(self) -> dict[str, Any]:
        """What every training takes from the run."""
        return {
            "output_dir": self.path,
            "seed": self.config.seed,
            "resume": self.config.resume_from_checkpoint,
            "report_to": self.config.report_to,
            "device": self.config.device if self.config.device == "cpu" else None,
        }


@dataclass
class Outcome:
    """What a stage leaves."""

    model: Any = field(repr=False)
    """The model after it, plain."""
    steps: int = 0
    """Optimiser steps of the whole stage, those before a resume included."""
    tokens: int = 0
    """Tokens of the whole stage, over all processes."""
    seconds: float = 0.0
    """Of this call."""
    peak_memory_bytes: int | None = None
    """Of this process's GPU; None on a CPU."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What the report has of the stage beside."""
    record: dict[str, Any] = field(default_factory=dict)
    """What it adds to the record of the model."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Files of the repository that it leaves, by name."""


class Stage:
    """One stage of a run.

    Args:
        name: Unique in the run.
        values: Its settings.
    """

    settings: ClassVar[Any]
    """Dataclass of its settings."""
    title: ClassVar[str] = ""
    """What reports call it; empty: by its name."""
    trained: ClassVar[str] = "nothing"
    """What trains, for the record: nothing, mechanism, lora or all."""
    trains: ClassVar[bool] = False
    """Whether it has steps, and so a length."""
    keeps: ClassVar[bool] = True
    """Whether what it leaves is saved for the next stage, and a resumed run goes on from there."""

    def __init__(self, name: str, values: Any) -> None:
        self.name, self.values = name, values

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.title or self.name

    @property
    def what(self) -> str:
        """What trains, of these settings."""
        return self.trained

    def check(self, start: Start) -> None:
        """Refuse settings that do not fit the run, before text and weights.

        Raises:
            UserError: One sentence.
        """

    def applies(self, start: Start) -> bool:
        """Whether there is anything to do for it."""
        return True

    def plan(self, start: Start) -> StagePlan:
        """Its steps, what it trains and its memory."""
        return StagePlan(self.name, self.values)

    def advice(self, sequence_length: int) -> str:
        """What to lower where memory ends."""
        return ""

    def trial(self, model: Any, start: Start) -> float | None:
        """Seconds of one micro-batch on this machine, measured; None of a stage without steps. The weights stay."""
        return None

    def run(self, model: Any, context: Context) -> Outcome:
        """Do it.

        Args:
            model: The student after the stages before; it may be used up.
        """
        raise NotImplementedError
