"""What is left of the memory: the sums of log_decay before the kernels, and its gradient after them.

Key j enters the memory at token j + W and weighs `exp2(sums_n - sums_(j + W))` for query n of the same chunk, where
the sums of log_decay, to base 2, start anew with each chunk, so that no difference of long sums is ever taken. A
chunk's last sum is the decay of what was there before it; the sums over the tokens after `j + W` say what its end
still holds of the key.

The gradient of log_decay_i adds up all pairs that it lies between: those that lie across its chunk's end, for which
the reverse kernel leaves its sums times the forward's, and those inside, as the sum over the chunk's tokens from i on
of what each sends as a query, less what it sends as the place where a key enters.

Legend as in `forward.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch, next_power_of_2
from .forward import LOG2E
from .rows import PLAIN, Blocks, Rows, find_block

WARPS, STAGES = 4, 1


@triton.jit
def hybrid_linear_decay_fwd_kernel(
    log_decay, sums, table, base, start, size, number, length, plane,
    E: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """sums `(2, B, E, T)`: log_decay to base 2 over the chunk's tokens up to each one, and 2 to that over those after
    it."""
    batch, head = tl.program_id(1) // E, tl.program_id(1) % E
    chunk, slot, first, count = find_block(tl.program_id(0), batch, table, base, number, start, size, length, KIND)
    inside = tl.arange(0, C)
    t = chunk * C + inside
    row = (batch.to(tl.int64) * E + head) * length + first
    step = tl.load(log_decay + row + t, mask=t < count, other=0.0).to(tl.float32)
    later = tl.load(log_decay + row + t + 1, mask=(t + 1 < count) & (inside < C - 1), other=0.0).to(tl.float32)
    # 2^-128 is 0 in float32: larger steps would only cost the sums their digits.
    step, later = tl.maximum(step * LOG2E, -128.0), tl.maximum(later * LOG2E, -128.0)
    tl.store(sums + row + t, tl.cumsum(step.to(tl.float64), 0).to(tl.float32), mask=t < count)
    tl.store(sums + plane + row + t, tl.exp2(tl.cumsum(later, 0, reverse=True)), mask=t < count)


@triton.jit
def hybrid_linear_decay_bwd_kernel(
    terms, key_terms, across, ends, grad_decay, table, base, start, size,
    number, length, slots, plane, key_offset, key_length, states,
    H: tl.constexpr, E: tl.constexpr, F: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
    TILES: tl.constexpr, LAST: tl.constexpr, MAXIMUM: tl.constexpr, KIND: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """grad_decay `(B, E, T)` of log_decay; the other tensors as `decay_gradient` has them."""
    RATIO: tl.constexpr = H // E
    OWN: tl.constexpr = 5 if MAXIMUM else 4
    batch, head = tl.program_id(1) // E, tl.program_id(1) % E
    chunk, slot, first, count = find_block(tl.program_id(0), batch, table, base, number, start, size, length, KIND)
    b64 = batch.to(tl.int64)
    t = chunk * C + tl.arange(0, C)
    real = t < count
    j = t - W
    entered = real & (j >= (-W if PAST else 0))
    f = tl.arange(0, BF)
    inside = tl.zeros((C,), tl.float32)
    beyond = tl.zeros((BF,), tl.float32)
    for i in range(RATIO):
        row = b64 * H + head * RATIO + i
        inside += tl.load(terms + OWN * plane + row * length + first + t, mask=real, other=0.0)
        key = row * key_length + (key_offset if PAST else first) + j
        inside -= tl.load(key_terms + key, mask=entered, other=0.0)
        for tile in range(TILES):
            part = across + ((tile * states + row) * slots + slot + chunk) * F + f
            beyond += tl.load(part, mask=f < tl.where(count > 0, F, 0), other=0.0)
    total = tl.sum(beyond, 0)
    if LAST:
        total += tl.where((chunk + 1) * C >= count, tl.load(ends + b64 * E + head), 0.0)
    place = (b64 * E + head) * length + first + t
    tl.store(grad_decay + place, tl.cumsum(inside, 0, reverse=True) + total, mask=real)


def decay_sums(rows: Rows, blocks: Blocks, log_decay: Tensor, shared: dict) -> Tensor:
    """Sums of log_decay `(B, E, T)` in each chunk, to base 2, float32; padding is not written.

    Args:
        blocks: the chunks of queries. shared: compile-time constants of the call.

    Returns:
        `(2, B, E, T)`: over a chunk's tokens up to each token, and 2 to the power of that over those after it.
    """
    batch, heads, length = log_decay.shape
    sums = torch.empty(2, batch, heads, length, dtype=torch.float32, device=log_decay.device)
    launch(
        hybrid_linear_decay_fwd_kernel,
        (blocks.total, batch * heads),
        (log_decay, sums, blocks.row, blocks.base, rows.start, rows.size),
        (rows.number, length, log_decay.numel()),
        {},
        WARPS,
        STAGES,
        shared=shared,
    )
    return sums


def decay_gradient(
    rows: Rows, blocks: Blocks, terms: Tensor, key_terms: Tensor, across: Tensor, ends: Tensor | None, window: int,
    shared: dict,
) -> Tensor:  # fmt: skip
    """The gradient of log_decay, `(B, E, T)` float32, 0 at padding.

    Args:
        terms: `(planes, B, H, T)` of the query kernel; the last has phi_q . d phi_q.
        key_terms: `(B, H, T')`, phi_k . d phi_k.
        across: `(tiles of V, B H, slots, F)`, parts of the sum over all pairs that lie across each chunk's end.
        ends: `(B, E)`, what the state after the last token sends to all that it remembers; None: nothing.
        blocks: the chunks of queries. shared: compile-time constants of the call.
    """
    _, batch, heads, length = terms.shape
    feature_heads = shared["E"]
    make = torch.empty if rows.kind == PLAIN else torch.zeros
    grad = make(batch, feature_heads, length, dtype=torch.float32, device=terms.device)
    launch(
        hybrid_linear_decay_bwd_kernel,
        (blocks.total, batch * feature_heads),
        (terms, key_terms, across, ends, grad, blocks.row, blocks.base, rows.start, rows.size),
        (rows.number, length, blocks.total, batch * heads * length, window, key_terms.shape[2], batch * heads),
        {"TILES": across.shape[0], "LAST": ends is not None, "BF": next_power_of_2(shared["F"])},
        WARPS,
        STAGES,
        shared=shared,
    )
    return grad
