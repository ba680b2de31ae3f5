"""The chunked PyTorch path of gain-cell attention: memory linear in T for a fixed window, on CPU and GPU.

Rows are brought to right padding. Behind the tokens that a state's ring holds, the call's keys are laid out on the
grid of tiles: tile a holds the tokens a P to (a + 1) P, P cells a tile. On the ring, tiles a and a - M share their
cells, M = W / P; a query sees of them the newest of one and the oldest of the other, so the charges of every M-th tile
are added before they saturate. Queries run in segments, whose scores are computed again in the backward pass.

Legend as in `op_gain_cell.py`; R = H / G, N keys of a segment, K its tiles.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .compiled import for_training
from .gain_cell import GainCell, GainCellNoise
from .op_rows import Rows

SEGMENT = 256  # queries that meet their keys at once


class GainCellState(NamedTuple):
    """What a sequence leaves in the cells; batch first.

    Fields: key, value `(B, G, W, D)` float32 (float64 for float64 input), stored deviations from the offset, after
    levels and write noise, 0 where nothing is stored; written `(B, W)` int64, the token in each slot, -1 for none:
    slot = token % W; count `(B,)` int64, the real tokens so far.
    """

    key: Tensor
    value: Tensor
    written: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


class Settings(NamedTuple):
    """What a call fixes for all its tokens; linear: whether gradients are those of the linear cell."""

    cell: GainCell
    window: int
    linear: bool
    noise: GainCellNoise | None


class Cells(NamedTuple):
    """The cells that a call reads, on the grid of tiles, from W tokens before the first tile with a new token.

    Fields: key, value `(B, G, E, D)` deviations; token `(B, E)`, the real token in each, -1 for none; gain and leak of
    either array, like its deviations, or None where all cells are alike.
    """

    key: Tensor
    value: Tensor
    token: Tensor
    key_gain: Tensor | None
    value_gain: Tensor | None
    key_leak: Tensor | None
    value_leak: Tensor | None

    def cut(self, start: int, stop: int) -> "Cells":
        """The cells from start to stop, padded at the end with empty ones."""
        missing = max(0, stop - self.token.shape[1])

        def take(x: Tensor | None) -> Tensor | None:
            return None if x is None else functional.pad(x[:, :, start:stop], (0, 0, 0, missing))

        key, value = take(self.key), take(self.value)
        assert key is not None and value is not None
        token = functional.pad(self.token[:, start:stop], (0, missing), value=-1)
        devices = (self.key_gain, self.value_gain, self.key_leak, self.value_leak)
        return Cells(key, value, token, *map(take, devices))


class Substitute(torch.autograd.Function):
    """A value whose gradient goes to a carrier of the same shape instead."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def to_levels(x: Tensor, bounds: tuple[float, float], levels: int | None) -> Tensor:
    """Clamp to the bounds and round to equidistant levels; gradients pass the rounding and stop at the clamp."""
    low, high = bounds
    x = x.clamp(low, high)
    if levels is None:
        return x
    step = (high - low) / (levels - 1)
    return Substitute.apply(low + step * ((x - low) / step).round(), x)


def to_output_levels(y: Tensor, cell: GainCell) -> Tensor:
    """Saturate a tile's output at -1 and 1 and round it to the cell's grid."""
    y = y.clamp(-1, 1)
    if cell.output_levels is None:
        return y
    half = cell.output_levels / 2 - 1
    step = 1 / half if cell.output_grid == "symmetric" else 2 / (cell.output_levels - 1)
    return Substitute.apply(step * (y / step).round(), y)


def run_gain_cell(
    query, key, value, *, cell, window, gradient, noise, attention_mask=None, initial_state=None, return_state=False
) -> tuple[Tensor, GainCellState | None]:
    """Run rows that may be padded; the arguments are those of `gain_cell_attention`, of at least one token."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        rows = Rows(attention_mask, query)
        query, key, value = (rows.compact(x.to(dtype)) for x in (query, key, value))
        settings = Settings(cell, window, gradient == "linear", noise)
        state = empty_state(key, window) if initial_state is None else initial_state
        count = None if initial_state is None else state.count
        cells, new_state = _store(key, value, rows.lengths, state, count, settings)
        pulses = to_levels(query, cell.input_range, cell.input_levels)
        output = rows.restore(_attend(pulses, cells, count, settings))
    return output, new_state if return_state else None


def empty_state(key: Tensor, window: int) -> GainCellState:
    """The state before the first token, for keys `(B, G, T, D)`."""
    batch, groups, _, dim = key.shape
    dtype = torch.promote_types(key.dtype, torch.float32)
    cells = key.new_zeros(batch, groups, window, dim, dtype=dtype)
    written = torch.full((batch, window), -1, dtype=torch.int64, device=key.device)
    return GainCellState(cells, cells, written, written.new_zeros(batch))


# --- writing


def _store(key, value, lengths, state, count, settings) -> tuple[Cells, GainCellState]:
    """Turn keys and values into deviations; lay out what the call reads, and the ring that it leaves."""
    cell, window, _, noise = settings
    batch, groups, length, dim = key.shape
    device = key.device
    past = state.count[:, None]
    token = past + torch.arange(length, device=device)  # (B, T), of right-padded rows
    deviations = []
    for name, x in (("key", key), ("value", value)):
        u = to_levels(x, cell.weight_range, cell.weight_levels) - cell.offset
        if noise is not None and noise.write:
            low, high = cell.weight_range
            head, axis = torch.arange(groups, device=device)[:, None, None], torch.arange(dim, device=device)
            draws = noise.draw(f"{name} write", head, token[:, None, :, None], axis)
            u = u + noise.write * (high - low) * draws.to(u.dtype)
        deviations.append(u)
    pools = [torch.cat([old.to(u.dtype), u], 2) for old, u in zip((state.key, state.value), deviations, strict=True)]
    end = past + lengths[:, None]

    def find(wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens `(B, E)` lie in a pool, and which of them are there."""
        slot = wanted % window
        new = wanted >= past
        held = torch.where(new, wanted < end, state.written.gather(1, slot) == wanted) & (wanted >= 0)
        return torch.where(new, window + wanted - past, slot).clamp(0, window + length - 1), held

    def gather(pool: Tensor, place: Tensor, held: Tensor) -> Tensor:
        x = pool.gather(2, place[:, None, :, None].expand(-1, groups, -1, dim))
        return x.masked_fill(~held[:, None, :, None], 0.0)

    slots = torch.arange(window, device=device)
    newest = end - 1 - (end - 1 - slots) % window  # of each slot
    place, held = find(newest)
    ring = [gather(pool, place, held) for pool in pools]
    new_state = GainCellState(ring[0], ring[1], torch.where(held, newest, -1), state.count + lengths)
    if count is None:  # nothing before the first token, which starts a tile
        there = torch.arange(length, device=device) < lengths[:, None]
        laid, tokens = (
            [u.masked_fill(~there[:, None, :, None], 0.0) for u in deviations],
            token.masked_fill(~there, -1),
        )
    else:
        first = count[:, None] // cell.tile * cell.tile - window
        wanted = first + torch.arange(window + length + cell.tile - 1, device=device)
        place, held = find(wanted)
        laid, tokens = [gather(pool, place, held) for pool in pools], wanted.masked_fill(~held, -1)
    return Cells(laid[0], laid[1], tokens, *_devices(tokens % window, groups, dim, settings, laid[0].dtype)), new_state


def _devices(slot: Tensor, groups: int, dim: int, settings: Settings, dtype: torch.dtype) -> list[Tensor | None]:
    """Gains and leaks of the cells in these slots `(B, E)`, or None where all are alike."""
    noise = settings.noise
    found: list[Tensor | None] = []
    head, axis = torch.arange(groups, device=slot.device)[:, None, None], torch.arange(dim, device=slot.device)
    for kind, size in (("mismatch", noise and noise.mismatch), ("leak", noise and noise.leak_spread)):
        for name in ("key", "value"):
            if not noise or not size:
                found.append(None)
                continue
            factor = 1 + size * noise.draw(f"{name} {kind}", head, slot[:, None, :, None], axis).to(dtype)
            found.append(factor if kind == "mismatch" else settings.cell.leak * factor.clamp(min=0))
    return found


# --- reading


def _attend(pulses: Tensor, cells: Cells, count: Tensor | None, settings: Settings) -> Tensor:
    """Outputs `(B, H, T, D)` of all queries, segment by segment."""
    cell, window, _, noise = settings
    length, tile = pulses.shape[2], cell.tile
    spread = cells.key_leak is not None
    step = 1 if spread else SEGMENT  # with a leak per cell, the charges differ from query to query
    train = torch.is_grad_enabled() and any(x.requires_grad for x in (pulses, cells.key, cells.value))
    read = for_training(_read) if train and noise is None else _read
    outputs = []
    for begin in range(0, length, step):
        end = min(begin + step, length)
        if count is None:  # cell e holds token e
            low, high = max(0, begin - window + 1) // tile, (end - 1) // tile
        else:  # cell e holds token e + first, whose tile the row's first new token shares
            low, high = (begin + 1) // tile, (window + tile + end - 2) // tile
        part = cells.cut(low * tile, (high + 1) * tile)
        query = torch.arange(begin, end, device=pulses.device)
        token = query[None] if count is None else count[:, None] + query
        run = (pulses[:, :, begin:end], part, token, settings)
        outputs.append(checkpoint(read, *run, use_reentrant=False) if train else read(*run))
    return torch.cat(outputs, 2)


def _read(pulses: Tensor, cells: Cells, token: Tensor, settings: Settings) -> Tensor:
    """Outputs of one segment: pulses `(B, H, Q, D)` of the tokens `(B | 1, Q)`, cells of whole tiles."""
    cell, window, linear, noise = settings
    batch, heads, length, dim = pulses.shape
    groups, ratio = cells.key.shape[1], heads // cells.key.shape[1]
    age = token[:, :, None] - cells.token[:, None]
    seen = (age >= 0) & (age < window) & (cells.token >= 0)[:, None]
    age = torch.where(seen, age, 0).to(pulses.dtype)
    keys, values = cells.key, cells.value
    if cells.key_leak is not None and cells.value_leak is not None:
        fade = -age[:, 0, None, :, None]  # a single query
        keys, values = keys * (fade * cells.key_leak).exp(), values * (fade * cells.value_leak).exp()
        decay = None
    else:
        decay = (-cell.leak * age).exp()[:, None, None] if cell.leak else None
    seen = seen[:, None, None]

    def fold(x: Tensor) -> Tensor:
        """`(B, H, Q, .)` to `(B, G, R Q, .)`."""
        return x.reshape(batch, groups, ratio * length, -1)

    def spread(x: Tensor) -> Tensor:
        """`(B, G, R Q, N)` to `(B, G, R, Q, N)`."""
        return x.view(batch, groups, ratio, length, -1)

    query = fold(pulses)
    scores: Any = 0.0
    for order, charge in _charges(keys, cells.key_gain, decay is not None, cell.polynomial):
        term = spread(query @ charge.mT)
        scores = scores + (term if order == 0 or decay is None else term * decay**order)
    if linear:
        line = spread(query @ _line(keys, cells.key_gain, cell).mT)
        scores = Substitute.apply(scores, line if decay is None else line * decay)
    weights = (scores / cell.score_saturation).clamp(0, 1).masked_fill(~seen, 0.0)

    ring, tile = window // cell.tile, cell.tile

    def tiles(x: Tensor) -> Tensor:
        """`(B, G, R, Q, N)` to `(B, G, K, R Q, P)`."""
        return x.reshape(batch, groups, ratio * length, -1, tile).transpose(2, 3)

    sums: Any = 0.0
    for order, charge in _charges(values, cells.value_gain, decay is not None, cell.polynomial):
        faded = weights if order == 0 or decay is None else weights * decay**order
        sums = sums + tiles(faded) @ charge.unflatten(2, (-1, tile))
    if linear:
        faded = weights if decay is None else weights * decay
        sums = Substitute.apply(sums, tiles(faded) @ _line(values, cells.value_gain, cell).unflatten(2, (-1, tile)))
    missing = -sums.shape[2] % ring  # every ring-th tile lies in the same cells
    sums = functional.pad(sums, (0, 0, 0, 0, 0, missing)).unflatten(2, (-1, ring)).sum(2)
    y = sums / cell.output_saturation  # (B, G, M, R Q, D)
    if noise is not None and noise.read:
        y = y + _read_noise(y, cells, token, seen, heads, settings, missing)
    return to_output_levels(y, cell).sum(2).view(batch, heads, length, dim)


def _charges(u: Tensor, gain: Tensor | None, leaking: bool, polynomial) -> list[tuple[int, Tensor]]:
    """Charges of deviations `(B, G, N, D)` by the power of the decay that each part takes; one part without leak."""
    parts = []
    power = torch.ones_like(u) if gain is None else gain
    for order, coefficient in enumerate(polynomial):
        if coefficient:
            parts.append((order, coefficient * power))
        power = power * u
    if not leaking and parts:
        parts = [(0, torch.stack([part for _, part in parts]).sum(0))]
    return parts or [(0, torch.zeros_like(u))]


def _line(u: Tensor, gain: Tensor | None, cell: GainCell) -> Tensor:
    """Charges of the linear cell that stands in for this one."""
    return cell.slope * (u if gain is None else u * gain)


def _read_noise(y, cells, token, seen, heads, settings, missing) -> Tensor:
    """Noise of every readout `(B, G, M, R Q, D)`; 0 where a tile is empty and not read."""
    cell, window, _, noise = settings
    batch, groups, ring, rows, dim = y.shape
    device = y.device
    length = token.shape[1]
    # The physical tile of the n-th of M neighbours, from the token that stands, or would stand, first in it.
    slot = cells.token[:, None, :] % window
    known = torch.where(cells.token[:, None, :] >= 0, slot // cell.tile, -1).unflatten(2, (-1, cell.tile)).amax(3)
    known = functional.pad(known, (0, missing), value=-1).unflatten(2, (-1, ring)).amax(2)  # (B, 1, M)
    filled = functional.pad(seen[:, 0, 0].unflatten(2, (-1, cell.tile)).any(3), (0, missing))
    filled = filled.unflatten(2, (-1, ring)).any(2)  # (B, Q, M)
    head, axis = torch.arange(heads, device=device), torch.arange(dim, device=device)
    draws = noise.draw(
        "read",
        head[:, None, None, None],
        token[:, None, :, None, None],
        known[:, :, None, :, None].clamp(min=0),
        axis,
    )  # (B, H, Q, M, D)
    draws = (draws * filled[:, None, :, :, None]).to(y.dtype)
    draws = draws.expand(batch, heads, length, ring, dim)
    return noise.read * draws.reshape(batch, groups, rows, ring, dim).transpose(2, 3)
