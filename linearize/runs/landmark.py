"""A pretrained model onto landmark attention, all weights trained at a short context.

    teacher    the yardstick: the softmax teacher trained on the same tokens
    start      the teacher's weights with landmarks, whose keys are fitted to the teacher's scores, and untrained
    landmark   trained; from the labels, and from the teacher's distribution and hidden states where asked for
    fitted     its keys fitted again, where blocks weigh by their tokens and so nothing else trains the keys

Each is a directory of the run; one that is there is not made again, so a stopped run goes on where it was. With LoRA
in place of all weights: `linearize run llama3_8b_landmark`.

Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), which trains on labels with every block open; the teacher, and
blocks that are left out in training so that retrieval is trained too, and pooled keys with their fit are this
project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

from linearize.config.pretraining import PretrainingConfig
from linearize.config.values import convert_fields, require
from linearize.config.yaml_io import resolve
from linearize.errors import UserError
from linearize.failures import stage
from linearize.runs.staged_run import TEACHER, Curve, StagedDirectory, StagedRun, StagedRunConfig, checkpoints_of

BEFORE, AFTER = "landmark attention, untrained", "landmark attention, trained"
CALIBRATED = "landmark attention, keys fitted"
FITTED = "landmark attention, trained, keys fitted again"


@dataclass
class LandmarkRunConfig(StagedRunConfig):
    """A whole run onto landmark attention."""

    preset_folder: ClassVar[str] = "landmark"

    model_name_or_path: str = "mistralai/Mistral-7B-v0.1"
    """The teacher: a Hub id or a local directory."""
    output_dir: str = "out_landmark"
    """The run directory: config.yaml, a directory for each stage, plots, report.json and final."""
    attention: dict[str, Any] = field(default_factory=lambda: {"type": "landmark"})
    """Settings of landmark attention: block_size, top_k, block_dropout and others."""
    sliding_window: Literal["keep", "lift"] = "lift"
    """What the teacher arm of a Mistral with a sliding window sees; landmark layers never have it."""
    calibration_sequences: int = 64
    """Training sequences that pooled landmark keys are fitted to before anything trains; 0: not fitted."""
    training: PretrainingConfig = field(default_factory=PretrainingConfig)
    """The steps of the landmark model, and of the teacher."""

    def __post_init__(self) -> None:
        convert_fields(self, "")
        self.attention.setdefault("type", "landmark")
        self._check_run()
        self._check_calibration(self.calibration_sequences)
        require(
            self.attention["type"] == "landmark",
            f"attention.type is {self.attention['type']!r}, but this run trains landmark attention.",
        )
        require(
            self.distillation is None or not self.attention.get("include_landmark_in_loss"),
            "attention.include_landmark_in_loss is the published loss, without a teacher: set distillation to none.",
        )


class LandmarkDirectory(StagedDirectory):
    """The directory of a run onto landmark attention."""

    stages = ("teacher", "start", "landmark", "fitted")
    sections: ClassVar[Mapping[str, str]] = {
        "calibration_sequences": "start/config.json",
        "training": checkpoints_of("landmark"),
        "fitted": "fitted/config.json",
    }


def run_landmark(config: LandmarkRunConfig | Mapping[str, Any] | str | PathLike[str]) -> Path:
    """Convert, train, measure each model on the validation text, and save the last one.

    Args:
        config: Settings, a mapping of them, a YAML file, or the name of a shipped preset.

    Returns:
        The run directory; `final` in it is the converted repository, `report.json` has the figures.

    Raises:
        UserError: Input that the user can mend; what is done stays.
        KeyboardInterrupt: After Ctrl-C in training, with a checkpoint left.
    """
    settings = resolve(config, settings=LandmarkRunConfig)
    directory = LandmarkDirectory(settings)
    directory.check()
    _check_model(settings)
    return _Stages(settings, directory).run()


def _check_model(settings: LandmarkRunConfig) -> None:
    """Refuse a teacher that cannot be converted with these settings, before anything is trained."""
    from linearize.runs.plan import planned_student  # loads models, which the command line's help goes without

    source, length = settings.model_name_or_path, settings.data.sequence_length
    config = planned_student(source, settings.attention, settings.sliding_window)
    if config.longest_text is not None and length > config.longest_text:
        raise UserError(
            f"data.sequence_length is {length}, but with its landmarks no text above {config.longest_text} tokens "
            f"fits the {config.max_position_embeddings} positions of {source}: lower it."
        )


class _Stages(StagedRun):
    """One call of `run_landmark`."""

    labels: ClassVar[Mapping[str, str]] = {"teacher": TEACHER, "landmark": AFTER}

    def __init__(self, settings: LandmarkRunConfig, directory: LandmarkDirectory) -> None:
        super().__init__(settings, directory, settings.training.eval_tokens)

    def run(self) -> Path:
        from linearize.conversion.students import load_model

        settings = self.settings
        self._measure("teacher", 0, load_model(settings.model_name_or_path))
        if settings.train_teacher:
            self._train_teacher((settings.training,))
        final = self._fit_again(self._train("landmark", self._make_start(), settings.training))
        if self.state.is_main_process:
            first = CALIBRATED if any(row.name == CALIBRATED for row in self.rows) else BEFORE
            curves = (Curve("landmark", "landmark attention", first), Curve("teacher", "teacher", "teacher"))
            self._finish(final, curves)
        self.state.wait_for_everyone()
        return self.path

    def _make_start(self) -> Path:
        from linearize.config.record import read_record
        from linearize.conversion.students import convert, load_student

        start, settings = self.path / "start", self.settings
        if (start / "config.json").is_file():
            fitted = read_record(start).get("calibration")
            self._measure(CALIBRATED if fitted else BEFORE, 0, load_student(start))
            return start
        student = convert(
            settings.model_name_or_path, settings.attention, dtype="float32", sliding_window=settings.sliding_window
        )
        self._measure(BEFORE, 0, student)
        calibration = self._calibrate(student, CALIBRATED, 0)
        self._save(student, start, calibration=calibration)
        return start

    def _fit_again(self, trained: Path) -> Path:
        """The trained model with keys fitted to its new scores, where training leaves them as they are."""
        from linearize.config.record import read_record
        from linearize.conversion.students import load_student
        from linearize.stages.calibration import calibrates

        fitted, tokens = self.path / "fitted", self._tokens_of(self.settings.training)
        if (fitted / "config.json").is_file():
            self._measure(FITTED, tokens, load_student(fitted))
            return fitted
        student: Any = load_student(trained)
        apart = student.config.mixer(0).block_weight == "tokens"
        if not apart or not self.settings.calibration_sequences or not calibrates(student.config):
            return trained
        calibration = self._calibrate(student, FITTED, tokens)
        self._save(student, fitted, earlier=read_record(trained), calibration=calibration)
        return fitted

    def _calibrate(self, student: Any, name: str, tokens: int) -> dict[str, Any] | None:
        """Fit pooled keys, and measure the model under a name; what the record says of it."""
        from linearize.stages.calibration import calibrate, calibrates, save_calibration

        sequences = self.settings.calibration_sequences
        if not sequences or not calibrates(student.config):
            return None
        with stage("calibration", f"lower data.sequence_length (now {self.settings.data.sequence_length})"):
            report = calibrate(student.to(self.state.device), self.train, sequences)
        if self.state.is_main_process:
            save_calibration(report, self.path)
            print(report.sentence(), flush=True)
        self._measure(name, tokens, student)
        return report.summary()
