"""An encoder trained until its sentence embeddings are its teacher's."""

from __future__ import annotations

from typing import Any

from linearize.config.embeddings import EmbeddingConfig
from linearize.errors import UserError
from linearize.stages.kinds.base import Context, Outcome, Stage, StagePlan, Start


class TrainEmbeddings(Stage):
    """All weights, or the converted layers' attention, against the embeddings of the run's first model."""

    settings = EmbeddingConfig
    trained = "all"
    trains = True

    values: EmbeddingConfig

    def check(self, start: Start) -> None:
        """An encoder, with a teacher."""
        source = start.config.model_name_or_path
        if source is None:
            raise UserError(f"Stage {self.name} learns a teacher's embeddings, and random weights have no teacher.")
        if not start.encoder:
            raise UserError(
                f"{source} is a {start.model.model_type} model, which is no encoder: leave {self.name}.objective "
                "embeddings out."
            )
        if self.values.weights == "attention" and not start.mechanisms:
            raise UserError(f"{self.name}.weights is attention, but no layer is converted: set it to all.")

    def plan(self, start: Start) -> StagePlan:
        """Its steps."""
        from linearize.hardware.memory_full import full_training, parameter_count
        from linearize.training.loop import exact_plan

        steps = exact_plan(self.values, start.config.data.sequence_length, start.num_processes, self.name)
        what = "all weights" if self.values.weights == "all" else "attention, of all weights"
        held = full_training(start.student, teacher=start.model, processes=start.num_processes)
        return StagePlan(self.name, self.values, steps, {what: parameter_count(start.student)}, least=held.parts())

    def advice(self, sequence_length: int) -> str:
        """Smaller micro-batches."""
        from linearize.failures import smaller

        return smaller(f"{self.name}.batch_size", self.values.batch_size, sequence_length)

    def trial(self, model: Any, start: Start) -> float:
        """Seconds of one micro-batch."""
        from linearize.stages.trial import embedding_seconds

        return embedding_seconds(model, self.values, start.config.data.sequence_length)

    def run(self, model: Any, context: Context) -> Outcome:
        """Train in place, beside a frozen copy of the teacher."""
        from linearize.stages.encoder_training import distill_embeddings
        from linearize.training.log import read_log

        teacher = context.load_teacher("base")
        if context.state.is_main_process:
            count = f"{teacher.num_parameters():,}"
            print(f"{self.name}: {count} frozen parameters of the teacher in memory", flush=True)
        done = distill_embeddings(model, teacher, context.train, self.values, **context.options())
        figures = {"losses": [(record["step"], record["loss"]) for record in read_log(done.log_path)]}
        return Outcome(model, done.steps, done.tokens, done.seconds, done.peak_memory_bytes, figures)
