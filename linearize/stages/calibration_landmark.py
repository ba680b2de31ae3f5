"""The calibration of landmark attention: landmarks' keys are fitted to the model's own scores.

Where a landmark's score is the logsumexp of its block's scores, the grouped softmax is the ordinary one. For every
query, the softmax over its own block and the blocks before it, by their logsumexp, is the target; the same with the
landmarks' scores in place of those of earlier blocks is what is fitted, by the divergence between the two and by Adam
on the few numbers of each layer that pool a block's keys. A layer takes its steps as a sequence passes through it, so
that the layers behind it see what is better already. Nothing else of the model changes.

Source: this project's; Yuan et al. 2025 (arXiv 2502.11089) and DeepSeek-AI 2025 (V3.2-Exp) train what selects tokens
by the distribution of full attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.errors import UserError
from linearize.evaluation.arms import input_device, measuring
from linearize.modeling.attention_landmark import block_rotated, rotated
from linearize.stages.calibration_report import CalibrationReport, batched

MEASURE = "divergence of the blocks' weights from those of softmax attention, in nats,"
STEPS = 4  # on each batch
RATES = {"content": 2e-2, "place": 2e-2, "mix": 2e-3, "bias": 5e-2, "landmark": 1e-2}
HIDDEN = -1e30


def calibrate_landmark(model: Any, layers: dict[int, Any], rows: Sequence[Any], batch_size: int) -> CalibrationReport:
    """Fit what pools the keys; every process does all of it, and takes the main one's result.

    Args:
        model, rows, batch_size: as in `calibrate`. layers: attentions by layer.

    Raises:
        UserError: a key is the landmark token's alone, rows are shorter than two blocks, or scores are not finite.
    """
    batches = batched(rows, batch_size)
    fits = {layer: _Fit(layer, attention.mixer, STEPS * len(batches)) for layer, attention in layers.items()}
    report = CalibrationReport(len(rows), MEASURE)
    report.before = _pass(model, fits, batches, 0)
    _pass(model, fits, batches, STEPS)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for fit in fits.values():
            for parameter in fit.keys.parameters():
                torch.distributed.broadcast(parameter.data, 0)
    report.after = _pass(model, fits, batches, 0)
    return report


def _pass(model: Any, fits: dict[int, _Fit], batches: Sequence[dict[str, Tensor]], steps: int) -> dict[int, float]:
    """All sequences once; the mean divergence of each layer as they came."""
    for fit in fits.values():
        fit.begin(steps)
    with measuring(model, "mixed") as base:
        device = input_device(base)
        try:
            for batch in batches:
                # No cache and no logits: a whole text, whose queries read every block.
                base.base_model(**{name: x.to(device) for name, x in batch.items()}, use_cache=False)
        finally:
            for fit in fits.values():
                fit.end()
    return {layer: fit.mean() for layer, fit in fits.items()}


class _Fit:
    """One layer's.

    Args:
        mixer: landmark attention. total: steps in all.
    """

    def __init__(self, layer: int, mixer: Any, total: int) -> None:
        if mixer.keys is None:
            raise UserError(
                f"Landmarks whose keys are not pooled (landmark_key: {mixer.config.landmark_key}) have nothing to "
                "calibrate: leave the stage out, or set landmark_key to pooled."
            )
        self.layer, self.mixer, self.keys = layer, mixer, mixer.keys
        groups = [{"params": [x], "lr": RATES[name]} for name, x in mixer.keys.named_parameters()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.02, max(1, total))

    def begin(self, steps: int) -> None:
        self.steps, self.sum, self.count = steps, 0.0, 0
        self.mixer.observer = self

    def end(self) -> None:
        self.mixer.observer = None

    def mean(self) -> float:
        if not self.count:
            size = self.mixer.config.block_size
            raise UserError(
                f"The calibration looks at blocks before a query's own, and its sequences have only one of {size} "
                "tokens: raise data.sequence_length, or lower attention.block_size."
            )
        return self.sum / self.count

    def __call__(self, mixer: Any, query: Tensor, blocks: Tensor, landmarks: Any) -> None:
        """A batch on its way through the layer."""
        scores = BlockScores(query, blocks, landmarks, mixer.scaling)
        if not scores.rows:
            return
        divergence = scores.divergence(self.keys(blocks.float()))
        if not bool(divergence.isfinite()):
            raise UserError(f"The scores of layer {self.layer} are not finite: load the model in another dtype.")
        self.sum += float(divergence)
        self.count += 1
        required = [x.requires_grad for x in self.keys.parameters()]
        self.keys.requires_grad_(True)
        with torch.enable_grad():
            for _ in range(self.steps):
                self.optimizer.zero_grad(set_to_none=True)
                # The mean over queries, but the sum over heads, which share no number but through the key heads.
                (scores.divergence(self.keys(blocks.float())) * query.shape[1]).backward()
                self.optimizer.step()
                self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter, flag in zip(self.keys.parameters(), required, strict=True):
            parameter.requires_grad_(flag)


class BlockScores:
    """A batch's queries, and what softmax attention gives each block.

    Args:
        query: `(B, H, T, D)`, unrotated. blocks: keys `(B, G, U, P, D)`, rotated by their place in the block.
        landmarks: the call's. scaling: of the scores.

    Attributes:
        rows: queries that have an earlier block, over all rows of the batch.
    """

    def __init__(self, query: Tensor, blocks: Tensor, landmarks: Any, scaling: float) -> None:
        position, (groups, count, size) = landmarks.position, blocks.shape[1:4]
        self.rotary, self.scaling, self.block_size = landmarks.rotary, scaling, size
        number = torch.arange(count, device=query.device)
        block = torch.where(position >= 0, position // size, -1)[..., None]
        self.rows = int((block > 0).sum())
        if not self.rows:
            return
        query = rotated(query.float(), self.rotary, position.clamp(min=0))
        self.query = query.unflatten(1, (groups, -1))  # (B, G, H/G, T, D)
        keys = block_rotated(blocks.float(), self.rotary, size)[..., :-1, :].flatten(2, 3)
        scores = (self.query @ keys[:, :, None].transpose(-1, -2)) * scaling
        place = (size * number[:, None] + torch.arange(size - 1, device=query.device)).flatten()
        hidden = place > position[..., None]  # of padding's queries all
        scores = scores.masked_fill(hidden[:, None, None], HIDDEN)
        self.sums = scores.unflatten(-1, (count, size - 1)).logsumexp(-1)  # (B, G, H/G, T, U)
        self.own = (number == block)[:, None, None]
        self.open = (number <= block)[:, None, None]
        self.weight = (block > 0)[:, None, None, :, 0] / (self.rows * query.shape[1])
        self.target = self.sums.masked_fill(~self.open, HIDDEN).log_softmax(-1)

    def divergence(self, keys: Tensor) -> Tensor:
        """Mean over queries and heads of the divergence with these landmarks' keys `(B, G, U, D)`, in nats."""
        keys = block_rotated(keys[:, :, :, None], self.rotary, self.block_size)[:, :, :, 0]
        gates = (self.query @ keys[:, :, None].transpose(-1, -2)) * self.scaling
        found = torch.where(self.own, self.sums, gates).masked_fill(~self.open, HIDDEN).log_softmax(-1)
        each = (self.target.exp() * (self.target - found)).masked_fill(~self.open, 0.0).sum(-1)
        return (each * self.weight).sum()
