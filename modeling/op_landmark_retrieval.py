"""The grouped softmax over a query's own block and the best few of the blocks before it, in PyTorch.

Legend as in `op_landmark.py`; K = top_k, N slots of stored blocks, U local blocks. A group is the call's queries of
one own block; lanes are its queries, w of them at most. Keys are rotated by their place in the block alone, so a block
that lies m blocks before the query's is read by the query rotated to `place + m P`, and no key is rotated again.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .compiled import for_training
from .op_landmark_chunked import HIDDEN, product, weighted

CONTRACT = 2  # of both ops; 1 weighed a block by the score that selected it
SELECTIONS = ("token_and_head", "head", "token")
BLOCK_WEIGHTS = ("landmark", "tokens")
RECENCY = 1e-5  # what a block's score loses for each block of its age, when blocks are selected
TILE_ELEMENTS = 2**26  # numbers of retrieved keys, or of logits, that a tile may hold


class LandmarkBlocks(NamedTuple):
    """Complete blocks of a batch of rows, in slots of any order.

    key, value `(B, G, N, P, D)`: keys rotated by their place in the block; on the query's device, or on the CPU.
    landmark: what ranks them, on the query's device: `(B, G, N, D)`, the key at place P - 1 of each; or `(B, G, N, C,
    2 D)`, the elementwise greatest and least key of each of its C parts, whose bound of their scores counts. index
    `(B, N)` int64: number of the block in a slot, -1 = empty.
    """

    key: Tensor
    value: Tensor
    landmark: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


class _Call(NamedTuple):
    """What does not change between the tiles of a call."""

    blocks: LandmarkBlocks
    top_k: int
    selection: str
    max_blocks: int | None
    rotary: tuple[Tensor, Tensor] | None
    scaling: float
    gated: bool  # whether a block weighs by its landmark, not by its tokens

    @property
    def bounds(self) -> bool:
        """Whether blocks are ranked by bounds of their tokens' scores."""
        return self.blocks.landmark.dim() == 5


def run_retrieval(
    query, key, value, blocks, *, position, first, top_k, selection, max_blocks, rotary, scaling, block_weight
):
    """`landmark_retrieval_attention` without its checks."""
    if query.shape[2] == 0:
        return query
    batch, heads, _, dim = query.shape
    count, size = key.shape[2:4]
    lanes = _Lanes(position, first, count, size)
    scaling = dim**-0.5 if scaling is None else scaling
    stored = blocks.index.shape[1]
    selecting = count * heads * (1 if selection == "head" else lanes.width)
    if blocks.key.device != query.device and selecting * top_k >= stored * key.shape[1]:
        # What many queries select is nearly everything, much of it more than once: it comes once, for this call.
        blocks = blocks._replace(key=blocks.key.to(query.device), value=blocks.value.to(query.device))
    if top_k >= stored:
        selection = "head"  # whichever it is, all are selected
    call = _Call(blocks, min(top_k, stored), selection, max_blocks, rotary, scaling, block_weight == "landmark")
    groups = lanes.spread(query)  # (B, H, U, w, D)
    wide = lanes.width
    if _reads_all(call, wide, query.device):
        each = batch * heads * blocks.index.shape[1] * max(size, dim)  # of a lane
        wide = min(wide, max(2, TILE_ELEMENTS // max(1, each)))
    else:
        each = batch * heads * call.top_k * size * dim // (wide if selection == "head" else 1)
    each = max(each, batch * heads * blocks.landmark.shape[2:-1].numel() if call.bounds else 0)
    step = max(1, TILE_ELEMENTS // max(1, each * wide))
    outputs = []
    for start in range(0, count, step):
        part, pieces = slice(start, start + step), []
        for lane in range(0, lanes.width, wide):
            some = slice(lane, lane + wide)
            tile = (groups[:, :, part, some], key[:, :, part], value[:, :, part], lanes.own[:, part])
            run, place = for_training(_attend), lanes.place[:, part, some]
            if torch.is_grad_enabled() and query.requires_grad and (count > step or wide < lanes.width):
                pieces.append(checkpoint(run, call, *tile, place, use_reentrant=False))
            else:
                pieces.append(run(call, *tile, place))
        outputs.append(torch.cat(pieces, dim=3))
    return lanes.collect(torch.cat(outputs, dim=2)).to(query.dtype)


def _reads_all(call: _Call, width: int, device) -> bool:
    """Whether a tile multiplies all stored blocks: its lanes select for themselves, and the blocks are at hand."""
    return call.selection != "head" and width > 1 and call.blocks.key.device == device


class _Lanes:
    """Queries by own block: group u of a row holds those of block `first + u`, from its first query on.

    Attributes:
        width: w. own: `(B, U)`, number of the block. place: `(B, U, w)` in it, -1 where no query is.
    """

    def __init__(self, position: Tensor, first: Tensor, count: int, size: int):
        length = position.shape[1]
        self.width, self.real = min(size, length), position >= 0
        self.own = first[:, None] + torch.arange(count, device=position.device)
        begin = torch.where(self.real, position, torch.iinfo(position.dtype).max).amin(1, keepdim=True)
        group = (position // size - first[:, None]).clamp(0, count - 1)
        lane = position - torch.maximum(begin, self.own.gather(1, group) * size)
        total = count * self.width
        self.slot = torch.where(self.real, group * self.width + lane, total)
        token = torch.full((position.shape[0], total + 1), length, device=position.device)
        token.scatter_(1, self.slot, torch.arange(length, device=position.device).expand_as(position).contiguous())
        self.token = token[:, :total]
        places = functional.pad(torch.where(self.real, position % size, -1), (0, 1), value=-1)
        self.place = places.gather(1, self.token).unflatten(1, (count, self.width))

    def spread(self, x: Tensor) -> Tensor:
        """`(B, H, T, D)` to `(B, H, U, w, D)`."""
        index = self.token[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return functional.pad(x, (0, 0, 0, 1)).gather(2, index).unflatten(2, (-1, self.width))

    def collect(self, x: Tensor) -> Tensor:
        """Back to the tokens, zeros at padding."""
        x = functional.pad(x.flatten(2, 3), (0, 0, 0, 1))
        return x.gather(2, self.slot[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _attend(call, query, key, value, own, place):
    """Some groups: query `(B, H, u, w, D)`, key and value `(B, G, u, P, D)`, own `(B, u)`, place `(B, u, w)`."""
    heads, size = query.shape[1], key.shape[3]
    turned = _rotations(call, query, place, size)  # (B, H, u, w, K + 2, D)
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    logits = product(turned[..., 0, :], key.transpose(-1, -2))[..., :-1] * call.scaling
    visible = torch.arange(size - 1, device=place.device) <= place[..., None]
    logits = logits.masked_fill(~visible[:, None], HIDDEN)
    local = value[..., :-1, :]
    if call.top_k == 0:
        return weighted(logits, local)
    age = own[..., None] - call.blocks.index[:, None]  # (B, u, N), 1 = the block before
    open_ = (age > 0) & (call.blocks.index >= 0)[:, None]
    if call.max_blocks is not None:
        open_ = open_ & (age <= call.max_blocks)
    found = open_.sum(-1).clamp(max=call.top_k)  # (B, u), the K of each group
    with torch.no_grad():
        scores = _landmark_scores(call, turned, age, open_, found)
        slots = _select(call, scores, age, open_, place)  # (B, H, u, v, K); v = w, or 1 where lanes share
    read = _read_all if _reads_all(call, query.shape[3], query.device) else _read_few
    return _combine(logits, local, *read(call, turned, *_lay_out(slots, age, found)))


def _rotations(call: _Call, query: Tensor, place: Tensor, size: int) -> Tensor:
    """The queries as they read blocks that lie 0 to K + 1 blocks back: `(B, H, u, w, K + 2, D)`."""
    count = call.top_k + 2
    if call.rotary is None:
        return query[..., None, :].expand(*query.shape[:-1], count, query.shape[-1])
    at = place.clamp(min=0)[..., None] + size * torch.arange(count, device=place.device)
    cos, sin = (table[at][:, None] for table in call.rotary)
    query = query[..., None, :].to(torch.promote_types(query.dtype, cos.dtype))
    front, back = query.chunk(2, dim=-1)
    return query * cos + torch.cat([-back, front], dim=-1) * sin


def _landmark_scores(call, turned, age, open_, found):
    """Of every candidate, as if its block lay where it is among the last K, else K + 1 back: `(B, H, u, w, N)`."""
    batch, heads, u, w, _, _ = turned.shape
    landmark = call.blocks.landmark
    each = heads // landmark.shape[1]
    far = _at(turned, (found + 1)[:, None, :, None, None].expand(-1, heads, -1, w, 1))[..., 0, :]
    grouped = far.unflatten(1, (-1, each)).flatten(2, 4)  # (B, G, H/G * u * w, D)
    if call.bounds:
        scores = product(_halves(grouped), landmark.flatten(2, 3).transpose(-1, -2))
        scores = scores.unflatten(-1, landmark.shape[2:4]).amax(-1) * call.scaling
    else:
        scores = product(grouped, landmark.transpose(-1, -2)) * call.scaling
    scores = scores.unflatten(2, (each, u, w)).flatten(1, 2)
    # The last K: the slot of each age, 1 to K; ages that are not there go to a place that is cut off.
    recent = open_ & (age <= found[..., None])
    slot = torch.zeros(batch, u, call.top_k + 1, dtype=torch.long, device=age.device)
    number = torch.arange(age.shape[-1], device=age.device).expand_as(age)
    slot.scatter_(-1, torch.where(recent, age - 1, call.top_k), number)
    there = torch.zeros_like(slot, dtype=torch.bool).scatter_(-1, torch.where(recent, age - 1, call.top_k), True)
    slot, there = slot[..., :-1], there[..., :-1]
    index = slot.flatten(1).view(batch, 1, -1, *[1] * (landmark.dim() - 3))
    near = landmark.gather(2, index.expand(-1, landmark.shape[1], -1, *landmark.shape[3:]))
    near = near.unflatten(2, (u, call.top_k)).repeat_interleave(each, dim=1)  # (B, H, u, K, D), or bounds
    if call.bounds:
        exact = product(_halves(turned[..., 1:-1, :]).transpose(3, 4), near.transpose(-1, -2)).amax(-1)
        exact = exact.transpose(3, 4) * call.scaling
    else:
        exact = (turned[..., 1:-1, :].to(scores.dtype) * near[:, :, :, None].to(scores.dtype)).sum(-1) * call.scaling
    # Where an age is missing its entry points at slot 0: add nothing there.
    index = slot[:, None, :, None].expand_as(exact)
    change = (exact - scores.gather(-1, index)) * there[:, None, :, None]
    return scores.scatter_add(-1, index, change).masked_fill(~open_[:, None, :, None], HIDDEN)


def _halves(query: Tensor) -> Tensor:
    """`(..., D)` to `(..., 2 D)`: what meets the greatest key, and what meets the least."""
    return torch.cat([query.clamp(min=0), query.clamp(max=0)], dim=-1)


def _at(turned: Tensor, index: Tensor) -> Tensor:
    """Rotations `(B, H, u, w, K, D)` of the numbers `(B, H, u, w, K)`."""
    return turned.gather(4, index[..., None].expand(*index.shape, turned.shape[-1]))


def _select(call: _Call, scores: Tensor, age: Tensor, open_: Tensor, place: Tensor) -> Tensor:
    """Slots of the best blocks, best first; what is beyond a group's K is arbitrary.

    In a first layer all landmarks have the same key, and the newest of equals is taken.
    """
    if call.selection != "token_and_head":
        scores = scores.log_softmax(-1)
        if call.selection == "head":
            scores = scores.masked_fill((place < 0)[:, None, :, :, None], HIDDEN).amax(3, keepdim=True)
        else:
            scores = scores.amax(1, keepdim=True).expand_as(scores)
    scores = scores - RECENCY * age[:, None, :, None]
    return scores.masked_fill(~open_[:, None, :, None], HIDDEN).topk(call.top_k, dim=-1).indices


def _lay_out(slots: Tensor, age: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The selected blocks in order of the text, `(B, H, u, v, K)` each: slots, which count, blocks they lie back."""
    found = found[:, None, :, None, None]
    count = slots.shape[-1]
    rank = torch.arange(count, device=slots.device)
    ages = age[:, None, :, None].expand(*slots.shape[:-1], -1).gather(-1, slots)
    far = torch.iinfo(ages.dtype).max
    ages, order = torch.where(rank < found, ages, far).sort(dim=-1, descending=True)  # what does not count is first
    slots, valid = slots.gather(-1, order), ages < far
    behind = found + 1 - (rank - (count - found)) - (ages <= found).long()
    return slots, valid, torch.where(valid, behind, 0)


def _weighed(call: _Call, scores: Tensor) -> Tensor:
    """Logits `(..., F)` of blocks' tokens from scores `(..., P)` of their keys, where they are read: a gated block's
    weight is its landmark's score there."""
    logits = scores[..., :-1]
    return logits + (scores[..., -1] - logits.logsumexp(-1))[..., None] if call.gated else logits


def _read_few(call, turned, slots, valid, behind):
    """Fetch the selected blocks, `(B, H, u, v, K)`, and nothing else.

    Returns:
        Logits `(B, H, u, w, K * F)`, and what multiplies weights of that shape with the values.
    """
    batch, heads, u, v, count = slots.shape
    share = turned.shape[3] // v
    groups, stored = call.blocks.key.shape[1:3]
    row = torch.arange(batch * groups, device=slots.device).view(batch, groups, 1).repeat_interleave(
        heads // groups, dim=1
    )  # fmt: skip
    flat = (row[..., None, None] * stored + slots).flatten()

    def fetch(x: Tensor) -> Tensor:
        rows = x.flatten(0, 2)
        if x.device == slots.device:
            picked = rows.index_select(0, flat)
        else:
            picked = torch.empty(len(flat), *rows.shape[1:], dtype=x.dtype, pin_memory=slots.is_cuda)
            torch.index_select(rows, 0, flat.to(x.device), out=picked)
        return picked.to(slots.device, non_blocking=True).view(*slots.shape, *x.shape[3:])

    key, value = fetch(call.blocks.key), fetch(call.blocks.value)[..., :-1, :].flatten(4, 5)
    wide = behind.repeat_interleave(share, dim=3) if share > 1 else behind
    query = _at(turned, wide).unflatten(3, (v, share)).transpose(4, 5)  # (B, H, u, v, K, w/v, D)
    logits = _weighed(call, product(query, key.transpose(-1, -2)) * call.scaling)
    logits = (
        logits.masked_fill(~valid[..., None, None], HIDDEN).transpose(4, 5).reshape(batch, heads, u, v * share, -1)
    )

    def read(weights: Tensor) -> Tensor:
        return product(weights.unflatten(3, (v, share)), value).flatten(3, 4)

    return logits, read


def _read_all(call, turned, slots, valid, behind):
    """As `_read_few`, with every stored block multiplied and what a lane did not select hidden: the lanes of a group
    select different blocks, of which each lane's own copy would be far more to move than this is to compute."""
    heads, u, w = turned.shape[1:4]
    key, value = call.blocks.key, call.blocks.value[..., :-1, :].flatten(2, 3)
    each = heads // key.shape[1]
    empty = torch.zeros(*turned.shape[:4], key.shape[2], dtype=torch.long, device=slots.device)
    query = _at(turned, empty.scatter(-1, slots, behind))  # (B, H, u, w, N, D)
    chosen = (empty > 0).scatter(-1, slots, valid)
    query = query.unflatten(1, (-1, each)).flatten(2, 4).transpose(2, 3)  # (B, G, N, H/G * u * w, D)
    logits = _weighed(call, product(query, key.transpose(-1, -2)) * call.scaling)
    logits = logits.transpose(2, 3).unflatten(2, (each, u, w)).flatten(1, 2)  # (B, H, u, w, N, F)
    logits = logits.masked_fill(~chosen[..., None], HIDDEN).flatten(4)

    def read(weights: Tensor) -> Tensor:
        rows = weights.unflatten(1, (-1, each)).flatten(2, 4)
        return product(rows, value).unflatten(2, (each, u, w)).flatten(1, 2)

    return logits, read


def _combine(near: Tensor, local: Tensor, far: Tensor, read) -> Tensor:
    """One softmax over local logits `(B, H, u, w, F)`, with values `(B, H, u, F, D)`, and those of selected blocks."""
    highest = torch.maximum(near.amax(-1, keepdim=True), far.amax(-1, keepdim=True))
    near, far = ((x - highest).exp() * (x > HIDDEN / 2) for x in (near, far))
    total = (near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True)).clamp(min=1e-20)
    return (product(near, local) + read(far)) / total
