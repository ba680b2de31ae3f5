"""The Trainer of stage 2: its objective and what trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from linearize.config.settings import FinetuneConfig
from linearize.modeling.cache_names import CACHE, named
from linearize.stages.adapters import AdaptedModel, is_mixer_parameter
from linearize.stages.finetune_lengths import PREVIOUS, StepLengths, pieces
from linearize.training.losses import LossWeights, language_model_loss
from linearize.training.stage_trainer import StageTrainer


@dataclass(frozen=True)
class Objective:
    """Cross-entropy and distillation of one micro-batch, on hidden states."""

    weights: LossWeights
    logits_chunk: int
    """Tokens whose logits exist at once."""

    def __call__(
        self,
        model: AdaptedModel,
        input_ids: Tensor,
        labels: Tensor,
        denominator: Tensor,
        position_ids: Tensor | None = None,
        previous_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of a micro-batch.

        Args:
            model: Adapters on a converted model; the student's arm is the one that is set.
            input_ids: `[B, T]`, no padding but on the right, where nothing counts.
            labels: `[B, T]`, -100 where there is no loss.
            denominator: Supervised tokens of the whole global batch.
            position_ids: `[B, T]` that start again with each text, where a row's texts are kept apart.
            previous_ids: `[B, S]`, the text before each row, whose state the row starts from; positions go on. None:
                each row starts a text.

        Returns:
            Scalars: what is differentiated, the cross-entropy, the divergence; each summed over this micro-batch and
                divided by the denominator.
        """
        base: Any = model.get_base_model()
        teacher = None
        if self.weights.kl_weight:
            teacher = teacher_hidden_states(model, input_ids, position_ids, previous_ids)
        cache = None if previous_ids is None else state_after(model, previous_ids)
        given = {"input_ids": input_ids, "position_ids": position_ids, **named(cache)}
        hidden = base.base_model(**given, use_cache=cache is not None).last_hidden_state
        sums = language_model_loss(
            hidden,
            labels,
            base.get_output_embeddings(),
            weights=self.weights,
            teacher_hidden_states=teacher,
            denominator=denominator,
            logits_chunk=self.logits_chunk,
        )
        return sums.total, sums.cross_entropy, sums.divergence


def teacher_hidden_states(
    model: AdaptedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    previous_ids: Tensor | None = None,
) -> Tensor:
    """The teacher's last hidden states `[B, T, E]` from the same weights: adapters and mechanism off, no dropout, no
    gradient. It reads the text before, where there is one, along."""
    base: Any = model.get_base_model()
    whole = input_ids if previous_ids is None else torch.cat([previous_ids, input_ids], dim=1)
    with reading(model), model.disable_adapter(), base.use_arm("teacher"):
        hidden = base.base_model(input_ids=whole, position_ids=position_ids, use_cache=False).last_hidden_state
        return hidden[:, -input_ids.shape[1] :]


def state_after(model: AdaptedModel, input_ids: Tensor) -> Any:
    """The cache that a text `[B, S]` leaves in the arm that is set, no dropout, no gradient."""
    base: Any = model.get_base_model()
    with reading(model):
        return base.base_model(input_ids=input_ids, use_cache=True)[CACHE]


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Without gradient and dropout, and back to training afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """What trains: the adapters at their learning rate with weight decay, the mechanism's parameters at theirs
    without."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapters = [parameter for name, parameter in trained if not is_mixer_parameter(name)]
    mixers = [parameter for name, parameter in trained if is_mixer_parameter(name)]
    groups = [
        {"params": adapters, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": mixers, "lr": config.mixer_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class FinetuningTrainer(StageTrainer):
    """Trains an `AdaptedModel` on token blocks.

    Args:
        model: Adapters on a converted model.
        args: As `stage_arguments` makes them.
        config: The stage's settings.
        others: As in `StageTrainer`.
    """

    STAGE = "finetuning"
    LOSS_NAMES = ("loss", "cross_entropy", "kl")

    config: FinetuneConfig
    trained: AdaptedModel

    def __init__(self, model: AdaptedModel, args: TrainingArguments, *, config: FinetuneConfig, **others: Any) -> None:
        self.objective: Objective = Objective(
            LossWeights(config.ce_weight, config.kl_weight, config.temperature), config.logits_chunk
        )
        super().__init__(model, args, config=config, **others)
        rows: Any = self.train_dataset
        self.step_lengths = StepLengths(
            config.lengths(rows.sequence_length), config.length_shares, config.state_passing
        )

    def advice(self) -> str:
        """What to change when a loss is not finite."""
        return f"{super().advice()} or {self.config.section}.mixer_learning_rate"

    def prepare_batches(self, batches: list[Any]) -> list[Any]:
        """The rows in pieces of the step's length, and the text before them in the steps that start from its state."""
        length, passes_state = self.step_lengths.of(self.state.global_step)
        return [pieces(batch, length, passes_state) for batch in batches]

    def losses(self, model: nn.Module, inputs: dict[str, Any], denominator: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The objective: what is differentiated, the cross-entropy, the divergence."""
        return model(
            objective=self.objective,
            input_ids=inputs["input_ids"],
            labels=inputs["labels"],
            denominator=denominator,
            position_ids=inputs.get("position_ids"),
            previous_ids=inputs.get(PREVIOUS),
        )

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """One group for the adapters and one for the mechanism."""
        return parameter_groups(model, self.config)

    def plain_model(self) -> Any:
        """The converted model under the adapters."""
        return self.trained.get_base_model()

    def shown_losses(self) -> tuple[str, ...]:
        """The parts of the loss only where there are several."""
        return self.LOSS_NAMES if self.config.kl_weight else self.LOSS_NAMES[:1]
