"""Training against a frozen teacher: its distribution of the next token, and the direction of its hidden states.

The loss per token is `labels_weight * CE + logits_weight * KL(teacher || student) + hidden_weight * C`, where C is the
mean over layers of `1 - cos(student's state, teacher's state)` after each block. Directions, because a few positions
and channels of a language model are a hundred times larger than the others and would be all that a squared distance
sees. Sources: Hinton et al. 2015 (arXiv 1503.02531), the logits; Sanh et al. 2019 (arXiv 1910.01108), the cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from linearize.data.masking import IGNORE_INDEX
from linearize.errors import UserError
from linearize.training.losses import LossWeights, at_least_float32, language_model_loss

if TYPE_CHECKING:
    from linearize.config.settings import DistillationConfig


@dataclass(frozen=True)
class DistillationLosses:
    """Scalars, each summed over supervised tokens and divided by the denominator.

    Fields: total, what is differentiated; cross_entropy, divergence and hidden, its parts, unweighted and detached.
    """

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    hidden: Tensor


class Distiller:
    """A frozen teacher and the losses of a student against it.

    Args:
        teacher: A causal language model of the student's vocabulary and width, with as many layers.
        student: Any causal language model of transformers.
        config: The weights.

    Raises:
        UserError: Teacher and student do not fit each other.
    """

    def __init__(self, teacher: Any, student: Any, config: DistillationConfig) -> None:
        self.teacher, self.config = teacher.eval().requires_grad_(False), config
        for name, what in (
            ("vocab_size", "vocabulary"),
            ("num_hidden_layers", "number of layers"),
            ("hidden_size", "width"),
        ):
            theirs, ours = getattr(teacher.config, name), getattr(student.config, name)
            needed = name == "vocab_size" or config.hidden_weight > 0
            if needed and theirs != ours:
                raise UserError(
                    f"The {what} of distillation.teacher {config.teacher} is {theirs}, but that of the model that "
                    f"trains is {ours}: name the model it was made from."
                )
        self.head: Callable[[Tensor], Tensor] = student.get_output_embeddings()
        self.weights = LossWeights(config.labels_weight, config.logits_weight)

    def losses(self, model: Any, inputs: dict[str, Tensor], denominator: Tensor | float) -> DistillationLosses:
        """The losses of a micro-batch.

        Args:
            model: The student, as a launcher may have wrapped it.
            inputs: `input_ids` and `labels`, `(B, T)`, with `position_ids` where a row's texts are kept apart.
            denominator: Supervised tokens of the whole global batch.
        """
        ids, labels, positions = inputs["input_ids"], inputs["labels"], inputs.get("position_ids")
        self.teacher.to(ids.device)
        with torch.no_grad():
            theirs = self._states(self.teacher, ids, positions)
        ours = self._states(model, ids, positions)
        sums = language_model_loss(
            ours[-1],
            labels,
            self.head,
            weights=self.weights,
            teacher_hidden_states=theirs[-1],
            teacher_head=self.teacher.get_output_embeddings(),
            denominator=denominator,
            logits_chunk=self.config.logits_chunk,
        )
        hidden = ours[-1].new_zeros((), dtype=sums.total.dtype)
        if self.config.hidden_weight:
            supervised = functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
            hidden = hidden_distance(ours[1:], theirs[1:], supervised) / denominator
        total = sums.total + self.config.hidden_weight * hidden
        return DistillationLosses(total, sums.cross_entropy, sums.divergence, hidden.detach())

    def _states(self, model: Any, ids: Tensor, positions: Tensor | None) -> tuple[Tensor, ...]:
        """Embeddings, then the states after each block, the last after the final norm."""
        options = {"output_hidden_states": True, "use_cache": False, "logits_to_keep": 1}
        return model(input_ids=ids, position_ids=positions, **options).hidden_states


def hidden_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Mean over layers of the weighted sum over places of 1 - cosine similarity, in float32 at least.

    Args:
        ours, theirs: states of each layer, `(B, T, E)`.
        weights: `(B, T)`.
    """
    distances = [
        1 - functional.cosine_similarity(at_least_float32(mine), at_least_float32(target), dim=-1)
        for mine, target in zip(ours, theirs, strict=True)
    ]
    return torch.stack([(distance * weights).sum() for distance in distances]).mean()
