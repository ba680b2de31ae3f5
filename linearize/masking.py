"""Masked language modelling: which tokens are hidden, and how well a model finds them.

Source: Devlin et al. 2019 (arXiv 1810.04805), section 3.1 and appendix A.1: of the chosen tokens 80% show as the mask
token, 10% as a random one and 10% as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from linearize.data_rows import collate
from linearize.errors import UserError
from linearize.evaluation.arms import input_device, measuring
from linearize.losses import IGNORE_INDEX, at_least_float32

SHOWN_MASKED, SHOWN_RANDOM = 0.8, 0.1
MEASURE_SEED = 2357
"""With a row's number it seeds what is hidden of that row in every measurement."""


@dataclass(frozen=True)
class Masking:
    """What hiding tokens needs to know of the vocabulary; probability is a chosen token's."""

    mask_token: int
    special: tuple[int, ...]
    entries: int
    probability: float

    @classmethod
    def of(cls, tokenizer: Any, probability: float) -> Masking:
        """Of a tokenizer.

        Raises:
            UserError: it has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise UserError("The tokenizer has no mask token: masked language modelling needs one, set mlm to none.")
        return cls(tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), len(tokenizer), probability)

    def hide(self, batch: dict[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The batch with tokens hidden, and labels that are -100 elsewhere. Marks and padding are never hidden.

        What is hidden of a row depends on its seed and its tokens alone: neither on the rows beside it nor on padding,
        and not on the device.

        Args:
            batch: `input_ids` and `attention_mask`, `(B, T)`.
            seeds: Of the rows.
        """
        real = batch["attention_mask"].bool().cpu()
        draws, random = torch.ones((2, *real.shape)), torch.zeros(real.shape, dtype=torch.int64)
        for row, seed in enumerate(seeds):
            generator, count = torch.Generator().manual_seed(seed), int(real[row].sum())
            draws[:, row, real[row]] = torch.rand((2, count), generator=generator)
            random[row, real[row]] = torch.randint(self.entries, (count,), generator=generator)
        return self._hidden(batch, draws, random)

    def _hidden(self, batch: dict[str, Tensor], draws: Tensor, random: Tensor) -> dict[str, Tensor]:
        """The batch with tokens hidden by numbers from 0 to 1, `(2, B, T)`, and random tokens, `(B, T)`."""
        ids = batch["input_ids"]
        draws, random = draws.to(ids.device), random.to(ids.device)
        ordinary = batch["attention_mask"].bool() & ~torch.isin(ids, torch.tensor(self.special, device=ids.device))
        chosen = ordinary & (draws[0] < self.probability)
        shown = torch.where(draws[1] < SHOWN_MASKED, torch.full_like(ids, self.mask_token), ids)
        replaced = (draws[1] >= SHOWN_MASKED) & (draws[1] < SHOWN_MASKED + SHOWN_RANDOM)
        shown = torch.where(replaced, random, shown)
        return {
            **batch,
            "input_ids": torch.where(chosen, shown, ids),
            "labels": ids.masked_fill(~chosen, IGNORE_INDEX),
        }


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
