"""Numbers of the mechanism fitted to the teacher, without gradients."""

from __future__ import annotations

from typing import Any

from linearize.config.settings import CalibrationConfig
from linearize.stages.kinds.base import Context, Outcome, Stage, StagePlan, Start


class Calibrate(Stage):
    """Fits a mechanism's own numbers on a few sequences: cosine, landmark and gain-cell attention have them."""

    settings = CalibrationConfig
    title = "calibration"
    keeps = False

    values: CalibrationConfig

    def applies(self, start: Start) -> bool:
        """Whether the mechanism has a calibration; of a converted model, whether nothing has fitted or trained it."""
        from linearize.config.record import read_record
        from linearize.stages.calibration import calibrates

        if not any(calibrates(settings) for settings in start.mechanisms):
            return False
        config = start.config
        if not start.converted or next(iter(config.stages)) != self.name:
            return True
        record = read_record(config.model_name_or_path, revision=config.revision)
        untouched = record and not record.get("calibration") and not any((record.get("tokens") or {}).values())
        return bool(untouched) and not (record.get("recipe") or {}).get("imported")

    def plan(self, start: Start) -> StagePlan:
        """Sequences in place of steps."""
        return StagePlan(self.name, self.values, note=f"{self.values.sequences:,} sequences, no gradients")

    def advice(self, sequence_length: int) -> str:
        """Fewer rows at once, or less of everything."""
        return (
            f"lower {self.name}.batch_size (now {self.values.batch_size}), or set load_in_4bit, and resume; or leave "
            f"the stage out in a new run (--{self.name} none)"
        )

    def run(self, model: Any, context: Context) -> Outcome:
        """Fit the layers in place."""
        from linearize.stages.calibration import calibrate, save_calibration

        report = calibrate(
            model.to(context.state.device), context.train, self.values.sequences, self.values.batch_size
        )
        if report is None:
            return Outcome(model)
        if context.state.is_main_process:
            save_calibration(report, context.path, self.name)
            print(report.sentence(), flush=True)
        return Outcome(model, record={"calibration": report.summary()})
