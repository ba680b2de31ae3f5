"""How well a model finds hidden tokens."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from linearize.data.masking import IGNORE_INDEX, Masking
from linearize.data.rows import collate
from linearize.errors import UserError
from linearize.evaluation.arms import input_device, measuring
from linearize.training.losses import at_least_float32

MEASURE_SEED = 2357
"""With a row's number it seeds what is hidden of that row in every measurement."""


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the hidden tokens; logits `(B, T, V)`, labels `(B, T)`, -100 where nothing is."""
    hidden = labels != IGNORE_INDEX
    return functional.cross_entropy(at_least_float32(logits[hidden]), labels[hidden], reduction="sum")


@dataclass(frozen=True)
class MaskedResult:
    """How well a model finds hidden tokens.

    Fields: perplexity; nll, nats per hidden token; accuracy, share of them that the model finds first; tokens, how
    many there were; seconds.
    """

    perplexity: float
    nll: float
    accuracy: float
    tokens: int
    seconds: float


def masked_perplexity(
    model: Any, rows: Any, masking: Masking, *, arm: str | None = "mixed", batch_size: int = 32
) -> float:
    """The perplexity of `masked_scores`; arguments and errors as there."""
    return masked_scores(model, rows, masking, arm=arm, batch_size=batch_size).perplexity


def masked_scores(
    model: Any, rows: Any, masking: Masking, *, arm: str | None = "mixed", batch_size: int = 32
) -> MaskedResult:
    """Loss and accuracy on the hidden tokens of held-out rows, the same ones each time, whatever the batch size; in
    the type of the model's weights, in the middle of training too.

    Args:
        model: An encoder with a masked-language-modelling head.
        rows: `len()` and `[i] -> {"input_ids": (L,), "attention_mask": (L,)}`.
        masking: What to hide.
        arm: of a converted model; None (or "teacher") for a stock one.
        batch_size: Rows per forward pass.

    Raises:
        UserError: nothing was hidden.
    """
    total, count, right = 0.0, 0, 0
    start_time = time.perf_counter()
    with measuring(model, arm) as base:
        for start in range(0, len(rows), batch_size):
            numbers = range(start, min(start + batch_size, len(rows)))
            batch = masking.hide(collate([rows[i] for i in numbers]), [MEASURE_SEED + i for i in numbers])
            batch = {name: x.to(input_device(base)) for name, x in batch.items()}
            labels = batch.pop("labels")
            logits, hidden = base(**batch).logits, labels != IGNORE_INDEX
            total += masked_loss(logits, labels).item()
            count += int(hidden.sum())
            right += int((logits[hidden].argmax(-1) == labels[hidden]).sum())
    if not count:
        raise UserError("There is no token to hide: give more held-out text, or raise mask_probability.")
    nll = total / count
    return MaskedResult(math.exp(min(nll, 700)), nll, right / count, count, time.perf_counter() - start_time)
