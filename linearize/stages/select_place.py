"""Which layer gets which window: always the step that takes away most of the loss a byte."""

from __future__ import annotations

from collections.abc import Sequence


def place(losses: Sequence[Sequence[float]], sizes: Sequence[int], budget: int) -> list[int]:
    """Spend a budget of bytes on options of rising size, one for each layer.

    From the least option everywhere, the step of the largest fall in loss a byte is taken among those that still fit,
    until none does: along the lower convex hull of each layer's options. The sum of losses is the least there is for
    the bytes that are spent as long as every step has fitted; what is left then is less than a step of the hull.

    Args:
        losses: of each layer, by option.
        sizes: bytes of each option, none less than the one before.
        budget: bytes of all layers together, at least the least option in each.

    Returns:
        The option of each layer; of equal steps the one in the earliest layer goes first.
    """
    least = [option for option, size in enumerate(sizes) if size == sizes[0]]
    chosen, left = [min(least, key=row.__getitem__) for row in losses], budget - len(losses) * sizes[0]
    assert left >= 0, "the caller refuses such a budget"
    while True:
        steps = [
            ((row[now] - row[option]) / (sizes[option] - sizes[now]), -layer, option)
            for layer, (row, now) in enumerate(zip(losses, chosen, strict=True))
            for option in range(now + 1, len(sizes))
            if 0 < sizes[option] - sizes[now] <= left and row[option] < row[now]
        ]
        if not steps:
            return chosen
        _, layer, option = max(steps)
        left -= sizes[option] - sizes[chosen[-layer]]
        chosen[-layer] = option


def largest(losses: Sequence[float], count: int) -> list[int]:
    """The `count` layers of the largest loss, in order; of equal ones the earliest."""
    ranked = sorted(range(len(losses)), key=lambda layer: (-losses[layer], layer))
    return sorted(ranked[:count])
