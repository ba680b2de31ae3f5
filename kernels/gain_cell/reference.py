"""The definition of gain-cell attention: token by token, tile by tile, on the hardware's ring of cells.

Notation: B batch, H query heads, G key/value heads, T tokens, D head dim, W window (slots of the ring), u stored
deviations. Source: Leroux et al. 2025 (arXiv 2409.19315); the ring, the output grid and the noise are this project's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """The state's fields, in the order of `GainCellState`."""

    key: Tensor
    value: Tensor
    written: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


class _Replace(torch.autograd.Function):
    """A value whose gradient goes to a carrier of the same shape instead."""

    @staticmethod
    def forward(ctx, value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, grad


def quantize(x: Tensor, bounds: tuple[float, float], levels: int | None) -> Tensor:
    """Clamp, then the nearest of equidistant levels; the gradient passes the levels and stops at the clamp."""
    low, high = bounds
    x = x.clamp(low, high)
    if levels is None:
        return x
    step = (high - low) / (levels - 1)
    return _Replace.apply(low + step * ((x - low) / step).round(), x)


def quantize_output(y: Tensor, levels: int | None, grid: str) -> Tensor:
    """A tile's output: saturated at -1 and 1, then on its grid."""
    y = y.clamp(-1, 1)
    if levels is None:
        return y
    step = 1 / (levels / 2 - 1) if grid == "symmetric" else 2 / (levels - 1)
    return _Replace.apply(step * (y / step).round(), y)


class _Array:
    """A key or value array of one row: W slots of G x D cells, what is stored in them, and how they differ."""

    def __init__(self, name: str, deviations: Tensor, cell: Any, noise: Any):
        self.name = name
        self.slots = list(deviations.unbind(1))  # W of (G, D)
        self.cell, self.noise = cell, noise
        groups, window, dim = deviations.shape
        device, dtype = deviations.device, deviations.dtype
        self.head, slot, self.dim = (torch.arange(n, device=device) for n in (groups, window, dim))
        self.gain, self.leak = torch.ones_like(deviations), torch.full_like(deviations, cell.leak)
        if noise is not None:
            place = (self.head[:, None, None], slot[:, None], self.dim)
            self.gain = 1 + noise.mismatch * noise.draw(f"{name} mismatch", *place).to(dtype)
            self.leak = cell.leak * (1 + noise.leak_spread * noise.draw(f"{name} leak", *place).to(dtype)).clamp(min=0)

    def write(self, x: Tensor, token: int) -> None:
        """Store `(G, D)` of a token in its slot."""
        low, high = self.cell.weight_range
        u = quantize(x, self.cell.weight_range, self.cell.weight_levels) - self.cell.offset
        if self.noise is not None and self.noise.write:
            place = (self.head[:, None], torch.tensor(token, device=x.device), self.dim)
            u = u + self.noise.write * (high - low) * self.noise.draw(f"{self.name} write", *place).to(u.dtype)
        self.slots[token % len(self.slots)] = u

    def read(self, age: Tensor) -> tuple[Tensor, Tensor]:
        """Charge of every cell for a pulse of width 1, `(G, W, D)`, and that of the linear cell instead."""
        u = torch.stack(self.slots, 1) * torch.exp(-self.leak * age[:, None])
        charge = torch.zeros_like(u)
        for coefficient in reversed(self.cell.polynomial):
            charge = charge * u + coefficient
        return charge * self.gain, self.cell.slope * u * self.gain


def _row(inputs, settings, past):
    """One row without padding: query (H, T, D), key and value (G, T, D); past, its state without batch dimension."""
    (query, key, value), (cell, window, gradient, noise) = inputs, settings
    heads, length, dim = query.shape
    ratio = heads // key.shape[0]
    keys = _Array("key", past.key, cell, noise)
    values = _Array("value", past.value, cell, noise)
    written, start = past.written.clone(), int(past.count)
    pulses = quantize(query, cell.input_range, cell.input_levels)
    outputs = []
    for token in range(start, start + length):
        keys.write(key[:, token - start], token)
        values.write(value[:, token - start], token)
        written[token % window] = token
        age = (token - written).to(query.dtype)
        charge, line = (x.repeat_interleave(ratio, 0) for x in keys.read(age))
        pulse = pulses[:, token - start, None]
        scores = (pulse * charge).sum(-1)
        if gradient == "linear":
            scores = _Replace.apply(scores, (pulse * line).sum(-1))
        weights = (scores / cell.score_saturation).clamp(0, 1).masked_fill(written < 0, 0.0)
        charge, line = (x.repeat_interleave(ratio, 0) for x in values.read(age))
        output = query.new_zeros(heads, dim)
        for tile in range(window // cell.tile):
            slots = slice(tile * cell.tile, (tile + 1) * cell.tile)
            if written[tile * cell.tile] < 0:  # an empty tile is not read
                continue
            y = (weights[:, slots, None] * charge[:, slots]).sum(1)
            if gradient == "linear":
                y = _Replace.apply(y, (weights[:, slots, None] * line[:, slots]).sum(1))
            y = y / cell.output_saturation
            if noise is not None and noise.read:
                head = torch.arange(heads, device=query.device)[:, None]
                place = (head, torch.tensor(token, device=query.device), torch.tensor(tile, device=query.device))
                y = y + noise.read * noise.draw("read", *place, torch.arange(dim, device=query.device)).to(y.dtype)
            output = output + quantize_output(y, cell.output_levels, cell.output_grid)
        outputs.append(output)
    output = torch.stack(outputs, 1) if outputs else query.new_zeros(heads, 0, dim)
    count = past.count + length
    return output, State(torch.stack(keys.slots, 1), torch.stack(values.slots, 1), written, count)


def reference(
    query,
    key,
    value,
    *,
    cell,
    window=1024,
    gradient="exact",
    noise=None,
    attention_mask=None,
    cu_seqlens=None,
    initial_state=None,
    return_state=False,
):
    """Gain-cell attention by its definition; arguments and returns of `gain_cell_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        inputs = [x.to(dtype) for x in (query, key, value)]
        settings = (cell, window, gradient, noise)
        if cu_seqlens is not None:
            bounds = cu_seqlens.tolist()
            empty = _empty(inputs[1][0], window)
            spans = [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
            outputs = [_row([x[0, :, span] for x in inputs], settings, empty)[0] for span in spans]
            return torch.cat(outputs, 1)[None].to(query.dtype), None
        outputs, states = [], []
        for row in range(query.shape[0]):
            real = slice(None) if attention_mask is None else attention_mask[row].bool()
            past = _empty(inputs[1][row], window)
            if initial_state is not None:
                past = State(*(field[row] for field in initial_state))
            found, state = _row([x[row][:, real] for x in inputs], settings, past)
            output = torch.zeros_like(inputs[0][row])
            output[:, real] = found
            outputs.append(output)
            states.append(state)
        state = State(*(torch.stack(field) for field in zip(*states, strict=True))) if return_state else None
        return torch.stack(outputs).to(query.dtype), state


def _empty(key: Tensor, window: int) -> State:
    """The state of a row before its first token, for keys `(G, T, D)`."""
    groups, _, dim = key.shape
    cells = key.new_zeros(groups, window, dim)
    written = torch.full((window,), -1, dtype=torch.int64, device=key.device)
    return State(cells, cells, written, torch.zeros((), dtype=torch.int64, device=key.device))
