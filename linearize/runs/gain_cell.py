"""A pretrained model onto gain cells in two trained stages, as Leroux et al. 2025 (arXiv 2409.19315) do it.

    teacher    the yardstick: the softmax teacher trained on the same tokens as both stages
    start      the linear cell, its scalers from the teacher's moments, then attention transfer of the scalers
    linear     stage A: all weights train with the linear cell
    adapted    the nonlinear cell, its scalers solved for until their statistics are stage A's
    refined    the same, the scalers alone trained to give what stage A's model gives
    nonlinear  stage B: all weights train with the nonlinear cell

Each is a directory of the run; one that is there is not made again, so a stopped run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

from linearize.config.pretraining import PretrainingConfig
from linearize.config.settings import AdaptationConfig, DistillationConfig, TransferConfig
from linearize.config.values import convert_fields, require
from linearize.config.yaml_io import resolve
from linearize.errors import UserError
from linearize.failures import stage
from linearize.runs.directory import FINAL
from linearize.runs.staged_run import TEACHER, Curve, StagedDirectory, StagedRun, StagedRunConfig, checkpoints_of

TRAINED = {
    "teacher": TEACHER,
    "linear": "linear cell, after stage A",
    "refined": "nonlinear cell, adapted and refined",
    "nonlinear": "nonlinear cell, after stage B",
}
"""Names of the report's rows, by stage."""


def _transfer() -> TransferConfig:
    return TransferConfig(tokens=262_144, branch="mixed")


@dataclass
class RefinementConfig(PretrainingConfig):
    """Training of the scalers alone, after their statistics match: equal moments are not yet equal outputs."""

    tokens: int = 2_097_152
    tokens_per_step: int = 16_384
    learning_rate: float = 3e-3
    warmup_steps: int = 5
    train: Literal["all", "scalers"] = "scalers"


@dataclass
class GainCellRunConfig(StagedRunConfig):
    """A whole run onto gain cells."""

    preset_folder: ClassVar[str] = "gain_cell"

    model_name_or_path: str = "openai-community/gpt2"
    """The teacher: a Hub id or a local directory."""
    output_dir: str = "out_gain_cell"
    """The run directory: config.yaml, a directory for each stage, plots, report.json and final."""
    attention: dict[str, Any] = field(default_factory=lambda: {"type": "gain_cell"})
    """Settings of gain-cell attention: window, cell, gradient; `cell_kind` is each stage's own."""
    transfer: TransferConfig | None = field(default_factory=_transfer)
    """Attention transfer of the linear cell's scalers before stage A; none leaves it out."""
    linear: PretrainingConfig = field(default_factory=PretrainingConfig)
    """Stage A."""
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    """From the linear to the nonlinear cell."""
    refinement: RefinementConfig | None = field(default_factory=RefinementConfig)
    """After the adaptation, the scalers alone learn from stage A's model; none leaves it out."""
    nonlinear: PretrainingConfig = field(default_factory=PretrainingConfig)
    """Stage B."""
    statistics_sequences: int = 32
    """Training sequences that moments and statistics are taken over."""

    def __post_init__(self) -> None:
        convert_fields(self, "")
        self._check_run()
        require(
            self.attention.get("type", "gain_cell") == "gain_cell",
            f"attention.type is {self.attention.get('type')!r}, but this run trains gain_cell attention.",
        )
        require(
            "cell_kind" not in self.attention,
            "attention.cell_kind is set, but each stage has its own: leave it out.",
        )
        require(
            self.statistics_sequences >= 1,
            f"statistics_sequences is {self.statistics_sequences}, but it must be at least 1.",
        )
        require(
            self.refinement is None or self.refinement.train == "scalers",
            "refinement.train must be scalers: all weights train in the stage after it.",
        )
        require(
            self.transfer is None or self.transfer.branch in (None, "mixed"),
            "transfer.branch must be mixed: gain-cell attention has no branches.",
        )

    def attention_of(self, kind: str) -> dict[str, Any]:
        """The mechanism's settings with this kind of cell."""
        return {**self.attention, "type": "gain_cell", "cell_kind": kind}


class GainCellDirectory(StagedDirectory):
    """The directory of a run onto gain cells."""

    stages = ("teacher", "start", "linear", "adapted", "refined", "nonlinear")
    sections: ClassVar[Mapping[str, str]] = {
        "transfer": "checkpoints/transfer",
        "start": "start/config.json",
        "linear": checkpoints_of("linear"),
        "adaptation": "adapted/config.json",
        "refinement": checkpoints_of("refined"),
        "nonlinear": checkpoints_of("nonlinear"),
    }


def run_gain_cell(config: GainCellRunConfig | Mapping[str, Any] | str | PathLike[str]) -> Path:
    """Run all stages, measure each model on the validation text, and save the last one.

    Args:
        config: Settings, a mapping of them, a YAML file, or the name of a shipped preset.

    Returns:
        The run directory; `final` in it is the converted repository, `report.json` has the figures.

    Raises:
        UserError: Input that the user can mend; what is done stays.
        KeyboardInterrupt: After Ctrl-C in training, with a checkpoint left.
    """
    from linearize.runs.plan import planned_student  # loads models, which the command line's help goes without

    settings = resolve(config, settings=GainCellRunConfig)
    directory = GainCellDirectory(settings)
    directory.check()
    planned_student(settings.model_name_or_path, settings.attention_of("linear"))
    return _Stages(settings, directory).run()


def share_of(train: Any, sequences: int, state: Any) -> list[Any]:
    """This process's part of the first training sequences: the processes together measure on as many as asked for.

    Raises:
        UserError: there are fewer than processes.
    """
    count = min(sequences, len(train))
    if count < state.num_processes:
        raise UserError(
            f"statistics are taken over {count} sequences, but each of the {state.num_processes} processes needs one: "
            "raise statistics_sequences, or give more text."
        )
    return [train[i] for i in range(state.process_index, count, state.num_processes)]


class _Stages(StagedRun):
    """One call of `run_gain_cell`."""

    labels = TRAINED

    def __init__(self, settings: GainCellRunConfig, directory: GainCellDirectory) -> None:
        super().__init__(settings, directory, settings.linear.eval_tokens)
        self.batch_size = settings.adaptation.batch_size
        self.measured_on = share_of(self.train, settings.statistics_sequences, self.state)
        self.adaptation: dict[str, Any] | None = None

    def run(self) -> Path:
        from linearize.conversion.students import load_model

        settings = self.settings
        self._measure("teacher", 0, load_model(settings.model_name_or_path))
        if settings.train_teacher:
            self._train_teacher((settings.linear, settings.refinement, settings.nonlinear))
        self._make_start()
        linear = self._train("linear", self.path / "start", settings.linear)
        adapted = self._adapt(linear)
        if settings.refinement is not None:
            adapted = self._train("refined", adapted, settings.refinement)
        final = self._train("nonlinear", adapted, settings.nonlinear)
        if self.state.is_main_process:
            known = {row.name for row in self.rows}
            last = TRAINED["refined"] if TRAINED["refined"] in known else "nonlinear cell, adapted"
            curves = (
                Curve("linear", "linear cell", "linear cell, before stage A"),
                Curve("nonlinear", "nonlinear cell", last),
                Curve("teacher", "teacher", "teacher"),
            )
            self._finish(final, curves, adaptation=self.adaptation)
        self.state.wait_for_everyone()
        return self.path

    def _make_start(self) -> None:
        """The linear cell with fitted scalers."""
        from linearize.conversion.students import convert, load_student
        from linearize.stages.adaptation import start_from_moments

        start = self.path / "start"
        if (start / "config.json").is_file():
            self._measure("linear cell, before stage A", 0, load_student(start))
            return
        settings = self.settings
        student = convert(settings.model_name_or_path, settings.attention_of("linear"), dtype="float32")
        student.to(self.state.device)
        with stage("fitting the scalers to the teacher's moments"):
            start_from_moments(student, self.measured_on, self.settings.adaptation.batch_size)
        transferred = None
        if settings.transfer is not None:
            from linearize.stages.transfer import transfer_attention

            transferred = transfer_attention(
                student, self.train, settings.transfer, output_dir=self.path, seed=settings.seed,
                resume=settings.resume_from_checkpoint, report_to=settings.report_to,
                device="cpu" if settings.device == "cpu" else None,
            )  # fmt: skip
        self._measure("linear cell, before stage A", 0, student)
        self._save(student, start, transferred=transferred)

    def _distillation(self, name: str) -> DistillationConfig | None:
        """The refinement learns from stage A's model alone."""
        if name == "refined":
            return DistillationConfig(teacher=str(self.path / "linear" / FINAL), labels_weight=0.0)
        return super()._distillation(name)

    def _tokens_before(self, name: str) -> int:
        earlier = {"refined": ("linear",), "nonlinear": ("refined", "linear")}.get(name, ())
        known = {row.name: row.tokens for row in self.rows}
        return next((known[TRAINED[other]] for other in earlier if TRAINED[other] in known), 0)

    def _adapt(self, linear: Path) -> Path:
        """The nonlinear cell with stage A's weights and statistics."""
        from linearize.config.record import read_record
        from linearize.conversion.students import load_student
        from linearize.files import write_file
        from linearize.stages.adaptation import (
            STATISTICS,
            adapt_scalers,
            collect_statistics,
            plot_adaptation,
            statistics_bytes,
        )

        adapted, log = self.path / "adapted", self.path / "logs" / "adaptation.json"
        tokens = self._tokens_before("refined")
        student: Any = load_student(linear, dtype="float32").to(self.state.device)
        with stage("adapting the scalers to the nonlinear cell"):
            size = self.settings.adaptation.batch_size
            targets = collect_statistics(student, self.measured_on, size)
            nonlinear = self._as_nonlinear(student)
            self._measure("nonlinear cell, not adapted", tokens, nonlinear)
            if (adapted / "config.json").is_file():
                nonlinear = load_student(adapted, dtype="float32").to(self.state.device)
                self.adaptation = json.loads(log.read_text(encoding="utf-8"))
            else:
                report = adapt_scalers(nonlinear, targets, self.measured_on, self.settings.adaptation)
                self.adaptation = report.to_dict()
                if self.state.is_main_process:
                    plot_adaptation(report, self.path / "plots" / "adaptation.png")
                    write_file(log, json.dumps(self.adaptation, indent=1).encode())
                files = {STATISTICS: statistics_bytes(targets)}
                self._save(nonlinear, adapted, earlier=read_record(linear), files=files)
        self._measure("nonlinear cell, adapted", tokens, nonlinear)
        return adapted

    def _as_nonlinear(self, student: Any) -> Any:
        """The same weights with the other kind of cell."""
        config = type(student.config).from_dict(student.config.to_dict())
        for settings in config.mixers.values():
            settings["cell_kind"] = "nonlinear"
        config.prepare_mixers()
        other = type(student)(config).to(self.state.device)
        other.load_state_dict(student.state_dict())
        other.generation_config = student.generation_config
        return other.eval()
