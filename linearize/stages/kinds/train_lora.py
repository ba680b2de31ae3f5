"""Adapters of low rank on frozen weights, the mechanism along, by the language modelling loss."""

from __future__ import annotations

import os
from typing import Any

from linearize.config.settings import FinetuneConfig
from linearize.errors import UserError
from linearize.stages.kinds.base import Context, Outcome, Stage, StagePlan, Start


class TrainLora(Stage):
    """LoRA, merged at the end; the teacher is the same weights with adapters and mechanism off."""

    settings = FinetuneConfig
    title = "finetuning"
    trained = "lora"
    trains = True

    values: FinetuneConfig

    def check(self, start: Start) -> None:
        """Decoders in bfloat16 or float32, lengths and layers that there are."""
        from linearize.conversion.students import refuse_encoder
        from linearize.hardware.memory import linear_layers
        from linearize.stages.finetune_lengths import changes_rows, check_rows, refuse_packing

        config, row_length = start.config, start.config.data.sequence_length
        refuse_encoder(config.model_name_or_path, start.model)
        if config.weights_dtype == "float16":
            raise UserError("finetuning in float16 would lose small gradients: set dtype to bfloat16 or float32.")
        check_rows(self.values, row_length)
        if changes_rows(self.values, row_length) and (
            config.data.packing != "stream" or config.data.isolate_documents
        ):
            refuse_packing(self.name)
        known = linear_layers(start.shape)
        if unknown := [name for name in self.values.lora_targets or () if name not in known]:
            raise UserError(
                f"{self.name}.lora_targets: the teacher has no linear layer named {', '.join(unknown)}; there are "
                f"{', '.join(known)}."
            )
        self._check_passing(start)

    def _check_passing(self, start: Start) -> None:
        """Refuse states that the stage could not start from."""
        from linearize.evaluation.arms import context_tokens
        from linearize.stages.finetune_lengths import check_state_passing

        if self.values.state_passing:
            kinds = [settings["type"] for settings in start.mechanisms]
            longest = max(self.values.lengths(start.config.data.sequence_length))
            check_state_passing(self.values, kinds, context_tokens(start.model), longest)

    def plan(self, start: Start) -> StagePlan:
        """Its steps, adapters and memory."""
        from linearize.hardware.memory import adapter_parameters, forecast_finetune
        from linearize.training.loop import exact_plan

        config = start.forecast_settings
        longest = max(self.values.lengths(config.data.sequence_length))
        steps = exact_plan(self.values, longest, start.num_processes, self.name)
        trained = {"LoRA": adapter_parameters(start.shape, self.values)}
        trained |= {"mechanism": start.mixer_parameters} if self.values.train_mixers else {}
        forecast = None
        if start.forecasts:
            forecast = forecast_finetune(start.model, config, self.values, fused=start.fused)
        return StagePlan(self.name, self.values, steps, trained, forecast)

    def advice(self, sequence_length: int) -> str:
        """Smaller micro-batches, or less held for the backward pass."""
        from linearize.failures import smaller
        from linearize.stages import finetuning

        others = finetuning.smaller(self.name)
        return smaller(f"{self.name}.batch_size", self.values.batch_size, sequence_length, *others)

    def trial(self, model: Any, start: Start) -> float:
        """Seconds of one micro-batch."""
        from linearize.stages.trial import lora_seconds

        return lora_seconds(model, self.values, max(self.values.lengths(start.config.data.sequence_length)))

    def run(self, model: Any, context: Context) -> Outcome:
        """Train adapters on the model; they are merged by the engine, which knows the full weights."""
        from linearize.stages.finetuning import finetune

        belongs: dict[str, Any] = {}
        if context.arm == "mixed":
            base, revision = context.save(model)
            local = os.path.exists(base)
            belongs = {"tokenizer": context.tokenizer, "base_model": os.path.abspath(base) if local else base}
            belongs["revision"] = revision
        done = finetune(model, context.train, self.values, arm=context.arm, **belongs, **context.options())
        return Outcome(done.model, done.steps, done.tokens, done.seconds, done.peak_memory_bytes)
