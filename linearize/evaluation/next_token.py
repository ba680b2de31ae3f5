"""Held-out perplexity of one arm, and where in the sequence it comes from.

Legend: B blocks of a batch, L tokens of a block, D hidden width, V vocabulary.
"""

import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from linearize.conversion.students import refuse_encoder
from linearize.errors import UserError
from linearize.evaluation.arms import input_device, measuring, unwrap

LOGITS_AT_ONCE = 2**25  # float32 logits that live at one time: 128 MiB, 680 tokens at V = 49k, 260 at V = 128k


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """Perplexity over all scored tokens of a set of blocks, each token weighing the same.

    Fields: perplexity; nll, nats per token; tokens scored; seconds; position_nll and position_tokens, by the position
    in a block the summed nats and the number of the predictions made from it (the token at n predicts that at n + 1).
    """

    perplexity: float
    nll: float
    tokens: int
    seconds: float = 0.0
    position_nll: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    position_tokens: tuple[int, ...] = dataclasses.field(default=(), repr=False)

    @classmethod
    def from_positions(cls, nll: Tensor, tokens: Tensor, seconds: float = 0.0) -> "PerplexityResult":
        """Sum up: nll `(L,)` float64 nats and tokens `(L,)` by position."""
        total, count = nll.sum().item(), int(tokens.sum().item())
        mean = total / count
        perplexity = math.exp(mean) if mean < 700 else math.inf  # float64 ends at exp(709)
        return cls(perplexity, mean, count, seconds, tuple(nll.tolist()), tuple(tokens.tolist()))

    def span(self, start: int, stop: int | None = None) -> "PerplexityResult | None":
        """The same over predictions made from positions `start <= n < stop` of each block; None without any."""
        nll = torch.tensor(self.position_nll[start:stop], dtype=torch.float64)
        tokens = torch.tensor(self.position_tokens[start:stop], dtype=torch.int64)
        return self.from_positions(nll, tokens) if tokens.sum() else None


def perplexity(
    model: Any,
    blocks: Any,
    *,
    arm: str | None = "mixed",
    batch_size: int = 1,
    description: str | None = None,
) -> PerplexityResult:
    """Score blocks of tokens under one arm of a student, or under a stock model.

    The output layer runs on a few hundred tokens at a time, so that no full float32 logits exist; sums are float64.

    Args:
        model: student, stock model, or peft wrapper of either (adapters count as they are set).
        blocks: `len()` and `[i] -> {"input_ids": (L,), "labels": (L,)}`, with `position_ids` where documents are
            kept apart; the first token of a block and labels of -100 are not scored.
        arm: "mixed", "teacher", "softmax" or "linear"; None (or "teacher") for a stock model.
        batch_size: blocks per forward pass.
        description: what the progress bar says; default the arm.

    Raises:
        UserError: nothing to score, an arm that the model does not have, or an encoder.
    """
    refuse_encoder(type(unwrap(model)).__name__, unwrap(model).config)
    started = time.perf_counter()
    nll: Tensor = torch.zeros(0, dtype=torch.float64)
    tokens: Tensor = torch.zeros(0, dtype=torch.int64)
    with measuring(model, arm) as base, _progress(blocks, description or f"perplexity, {arm or 'teacher'}") as bar:
        decoder = getattr(base, base.base_model_prefix)
        for start in range(0, len(blocks), batch_size):
            rows = [blocks[i] for i in range(start, min(start + batch_size, len(blocks)))]
            input_ids = torch.stack([row["input_ids"] for row in rows]).to(input_device(base))
            targets = torch.stack([row["labels"] for row in rows])[:, 1:].to(input_ids.device)
            apart = {}
            if "position_ids" in rows[0]:  # documents that are kept apart, as in training
                apart["position_ids"] = torch.stack([row["position_ids"] for row in rows]).to(input_ids.device)
            hidden = decoder(input_ids, use_cache=False, **apart)[0][:, :-1]
            losses, scored = token_losses(base.get_output_embeddings(), hidden, targets)
            if not len(nll):
                nll, tokens = nll.new_zeros(targets.shape[1]), tokens.new_zeros(targets.shape[1])
            nll += losses.sum(0).cpu()
            tokens += scored.sum(0).cpu()
            bar.update(len(rows))
    if not tokens.sum():
        raise UserError("There is no token to score: give an evaluation text of at least two tokens with labels.")
    return PerplexityResult.from_positions(nll, tokens, time.perf_counter() - started)


def token_losses(head: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token, the output layer applied in chunks.

    Args:
        head: the output embeddings, D -> V.
        hidden: `(B, L, D)`.
        targets: `(B, L)`, -100 where not scored.

    Returns:
        `(B, L)` float64 nats, 0 where not scored; `(B, L)` bool, where scored.
    """
    scored = targets != -100
    flat_hidden, flat_targets = hidden[scored], targets[scored]
    chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    parts = []
    for start in range(0, len(flat_targets), chunk):
        logits = head(flat_hidden[start : start + chunk])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        parts.append(functional.cross_entropy(logits, flat_targets[start : start + chunk], reduction="none").double())
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    if parts:
        losses[scored] = torch.cat(parts).to(targets.device)
    return losses, scored


def _progress(blocks: Any, description: str) -> tqdm:
    return tqdm(total=len(blocks), desc=description, unit="block", leave=False)
