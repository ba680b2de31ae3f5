"""The definition of landmark attention: row by row and block by block, its two softmaxes written out.

Notation: B batch, H query heads, G key/value heads, T tokens, D head dim, P block size (the landmark included, last in
its block), U blocks of a call, N stored blocks, K retrieved blocks. Blocks of a row are numbered from 0; a query's own
block is number n, and its place there is j.
Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), the grouped softmax and the positions of retrieved blocks. The
offset, a position per row, and retrieval for one own block at a time are this project's.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class _Group(NamedTuple):
    """An earlier block as some queries see it: its gate's logits, and those and the values of its F real tokens."""

    gate: Tensor  # (...)
    logits: Tensor  # (..., F)
    value: Tensor  # (..., F, D)


def _grouped_softmax(local: Tensor, value: Tensor, groups: list[_Group]) -> Tensor:
    """Attend to the own block's tokens and, behind one gate each, to the tokens of earlier blocks.

    Args:
        local: `(..., L)`, logits of the own block's tokens, -inf where hidden; a query that sees nothing has L = 0.
        value: `(..., L, D)` or what broadcasts to it.
        groups: the open earlier blocks.
    """
    top = torch.cat([local, *(group.gate[..., None] for group in groups)], -1).softmax(-1)
    length = local.shape[-1]
    output = top[..., :length] @ value
    for c, group in enumerate(groups):
        output = output + top[..., length + c, None] * (group.logits.softmax(-1) @ group.value)
    return output


# --- every earlier block is open


class _Tokens(NamedTuple):
    """What a row holds of one block."""

    real: list[int]
    landmark: list[int]  # one token, or none where the row ends before it


def _cut(length: int, block_size: int, offset: int) -> list[_Tokens]:
    """The blocks of a row of tokens whose first one has the place `offset` in its block."""
    blocks = [_Tokens([], []) for _ in range((offset + length - 1) // block_size + 1)]
    for token in range(length):
        number, place = divmod(offset + token, block_size)
        block = blocks[number]
        (block.landmark if place == block_size - 1 else block.real).append(token)
    return blocks


def _row(query: Tensor, key: Tensor, value: Tensor, block_size: int, offset: int, scaling: float, closed) -> Tensor:
    """One row without padding; all three are `(H, T, D)`; closed: numbers of the blocks that no other reads."""
    output = query.new_zeros(*query.shape[:2], value.shape[-1])
    earlier: list[_Tokens] = []
    for number, own in enumerate(_cut(query.shape[1], block_size, offset)):
        tokens = own.real + own.landmark
        q = query[:, tokens] * scaling
        later = torch.tensor(own.real)[None] > torch.tensor(tokens)[:, None]
        local = (q @ key[:, own.real].mT).masked_fill(later.to(q.device), -torch.inf)
        groups = []
        for block in earlier:
            gate = (q @ key[:, block.landmark].mT)[..., 0]
            groups.append(_Group(gate, q @ key[:, block.real].mT, value[:, block.real]))
        output[:, tokens] = _grouped_softmax(local, value[:, own.real], groups)
        if own.real and number not in closed:  # a landmark alone in its block gates nothing
            earlier.append(own)
    return output


def _closed(is_open: list[bool]) -> set[int]:
    """Numbers of the blocks of a row that are not open."""
    return {number for number, flag in enumerate(is_open) if not flag}


def reference(
    query, key, value, *, block_size, offset=0, scaling=None, attention_mask=None, cu_seqlens=None, open_blocks=None
) -> tuple[Tensor, None]:
    """Landmark attention by its definition; arguments and returns of `landmark_attention`."""
    batch, heads, length, dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    scaling = dim**-0.5 if scaling is None else scaling
    token = torch.arange(length, device=query.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        rows = [(0, token[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    elif attention_mask is not None:
        rows = [(b, token[attention_mask[b].bool()]) for b in range(batch)]
    else:
        rows = [(b, token) for b in range(batch)]
    offsets = offset.tolist() if isinstance(offset, Tensor) else [offset] * len(rows)
    closed = [set()] * len(rows) if open_blocks is None else [_closed(flags) for flags in open_blocks.tolist()]
    outputs = [query.new_zeros(heads, length, value.shape[-1], dtype=wide) for _ in range(batch)]
    with torch.autocast(query.device.type, enabled=False):
        for (b, real), start, shut in zip(rows, offsets, closed, strict=True):
            q, k, v = (x[b][:, real].to(wide) for x in (query, key, value))
            k, v = (x.repeat_interleave(heads // key.shape[1], 0) for x in (k, v))
            outputs[b][:, real] = _row(q, k, v, block_size, start % block_size, scaling, shut)
    return torch.stack(outputs).to(query.dtype), None


# --- some earlier blocks are retrieved


class _Rotary:
    """Rotation by the tables of positions 0, 1, ..., which may carry one common factor; none without tables."""

    def __init__(self, tables: tuple[Tensor, Tensor] | None, like: Tensor):
        self.tables = None if tables is None else tuple(table.to(like) for table in tables)

    def query(self, x: Tensor, positions: list[int]) -> Tensor:
        """Rotate `(..., T, D)` from nothing to T positions; the common factor goes in."""
        if self.tables is None:
            return x
        cos, sin = (table[positions] for table in self.tables)
        return x * cos + _quarter_turn(x) * sin

    def key(self, x: Tensor, start: int) -> Tensor:
        """Rotate `(..., D)`, which are rotated by their places, on to a block whose place 0 has position `start`.

        The rotation by the place has put the common factor in, so this one leaves it out.
        """
        if self.tables is None:
            return x
        cos, sin = (table[start] for table in self.tables)
        factor = (cos.square() + sin.square()).sqrt()
        return x * (cos / factor) + _quarter_turn(x) * (sin / factor)


def _quarter_turn(x: Tensor) -> Tensor:
    """Rotate each pair `(d, d + D/2)` by 90 degrees."""
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


class _Block(NamedTuple):
    """One block of a row: its number, its P keys (by place) and values `(H, P, D)`, its landmark's key `(H, D)` or
    the greatest and least keys of its C parts `(H, C, 2 D)`."""

    number: int
    key: Tensor
    value: Tensor
    landmark: Tensor


class _Settings(NamedTuple):
    """The options of a retrieval that are the same for all rows."""

    block_size: int
    top_k: int
    selection: str
    max_blocks: int | None
    scaling: float
    block_weight: str


RECENCY = 1e-5  # what a block's score loses for each block of its age when blocks are selected, so that ties are none


def _select(scores: Tensor, ages: list[int], count: int, selection: str) -> list:
    """The chosen candidates, oldest first, as `[head][query]` lists, from scores `(H, Q, candidates)`."""
    if selection == "head":
        scores = scores.log_softmax(-1).amax(1, keepdim=True).expand_as(scores)
    elif selection == "token":
        scores = scores.log_softmax(-1).amax(0, keepdim=True).expand_as(scores)
    elif selection != "token_and_head":
        raise ValueError(f"selection must be token_and_head, head or token, not {selection!r}")
    scores = scores - RECENCY * torch.tensor(ages, dtype=scores.dtype, device=scores.device)
    return scores.topk(count, -1).indices.sort(-1).values.tolist()


def _own_block(query: Tensor, places: list[int], own: _Block, stored: list[_Block], rotary: _Rotary, settings):
    """The queries `(H, Q, D)` of one own block, given by their places in it; returns `(H, Q, D)`.

    Positions count from the oldest of the K + 1 places before the own block at which a retrieved block may stand, so
    that all of them are in the tables.
    """
    size, top_k, selection, max_blocks, scaling, block_weight = settings
    oldest = 0 if max_blocks is None else own.number - max_blocks
    past = [block for block in stored if oldest <= block.number < own.number]
    count = min(top_k, len(past))
    home = (count + 1) * size

    def recent(block):
        return block.number >= own.number - count

    def score(block):
        start = home - (own.number - block.number) * size if recent(block) else 0
        if block.landmark.dim() == 2:
            return (query @ rotary.key(block.landmark, start)[..., None])[..., 0]
        q = rotary.query(raw, [home - start + place for place in places])[:, :, None] * scaling
        greatest, least = block.landmark[:, None].chunk(2, -1)  # (H, 1, C, D)
        return torch.maximum(q * greatest, q * least).sum(-1).amax(-1)

    raw, query = query, rotary.query(query, [home + place for place in places]) * scaling
    scores = query.new_zeros(*query.shape[:2], len(past))
    for c, block in enumerate(past):
        scores[..., c] = score(block)
    chosen = _select(scores, [own.number - block.number for block in past], count, selection)
    key = rotary.key(own.key, home)
    output = query.new_zeros(*query.shape[:2], own.value.shape[-1])
    for head in range(query.shape[0]):
        for t, place in enumerate(places):
            visible = min(place + 1, size - 1)  # the own landmark never is
            q, groups = query[head, t], []
            for s, c in enumerate(chosen[head][t]):
                start = (s + 1 if recent(past[c]) else s) * size
                tokens = rotary.key(past[c].key[head, :-1], start)
                logits = tokens @ q
                gate = logits.logsumexp(-1)
                if block_weight == "landmark":  # read where its tokens are
                    gate = rotary.key(past[c].landmark[head], start) @ q
                groups.append(_Group(gate, logits, past[c].value[head, :-1]))
            local = key[head, :visible] @ q
            output[head, t] = _grouped_softmax(local, own.value[head, :visible], groups)
    return output


def retrieval_reference(
    query,
    key,
    value,
    blocks,
    *,
    position,
    first,
    top_k,
    selection="token_and_head",
    max_blocks=None,
    rotary=None,
    scaling=None,
    block_weight="landmark",
) -> Tensor:
    """Retrieval by its definition; arguments and returns of `landmark_retrieval_attention`."""
    batch, heads, length, dim = query.shape
    size = key.shape[3]
    wide = torch.promote_types(query.dtype, torch.float32)
    scaling = dim**-0.5 if scaling is None else scaling
    settings = _Settings(size, top_k, selection, max_blocks, scaling, block_weight)

    def widen(x):  # (G, ...) -> (H, ...)
        return x.to(query.device, wide).repeat_interleave(heads // key.shape[1], 0)

    outputs = []
    with torch.autocast(query.device.type, enabled=False):
        turn = _Rotary(rotary, query.new_zeros(0, dtype=wide))
        for b in range(batch):
            slots = {number: slot for slot, number in enumerate(blocks.index[b].tolist()) if number >= 0}
            stored = [
                _Block(number, *(widen(x[b, :, slots[number]]) for x in (blocks.key, blocks.value, blocks.landmark)))
                for number in sorted(slots)
            ]
            at = {t: divmod(p, size) for t, p in enumerate(position[b].tolist()) if p >= 0}  # (own block, place)
            output = query.new_zeros(heads, length, value.shape[-1], dtype=wide)
            for number in sorted({n for n, _ in at.values()}):
                tokens = [t for t, (n, _) in at.items() if n == number]
                k, v = (widen(x[b, :, number - int(first[b])]) for x in (key, value))
                own = _Block(number, k, v, k[:, -1])
                q = query[b][:, tokens].to(wide)
                output[:, tokens] = _own_block(q, [at[t][1] for t in tokens], own, stored, turn, settings)
            outputs.append(output)
    return torch.stack(outputs).to(query.dtype)
