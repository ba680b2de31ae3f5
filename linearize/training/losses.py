"""Cross-entropy and distillation computed from hidden states, one chunk of tokens at a time.

A language model head over 128k words makes the logits the largest tensor of a finetuning step (0.5 GiB in float32 for
1024 tokens). Here only the supervised positions go through the head, a chunk at a time; with more than one chunk, each
is recomputed in the backward pass, so that no more than one chunk's logits (two with a teacher) are alive.

Legend: B batch, T tokens, N supervised tokens, E hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.data.masking import IGNORE_INDEX


@dataclass(frozen=True)
class LossWeights:
    """How cross-entropy and distillation are summed: `ce_weight * CE + kl_weight * KL(teacher || student)`."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels."""
    kl_weight: float = 0.0
    """Weight of the divergence from the teacher's distribution; 0 needs no teacher."""
    temperature: float = 1.0
    """Both distributions are softmax(logits / temperature); the divergence is multiplied by temperature ** 2, which
    keeps the size of its gradient independent of the temperature (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531, section 2)."""


@dataclass(frozen=True)
class LossSums:
    """Sums over supervised tokens, each divided by the denominator; scalars."""

    total: Tensor
    """What is differentiated."""
    cross_entropy: Tensor
    """Unweighted and detached; nats per token."""
    divergence: Tensor
    """Unweighted (but times temperature ** 2) and detached; nats per token."""


def supervised_tokens(labels: Tensor) -> Tensor:
    """Number of positions that have a next token to predict.

    Args:
        labels: `[B, T]`, -100 where there is no loss; not shifted.

    Returns:
        Integer scalar.
    """
    return labels[..., 1:].ne(IGNORE_INDEX).sum()


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _chunk_loss(
    hidden: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    head: Callable[[Tensor], Tensor],
    weights: LossWeights,
    teacher_head: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed losses of one chunk: hidden states `[n, E]`, labels `[n]` -> (total, cross-entropy, divergence)."""
    logits = at_least_float32(head(hidden))
    zero = logits.new_zeros(())
    # With weight 0 the cross-entropy is still worth seeing in the log, at no cost in the backward pass.
    cross_entropy = F.cross_entropy(logits if weights.ce_weight else logits.detach(), labels, reduction="sum")
    divergence = zero
    if teacher_hidden is not None:
        with torch.no_grad():
            target = (at_least_float32(teacher_head(teacher_hidden)) / weights.temperature).log_softmax(-1)
        student = (logits / weights.temperature).log_softmax(-1)
        divergence = F.kl_div(student, target, reduction="sum", log_target=True) * weights.temperature**2
    total = weights.ce_weight * cross_entropy + weights.kl_weight * divergence
    return total, cross_entropy.detach(), divergence.detach()


def _supervised(hidden: Tensor, labels: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The positions with a next token to predict: hidden states `[N, E]`, targets `[N]`, the teacher's `[N, E]`."""
    targets = labels[:, 1:].reshape(-1)
    keep = targets.ne(IGNORE_INDEX).nonzero().squeeze(-1)
    chosen = None if teacher is None else teacher[:, :-1].flatten(0, 1)[keep]
    return hidden[:, :-1].flatten(0, 1)[keep], targets[keep], chosen


def language_model_loss(
    hidden_states: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    weights: LossWeights | None = None,
    teacher_hidden_states: Tensor | None = None,
    teacher_head: Callable[[Tensor], Tensor] | None = None,
    denominator: Tensor | float | None = None,
    logits_chunk: int = 1024,
) -> LossSums:
    """Next-token loss from the last hidden states, without ever holding all logits.

    Args:
        hidden_states: The student's `[B, T, E]`, after the final norm.
        labels: `[B, T]`, the input tokens themselves with -100 where there is no loss; shifted by one here.
        head: The language model head, `[n, E] -> [n, V]`.
        weights: Default: cross-entropy alone.
        teacher_hidden_states: The teacher's `[B, T, E]`, needed when `kl_weight` is not 0; no gradient flows into it.
        teacher_head: Its head; default: the student's.
        denominator: Number of tokens to divide by; default: the supervised tokens of this batch. A caller that
            accumulates gives the count of the whole global batch, so that every token weighs the same however the
            batch is cut.
        logits_chunk: Tokens whose logits are computed at once.

    Returns:
        Scalars in float32 (float64 for a float64 model).

    Raises:
        ValueError: `kl_weight` without a teacher, or a chunk below 1 token.
    """
    weights = weights or LossWeights()
    if weights.kl_weight and teacher_hidden_states is None:
        raise ValueError("kl_weight needs teacher_hidden_states")
    if logits_chunk < 1:
        raise ValueError(f"logits_chunk must be at least 1 token, got {logits_chunk}")
    hidden, targets, teacher = _supervised(hidden_states, labels, teacher_hidden_states)
    # Starting the sum from the hidden states keeps the graph (and DDP's hooks) alive when a batch has no supervised
    # token.
    zero = at_least_float32(hidden_states.new_zeros(()))
    total = zero if len(targets) else at_least_float32(hidden_states.sum()) * 0.0
    cross_entropy, divergence = zero, zero
    for start in range(0, len(targets), logits_chunk):
        part = slice(start, start + logits_chunk)
        known = None if teacher is None else teacher[part]
        arguments = (hidden[part], targets[part], known, head, weights, teacher_head or head)
        if len(targets) > logits_chunk:
            sums = checkpoint(_chunk_loss, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = _chunk_loss(*arguments)
        total, cross_entropy, divergence = total + sums[0], cross_entropy + sums[1], divergence + sums[2]
    count = max(len(targets), 1) if denominator is None else denominator
    return LossSums(total / count, cross_entropy / count, divergence / count)
