"""The Trainers of all weights: the model's own loss, a teacher's beside it, or that of an encoder's hidden tokens;
groups of parameters, and validation perplexity."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import TrainingArguments

from linearize.data.masking import IGNORE_INDEX, Masking
from linearize.evaluation import PerplexityResult, perplexity
from linearize.evaluation.masked import MaskedResult, masked_loss, masked_scores
from linearize.training.launcher import in_bfloat16
from linearize.training.log import TrainingLog
from linearize.training.loop import SCHEDULERS
from linearize.training.stage_trainer import StageTrainer

if TYPE_CHECKING:
    from linearize.config.full_training import FullTrainingConfig
    from linearize.stages.distillation import Distiller


def full_arguments(config: FullTrainingConfig, device: str | None) -> dict[str, Any]:
    """The Trainer's arguments of such a stage, beside those that all stages have."""
    on_cpu = PartialState(cpu=device == "cpu").device.type == "cpu"
    return {
        **schedule_arguments(config),
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "bf16": in_bfloat16(config.precision, on_cpu=on_cpu),
        "eval_strategy": "no" if config.eval_steps is None else "steps",
        "eval_steps": config.eval_steps,
    }


def schedule_arguments(training: FullTrainingConfig) -> dict[str, Any]:
    """The Trainer's arguments for the learning rate over the run."""
    ratio, rate = training.min_lr_ratio, training.learning_rate
    if training.schedule == "cosine":
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": ratio}}
    if training.schedule == "constant" or ratio == 1 or not rate:
        return {"lr_scheduler_type": SCHEDULERS["constant"]}
    return {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": ratio * rate, "power": 1.0}}


def decay_groups(
    model: nn.Module, weight_decay: float, decay: str = "matrices", mixer_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Weight decay on tensors of two or more dimensions (matrices and embeddings), none on biases and norms, or on all
    of them; none on a mechanism's own parameters, which may have a learning rate of their own."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    mixers = [parameter for name, parameter in trained if "mixer." in name]
    others = [parameter for name, parameter in trained if "mixer." not in name]
    rate = {} if mixer_learning_rate is None else {"lr": mixer_learning_rate}
    return [
        {"params": [p for p in others if p.dim() >= 2 or decay == "all"], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2 and decay != "all"], "weight_decay": 0.0},
        {"params": mixers, "weight_decay": 0.0, **rate},
    ]


class FullTrainer(StageTrainer):
    """Trains a whole model on token blocks.

    Args:
        model: A transformers model with a language-modelling head.
        args: Of the Trainer, with those of `full_arguments`.
        config: The stage's settings.
        validation: Token blocks (rows of an encoder) for the perplexity; its first `eval_tokens` are scored.
        validation_log: Gets a record of each measurement.
        others: As in `StageTrainer`.
    """

    STAGE = "training"

    config: FullTrainingConfig

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        config: FullTrainingConfig,
        validation: Any,
        validation_log: TrainingLog | None,
        **others: Any,
    ) -> None:
        self.validation_log = validation_log
        self.measuring_seconds = 0.0
        self._measured: tuple[int, PerplexityResult | MaskedResult] | None = None
        length = validation.sequence_length if len(validation) else 1  # of none there is nothing to score
        count = min(len(validation), max(1, config.eval_tokens // length))
        self.scored: Any = Subset(validation, range(count))
        super().__init__(model, args, config=config, eval_dataset=self.scored, **others)

    def advice(self) -> str:
        """What to change when a loss is not finite."""
        return f"{super().advice()}, raise {self.config.section}.warmup_steps"

    def losses(self, model: nn.Module, inputs: dict[str, Any], denominator: Any) -> tuple[Tensor, ...]:
        """The model's own loss.

        Padding is on the right and without labels, so that a mask would change nothing but the attention's path: a
        stock model beside one does not look for a row's texts.
        """
        given = {name: x for name, x in inputs.items() if name != "attention_mask"}
        output = model(**given, num_items_in_batch=denominator, use_cache=False)
        return (output.loss,)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All parameters, by whether they have weight decay."""
        config = self.config
        return decay_groups(model, config.weight_decay, config.decay, config.mixer_learning_rate)

    def scores(self) -> PerplexityResult | MaskedResult:
        """What is measured on the validation text."""
        size = self.args.per_device_train_batch_size
        return perplexity(self.trained, self.scored, arm=None, batch_size=size, description="validation")

    def measure(self, step: int) -> PerplexityResult | MaskedResult | None:
        """The validation perplexity of the weights as they are saved: in float32, outside mixed precision.

        Args:
            step: Of the record; what was measured at this step is not measured again.

        Returns:
            None without validation text, and on the processes beside the main one.
        """
        if not len(self.scored) or self.validation_log is None:
            return None
        if self._measured is None or self._measured[0] != step:
            result = self.scores()
            self._measured = step, result
            self.measuring_seconds += result.seconds
            tokens = step * self.config.tokens_per_step
            record = {"step": step, "tokens": tokens, "nll": result.nll, "perplexity": result.perplexity}
            self.validation_log.write({**record, **_accuracy(result)})
        return self._measured[1]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measures at a step of training, while the other processes wait."""
        result = self.measure(self.state.global_step)
        self.accelerator.wait_for_everyone()
        metrics = {}
        if result is not None:
            found = {"loss": result.nll, "perplexity": result.perplexity, **_accuracy(result)}
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _accuracy(result: PerplexityResult | MaskedResult) -> dict[str, float]:
    return {"accuracy": result.accuracy} if isinstance(result, MaskedResult) else {}


class HiddenTokens(StageTrainer):
    """The loss on hidden tokens, for a trainer of any encoder.

    Args:
        masking: What to hide.
        arguments, others: As in `StageTrainer`.
    """

    def __init__(self, masking: Masking, *arguments: Any, **others: Any) -> None:
        self.masking = masking
        super().__init__(*arguments, **others)

    def prepare_batches(self, batches: list[Any]) -> list[Any]:
        """Hides tokens: other ones in each row of each step, the same again after a resume, in micro-batches of any
        size and on any number of processes."""
        world, rank = self.args.world_size, self.args.process_index
        hidden = []
        for i, batch in enumerate(batches):
            size = len(batch["input_ids"])
            first = (i * world + rank) * size
            rows = [f"masks {self.args.seed} {self.state.global_step} {first + j}" for j in range(size)]
            hidden.append(self.masking.hide(batch, [random.Random(row).getrandbits(63) for row in rows]))
        return hidden

    def counted(self, batch: Any) -> Tensor:
        """Its hidden tokens."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    def losses(self, model: nn.Module, inputs: dict[str, Any], denominator: Any) -> tuple[Tensor, ...]:
        """The cross-entropy of the hidden tokens."""
        given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        return (masked_loss(model(**given).logits, inputs["labels"]) / denominator,)


class MaskedTrainer(HiddenTokens, FullTrainer):
    """Trains a whole encoder to find hidden tokens.

    Args:
        masking: What to hide.
        arguments, others: As in `FullTrainer`.
    """

    config: FullTrainingConfig

    def scores(self) -> MaskedResult:
        """Loss and accuracy on hidden tokens of the validation text, the same ones each time."""
        size = self.args.per_device_train_batch_size
        return masked_scores(self.trained, self.scored, self.masking, arm=None, batch_size=size)


class DistillationTrainer(FullTrainer):
    """Trains a whole model against a teacher as well.

    Args:
        distiller: The teacher and the losses.
        arguments: As in `FullTrainer`.
    """

    LOSS_NAMES = ("loss", "cross_entropy", "kl", "hidden")

    def __init__(self, distiller: Distiller, *arguments: Any, **others: Any) -> None:
        self.distiller = distiller
        super().__init__(*arguments, **others)

    def losses(self, model: nn.Module, inputs: dict[str, Any], denominator: Any) -> tuple[Tensor, ...]:
        """The weighted sum, then its parts."""
        with self.accelerator.autocast():  # accelerate wraps the student's forward alone, not teacher and heads
            found = self.distiller.losses(model, inputs, denominator)
        return found.total, found.cross_entropy, found.divergence, found.hidden
