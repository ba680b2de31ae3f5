"""From one gain cell to another, by statistics: the scalers alone change, without gradients."""

from __future__ import annotations

import json
from typing import Any

from linearize.config.settings import AdaptationConfig
from linearize.errors import UserError
from linearize.stages.kinds.base import Context, Outcome, Stage, StagePlan, Start


class Adapt(Stage):
    """Changes settings of the mechanism, and solves for its scalers until their statistics are those of before."""

    settings = AdaptationConfig

    values: AdaptationConfig

    def check(self, start: Start) -> None:
        """Gain cells only: the other mechanisms have no scalers."""
        if any(mixer["type"] != "gain_cell" for mixer in start.mechanisms):
            raise UserError(f"Stage {self.name} adapts the scalers of gain_cell attention: leave it out.")
        before = {mixer["cell_kind"] for mixer in start.mechanisms}
        if before == {self.values.attention.get("cell_kind")}:
            raise UserError(
                f"Stage {self.name} makes cells {self.values.attention['cell_kind']}, which they are: set "
                "attention.cell_kind to what they are before it."
            )

    def plan(self, start: Start) -> StagePlan:
        """Sequences in place of steps."""
        return StagePlan(self.name, self.values, note=f"{self.values.sequences:,} sequences, no gradients")

    def run(self, model: Any, context: Context) -> Outcome:
        """A model of its own with the other settings."""
        from linearize.files import write_file
        from linearize.stages.adaptation import (
            STATISTICS,
            adapt_scalers,
            collect_statistics,
            plot_adaptation,
            share_of,
            statistics_bytes,
            with_settings,
        )

        rows = share_of(context.train, self.values.sequences, context.state)
        model = model.to(context.state.device)
        targets = collect_statistics(model, rows, self.values.batch_size)
        other = with_settings(model, self.values.attention)
        context.measure(f"{self.name}, before its scalers change", other)
        report = adapt_scalers(other, targets, rows, self.values)
        if context.state.is_main_process:
            plot_adaptation(report, context.path / "plots" / f"{self.name}.png")
            log = context.path / "logs" / f"{self.name}.json"
            log.parent.mkdir(parents=True, exist_ok=True)
            write_file(log, json.dumps(report.to_dict(), indent=1).encode())
        return Outcome(other, figures=report.to_dict(), files={STATISTICS: statistics_bytes(targets)})
