"""Attention transfer, layer by layer."""

from __future__ import annotations

from typing import Any

from linearize.config.settings import TransferConfig
from linearize.errors import UserError
from linearize.stages.kinds.base import Context, Outcome, Stage, StagePlan, Start

VALIDATION_ROWS = 64
"""Held-out rows of an encoder for the losses."""


class Transfer(Stage):
    """The mechanism's own parameters learn to give each layer's softmax output."""

    settings = TransferConfig
    title = "attention transfer"
    trained = "mechanism"
    trains = True

    values: TransferConfig

    def check(self, start: Start) -> None:
        """A mechanism that it can train, with the arm that it trains."""
        from linearize.stages.transfer import check_branch, check_transfers

        if not start.mixer_parameters:
            raise UserError("attention transfer has no converted layer to train: name fewer softmax_layers.")
        for mixer in start.mechanisms:
            check_transfers(mixer["type"])
        check_branch(self.values, start.arms)

    def plan(self, start: Start) -> StagePlan:
        """Its steps and its memory."""
        from linearize.hardware.memory import forecast_transfer
        from linearize.training.loop import exact_plan

        config = start.forecast_settings
        steps = exact_plan(self.values, config.data.sequence_length, start.num_processes, self.name)
        forecast = None
        if start.forecasts:
            forecast = forecast_transfer(start.model, config, self.values, fused=start.fused)
        trained = {"mechanism": start.mixer_parameters}
        return StagePlan(self.name, self.values, steps, trained, forecast)

    def advice(self, sequence_length: int) -> str:
        """Smaller micro-batches."""
        from linearize.failures import smaller

        return smaller(f"{self.name}.batch_size", self.values.batch_size, sequence_length, "set load_in_4bit")

    def trial(self, model: Any, start: Start) -> float:
        """Seconds of one micro-batch."""
        from linearize.stages.trial import transfer_seconds

        return transfer_seconds(model, self.values, start.config.data.sequence_length)

    def run(self, model: Any, context: Context) -> Outcome:
        """Train in place."""
        from torch.utils.data import Subset

        from linearize.stages.transfer import transfer_attention

        validation = context.validation
        if context.encoder and validation is not None:
            validation = Subset(validation, range(min(VALIDATION_ROWS, len(validation))))
        done = transfer_attention(model, context.train, self.values, validation=validation, **context.options())
        figures = {"tokens_per_second": done.tokens_per_second, "losses_per_layer": done.losses_per_layer}
        return Outcome(model, done.steps, done.tokens, done.seconds, done.peak_memory_bytes, figures)
