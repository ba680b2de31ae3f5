"""Masked language modelling: which tokens are hidden, and how well a model finds them.

Source: Devlin et al. 2019 (arXiv 1810.04805), section 3.1 and appendix A.1: of the chosen tokens 80% show as the mask
token, 10% as a random one and 10% as they are.
"""

from __future__ import annotations

import math
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
"""Hides the same tokens in every measurement."""


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

    def hide(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The batch with tokens hidden, and labels that are -100 elsewhere. Marks and padding are never hidden.

        Args:
            batch: `input_ids` and `attention_mask`, `(B, T)`.
            generator: Of the CPU: the draws are the same on every device.
        """
        ids = batch["input_ids"]
        draws = torch.rand((2, *ids.shape), generator=generator).to(ids.device)
        random = torch.randint(self.entries, ids.shape, generator=generator).to(ids.device)
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


def masked_perplexity(
    model: Any, rows: Any, masking: Masking, *, arm: str | None = "mixed", batch_size: int = 32
) -> float:
    """Perplexity of the hidden tokens of held-out rows, the same ones each time.

    Args:
        model: An encoder with a masked-language-modelling head.
        rows: `len()` and `[i] -> {"input_ids": (L,), "attention_mask": (L,)}`.
        masking: What to hide.
        arm: of a converted model; None (or "teacher") for a stock one.
        batch_size: Rows per forward pass.

    Raises:
        UserError: nothing was hidden.
    """
    generator, total, count = torch.Generator().manual_seed(MEASURE_SEED), 0.0, 0
    with measuring(model, arm) as base:
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            batch = {name: x.to(input_device(base)) for name, x in masking.hide(batch, generator).items()}
            labels = batch.pop("labels")
            total += masked_loss(base(**batch).logits, labels).item()
            count += int((labels != IGNORE_INDEX).sum())
    if not count:
        raise UserError("There is no token to hide: give more held-out text, or raise mlm.mask_probability.")
    return math.exp(min(total / count, 700))
