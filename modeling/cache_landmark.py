"""The cache layer of landmark attention: complete blocks in preallocated slots, and the block that is being filled."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cache_layers import StateLayer
from .op_landmark_retrieval import LandmarkBlocks

SPARE = 1.5  # of the slots that are needed, so that growing copies a token less than three times in all
FEWEST = 16


class LandmarkState(NamedTuple):
    """Blocks and tail of a batch of rows.

    key, value `(B, G, N + 1, P, D)`, landmark `(B, G, N + 1, D)`, or bounds `(B, G, N + 1, C, 2 D)`, index
    `(B, N + 1)`: as in `LandmarkBlocks`; block i lies in slot i % N, the last slot takes what is no block. tail_key,
    tail_value `(B, G, P, D)`: the incomplete block, zeros beyond its tokens. count `(B,)`: tokens of each row,
    landmarks counted.
    """

    key: Tensor
    value: Tensor
    landmark: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    tail_key: Tensor
    tail_value: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


class LandmarkStateLayer(StateLayer):
    """The blocks of landmark attention. Appending copies the new tokens alone; slots grow by half when they run out.

    Attributes:
        longest: upper bound of any row's tokens, landmarks counted, known without asking a GPU.
        on_cpu: whether blocks are kept in CPU memory.
    """

    _layer_type = "linearize_landmark_1"

    def __init__(self, **kwargs):
        super().__init__()
        self.longest, self.on_cpu = 0, False

    def append(
        self,
        key: Tensor,
        value: Tensor,
        landmarks,
        size: int,
        max_blocks: int | None,
        offload: bool,
        finish: Callable[[Tensor, Tensor], Tensor] | None,
        summary: Callable[[Tensor], Tensor],
    ) -> tuple[tuple[Tensor, Tensor], Tensor, LandmarkBlocks]:
        """Take a call's keys, rotated by their place, and values, `(B, G, L, D)` each.

        Args:
            landmarks: the call's `Landmarks`. size: P. max_blocks: blocks to keep, None: all. offload: keep them on
                the CPU. finish: takes keys `(B, G, U, P, D)` and which blocks are complete, `(B, U)`, and gives them
                their landmarks' keys; None where no block is completed, or the keys are the landmarks' own.
            summary: takes keys `(B, G, U, P, D)` and gives what ranks the blocks, the `landmark` of `LandmarkBlocks`.

        Returns:
            Keys and values of the blocks that the call touches, number of the first, and the complete blocks.
        """
        batch, groups, length, dim = key.shape
        position = landmarks.position
        state: LandmarkState | None = self.state
        self.on_cpu = offload
        if state is not None and state.key.is_inference() and not torch.is_inference_mode_enabled():
            state = LandmarkState(*(x.clone() for x in state))  # what inference mode made cannot be filled outside it
        if state is None:
            zeros = key.new_zeros(batch, groups, size, dim)
            state = _empty(key, size, offload, summary)._replace(tail_key=zeros, tail_value=zeros)
        touched = (length + size - 2) // size + 1
        self.longest += length
        state = self._with_room(state, touched, size, max_blocks)
        first = state.count // size
        slot = torch.where(position >= 0, position - first[:, None] * size, touched * size)
        filled = [
            _fill(tail, x, slot, touched) for tail, x in ((state.tail_key, key), (state.tail_value, value))
        ]  # (B, G, touched + 1, P, D), the last one empty
        count = state.count + (position >= 0).sum(1)
        number = first[:, None] + torch.arange(touched, device=key.device)
        complete = (number + 1) * size <= count[:, None]
        if finish is not None:
            filled[0] = torch.cat([finish(filled[0][:, :, :-1], complete), filled[0][:, :, -1:]], dim=2)
        state = _keep(state, filled, summary(filled[0][:, :, :-1]), number, complete)
        rest = (count // size - first)[:, None, None, None, None].expand(-1, groups, 1, size, dim)
        tails = [x.gather(2, rest)[:, :, 0] for x in filled]
        state = state._replace(tail_key=tails[0], tail_value=tails[1], count=count)
        blocks = LandmarkBlocks(state.key, state.value, state.landmark, state.index)
        if max_blocks is not None and state.index.shape[1] > 2 * max(max_blocks + 1, FEWEST):
            state = _moved(state, max_blocks + 1)  # after a long call
        self.store(state, landmarks.tokens)
        self.device = count.device  # not that of the blocks, which may lie elsewhere
        return (filled[0][:, :, :-1], filled[1][:, :, :-1]), first, blocks

    def _with_room(self, state: LandmarkState, touched: int, size: int, max_blocks: int | None) -> LandmarkState:
        """Slots for all blocks that a query of this call may read, and those that it completes."""
        needed = (
            self.longest // size + 1 if max_blocks is None else min(self.longest // size, max_blocks + touched) + 1
        )
        slots = state.index.shape[1] - 1
        return state if slots >= needed else _moved(state, max(FEWEST, needed, int(SPARE * slots)))

    def reset(self) -> None:
        super().reset()
        self.longest = 0

    def prefetch(self) -> None:
        """Nothing of what lies on the CPU by its setting comes back."""
        state = self.state
        if state is not None and state.landmark.device != self.device:
            stays = ("key", "value") if self.on_cpu else ()
            self.state = LandmarkState(
                **{
                    name: x if name in stays else x.to(self.device, non_blocking=True)
                    for name, x in state._asdict().items()
                }
            )


def _empty(like: Tensor, size: int, offload: bool, summary: Callable[[Tensor], Tensor]) -> LandmarkState:
    """No slot but the one that takes what is no block."""
    batch, groups, _, dim = like.shape
    where = {"device": "cpu", "pin_memory": like.is_cuda} if offload else {"device": like.device}
    store = [torch.zeros(batch, groups, 1, size, dim, dtype=like.dtype, **where) for _ in range(2)]
    nothing = like.new_zeros(batch, groups, size, dim)
    index = torch.full((batch, 1), -1, device=like.device)
    count = torch.zeros(batch, dtype=torch.long, device=like.device)
    landmark = torch.zeros_like(summary(nothing[:, :, None]))
    return LandmarkState(store[0], store[1], landmark, index, nothing, nothing, count)


def _moved(state: LandmarkState, slots: int) -> LandmarkState:
    """The same blocks, the last ones if not all fit, in as many slots."""
    old, batch = state.index, state.index.shape[0]
    oldest = state.count[:, None] // state.tail_key.shape[2] - slots
    target = torch.where((old >= 0) & (old >= oldest), old % slots, slots)

    def move(x: Tensor) -> Tensor:
        shape = (batch, x.shape[1], slots + 1, *x.shape[3:])
        new = torch.zeros(shape, dtype=x.dtype, device=x.device, pin_memory=x.is_pinned())
        return _put(new, x, target)

    index = torch.full((batch, slots + 1), -1, device=old.device).scatter_(1, target, old)
    index[:, -1] = -1
    return state._replace(
        key=move(state.key), value=move(state.value), landmark=move(state.landmark), index=index
    )  # fmt: skip


def _fill(tail: Tensor, new: Tensor, slot: Tensor, touched: int) -> Tensor:
    """The tail's block and those after it with the new tokens, and an empty one: `(B, G, touched + 1, P, D)`."""
    batch, groups, size, dim = tail.shape
    room = torch.cat([tail, tail.new_zeros(batch, groups, touched * size, dim)], dim=2)
    room = room.scatter(2, slot[:, None, :, None].expand_as(new), new)
    room = room.unflatten(2, (touched + 1, size))
    room[:, :, -1] = 0  # padding went there
    return room


def _keep(
    state: LandmarkState, filled: list[Tensor], landmark: Tensor, number: Tensor, complete: Tensor
) -> LandmarkState:
    """Put the complete blocks into their slots, in place."""
    slots = state.index.shape[1] - 1
    target = torch.where(complete, number % max(slots, 1), slots)
    index = state.index.scatter(1, target, torch.where(complete, number, -1))
    index[:, -1] = -1
    landmark = _put(state.landmark, landmark, target)
    if state.key.device == target.device or bool(complete.any()):
        for store, x in ((state.key, filled[0]), (state.value, filled[1])):
            _put(store, x[:, :, :-1].to(store.device), target)
    return state._replace(index=index, landmark=landmark)


def _put(store: Tensor, x: Tensor, slot: Tensor) -> Tensor:
    """`store[b, g, slot[b, i]] = x[b, g, i]`, in place."""
    index = slot.to(store.device).view(slot.shape[0], 1, -1, *[1] * (x.dim() - 3)).expand_as(x)
    return store.scatter_(2, index, x)
