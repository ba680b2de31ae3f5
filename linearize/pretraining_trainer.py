"""The Trainers of pretraining: the model's own loss or a teacher's beside it, weight decay on matrices only, and
validation perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import TrainingArguments

from linearize.evaluation import PerplexityResult, perplexity
from linearize.stage_trainer import StageTrainer, stage_arguments
from linearize.training_log import TrainingLog

if TYPE_CHECKING:
    from linearize.data import TokenBlocks
    from linearize.distillation import Distiller
    from linearize.pretraining import PretrainConfig, PretrainingConfig
    from linearize.settings import StepPlan


def pretraining_arguments(config: PretrainConfig, checkpoints: Path) -> tuple[TrainingArguments, StepPlan]:
    """The Trainer's arguments, and the steps that they amount to."""
    training = config.training
    on_cpu = PartialState(cpu=config.device == "cpu").device.type == "cpu"
    return stage_arguments(
        training,
        "training",
        config.data.sequence_length,
        checkpoints,
        config.seed,
        config.report_to,
        config.device,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": training.min_lr_ratio},
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        bf16=training.precision == "bfloat16" or (training.precision == "auto" and not on_cpu),
        eval_strategy="no" if training.eval_steps is None else "steps",
        eval_steps=training.eval_steps,
    )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on tensors of two or more dimensions (matrices and embeddings), none on biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]


class PretrainingTrainer(StageTrainer):
    """Trains a whole model on token blocks.

    Args:
        model: A transformers model with a language-modelling head.
        args: As `pretraining_arguments` makes them.
        config: The stage's settings.
        validation: Token blocks for the perplexity; its first `eval_tokens` are scored.
        validation_log: Gets a record of each measurement.
        others: As in `StageTrainer`.
    """

    STAGE = "pretraining"
    ADVICE = "lower training.learning_rate, raise training.warmup_steps"

    config: PretrainingConfig

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        config: PretrainingConfig,
        validation: TokenBlocks,
        validation_log: TrainingLog | None,
        **others: Any,
    ) -> None:
        self.validation_log = validation_log
        self.measuring_seconds = 0.0
        self._measured: tuple[int, PerplexityResult] | None = None
        count = min(len(validation), max(1, config.eval_tokens // validation.sequence_length))
        self.scored: Any = Subset(validation, range(count))
        super().__init__(model, args, config=config, eval_dataset=self.scored, **others)

    def losses(self, model: nn.Module, inputs: dict[str, Any], denominator: Any) -> tuple[Tensor, ...]:
        """The model's own loss."""
        output = model(**inputs, num_items_in_batch=denominator, use_cache=False)
        return (output.loss,)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All parameters, by whether they have weight decay."""
        return decay_groups(model, self.config.weight_decay)

    def measure(self, step: int) -> PerplexityResult | None:
        """The validation perplexity of the weights as they are saved: in float32, outside mixed precision.

        Args:
            step: Of the record; what was measured at this step is not measured again.

        Returns:
            None without validation text, and on the processes beside the main one.
        """
        if not len(self.scored) or self.validation_log is None:
            return None
        if self._measured is None or self._measured[0] != step:
            result = perplexity(
                self.trained,
                self.scored,
                arm=None,
                batch_size=self.args.per_device_train_batch_size,
                description="validation",
            )
            self._measured = step, result
            self.measuring_seconds += result.seconds
            tokens = step * self.config.tokens_per_step
            record = {"step": step, "tokens": tokens, "nll": result.nll, "perplexity": result.perplexity}
            self.validation_log.write(record)
        return self._measured[1]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measures at a step of training, while the other processes wait."""
        result = self.measure(self.state.global_step)
        self.accelerator.wait_for_everyone()
        metrics = {}
        if result is not None:
            metrics = {f"{metric_key_prefix}_loss": result.nll, f"{metric_key_prefix}_perplexity": result.perplexity}
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class DistillationTrainer(PretrainingTrainer):
    """Trains a whole model against a teacher as well.

    Args:
        distiller: The teacher and the losses.
        arguments: As in `PretrainingTrainer`.
    """

    LOSS_NAMES = ("loss", "cross_entropy", "kl", "hidden")

    def __init__(self, distiller: Distiller, *arguments: Any, **others: Any) -> None:
        self.distiller = distiller
        super().__init__(*arguments, **others)

    def losses(self, model: nn.Module, inputs: dict[str, Any], denominator: Any) -> tuple[Tensor, ...]:
        """The weighted sum, then its parts."""
        found = self.distiller.losses(model, inputs, denominator)
        return found.total, found.cross_entropy, found.divergence, found.hidden
