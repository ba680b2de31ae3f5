"""Masked language modelling: which tokens are hidden.

Source: Devlin et al. 2019 (arXiv 1810.04805), section 3.1 and appendix A.1: of the chosen tokens 80% show as the mask
token, 10% as a random one and 10% as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.errors import UserError

IGNORE_INDEX = -100

SHOWN_MASKED, SHOWN_RANDOM = 0.8, 0.1


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
