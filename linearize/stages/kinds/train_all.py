"""All weights, or the mechanism alone, trained by the model's own loss and a teacher's beside it."""

from __future__ import annotations

from typing import Any

from linearize.config.full_training import FullTrainingConfig
from linearize.errors import UserError
from linearize.stages.kinds.base import Context, Outcome, Stage, StagePlan, Start

MECHANISM_ONLY = "mechanism"


class TrainAll(Stage):
    """AdamW on float32 weights: the next token, or an encoder's hidden ones."""

    settings = FullTrainingConfig
    trains = True

    values: FullTrainingConfig

    @property
    def what(self) -> str:
        """The mechanism alone, or all."""
        return "mechanism" if self.values.weights == MECHANISM_ONLY else "all"

    def check(self, start: Start) -> None:
        """An objective that the model has, float32 weights, and a mechanism where it trains alone."""
        config, masked = start.config, self.values.objective == "masked"
        source = config.model_name_or_path or f"this {config.architecture.type}"
        if start.encoder and not masked:
            raise UserError(
                f"{source} is an encoder, which predicts no next token: set {self.name}.objective to masked or "
                "embeddings."
            )
        if masked and not start.encoder:
            raise UserError(f"{source} is no encoder: leave {self.name}.objective masked out.")
        if masked:
            from linearize.conversion.random_models import check_head

            check_head(config.model_name_or_path, start.model)
        if config.weights_dtype not in ("float32", "auto") or config.load_in_4bit or config.load_in_8bit:
            raise UserError(
                f"Stage {self.name} trains weights in float32: leave dtype, load_in_4bit and load_in_8bit out."
            )
        if self.values.weights == MECHANISM_ONLY and config.architecture is not None and self.name == first(config):
            raise UserError(
                f"{self.name}.weights is mechanism, but all other weights are random: set model_name_or_path."
            )
        if self.values.teacher is not None and any(x.get("include_landmark_in_loss") for x in start.mechanisms):
            raise UserError(
                "attention.include_landmark_in_loss is the published loss, without a teacher: set "
                f"{self.name}.teacher to none."
            )
        if self.values.weights != "all" and not start.mechanisms:
            raise UserError(f"{self.name}.weights is {self.values.weights}, but no layer is converted: set it to all.")

    def plan(self, start: Start) -> StagePlan:
        """Its steps and what trains."""
        from linearize.hardware.memory_full import full_training, parameter_count
        from linearize.training.loop import exact_plan

        steps = exact_plan(self.values, start.config.data.sequence_length, start.num_processes, self.name)
        everything = self.values.weights == "all"
        trained = {"all weights": parameter_count(start.student)} if everything else {}
        teacher = start.model if self.values.teacher is not None else None
        held = full_training(start.student, teacher=teacher, trains_all=everything, processes=start.num_processes)
        trained = trained or {self.values.weights: start.mixer_parameters}
        return StagePlan(self.name, self.values, steps, trained, least=held.parts())

    def advice(self, sequence_length: int) -> str:
        """Smaller micro-batches."""
        from linearize.failures import smaller

        return smaller(f"{self.name}.batch_size", self.values.batch_size, sequence_length)

    def trial(self, model: Any, start: Start) -> float:
        """Seconds of one micro-batch."""
        from linearize.stages.trial import full_seconds

        return full_seconds(
            model, self.values, start.config.data.sequence_length, hides=self.values.objective == "masked"
        )

    def run(self, model: Any, context: Context) -> Outcome:
        """Train in place."""
        from linearize.stages.full_training import train_all

        values = self.values
        teacher = None if values.teacher is None else context.load_teacher(values.teacher)
        done = train_all(
            model,
            context.train,
            values,
            validation=context.validation,
            tokenizer=context.tokenizer,
            mask_probability=context.config.data.mask_probability if values.objective == "masked" else None,
            teacher=teacher,
            **context.options(),
        )
        figures = {
            "parameters": model.num_parameters(),
            "tokens_per_second": done.tokens_per_second,
            "losses": done.losses,
            "validation": done.validation,
            "perplexity": done.perplexity,
            "perplexity_tokens": done.perplexity_tokens,
            "accuracy": done.accuracy,
        }
        measured = {name: figures[name] for name in ("perplexity", "accuracy")}
        record = {
            "parameters": figures["parameters"],
            "validation": {**measured, "tokens": done.perplexity_tokens},
        }
        return Outcome(model, done.steps, done.tokens, done.seconds, done.peak_memory_bytes, figures, record)


def first(config: Any) -> str:
    """Name of the first stage."""
    return next(iter(config.stages))
