"""One token of cosine attention: one launch reads the state, writes the next one and the output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import cdiv, launch, next_power_of_2
from .reference import State
from .tiles import gain_of, inverse_norm, level_of, load_tile, store_tile

COLUMNS = 32  # of the value width, per program


@triton.jit
def cosine_decode_kernel(
    query, key, value, exponent, gain, old, mask, count, new, new_count, out,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, mask_batch,
    DX: tl.constexpr, DY: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, RATIO: tl.constexpr,
    KEY_SIDE: tl.constexpr, GAIN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of DY, G, B); the R query heads of a group share the program and, on the query side, the sum."""
    offset = tl.program_id(0) * BLOCK_Y
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    heads = groups * RATIO
    real = 1
    if MASK:
        real = (tl.load(mask + batch * mask_batch) != 0).to(tl.int32)
    past = tl.load(count + batch)
    if (tl.program_id(0) == 0) & (group == 0):
        tl.store(new_count + batch, past + real)
    one = tl.arange(0, 1)
    rank = tl.arange(0, BLOCK_X)
    wide = rank < DX
    column = offset + tl.arange(0, BLOCK_Y)
    k = load_tile(key + batch * k_batch + group.to(tl.int64) * k_head, 0, one, one < real, 0, DX, BLOCK_X)
    value += batch * v_batch + group.to(tl.int64) * v_head
    v = tl.load(value + column, mask=column < DY * real, other=0.0).to(tl.float32)
    unit = tl.reshape(k.to(tl.float32) * inverse_norm(k)[:, None], (BLOCK_X,))
    logarithm = tl.log(tl.maximum(past + 1, 1).to(tl.float32))
    if not KEY_SIDE:
        place = (batch * groups + group) * (DX * DY)
        sums = load_tile(old + place, DY, rank, wide, offset, DY, BLOCK_Y) + unit[:, None] * v[None, :]
        store_tile(new + place, DY, rank, wide, offset, sums, DY, BLOCK_Y)
    for turn in tl.static_range(RATIO):
        head = group * RATIO + turn
        level = level_of(logarithm, exponent, head, True)
        weight = gain_of(gain, head, GAIN)
        if KEY_SIDE:
            place = (batch * heads + head) * (DX * DY)
            sums = load_tile(old + place, DY, rank, wide, offset, DY, BLOCK_Y) + (unit * level)[:, None] * v[None, :]
            store_tile(new + place, DY, rank, wide, offset, sums, DY, BLOCK_Y)
        else:
            weight *= level
        q = load_tile(query + batch * q_batch + head.to(tl.int64) * q_head, 0, one, one < real, 0, DX, BLOCK_X)
        q_unit = tl.reshape(q.to(tl.float32) * inverse_norm(q)[:, None], (BLOCK_X,)) * weight
        result = tl.sum(q_unit[:, None] * sums, axis=0)  # 0 where padded: so was the query
        target = out + (batch * heads + head) * DY + column
        tl.store(target, result.to(out.dtype.element_ty), mask=column < DY)


def decode_step(query, key, value, *, exponent, gain, key_side, attention_mask, state) -> tuple[Tensor, State]:
    """A causal call of one token with a state; arguments as in `cosine_attention`, key_side for its scale_side."""
    batch, heads, _, dim = query.shape
    groups, value_dim = key.shape[1], value.shape[3]
    old, past = state.kv.contiguous(), state.count.contiguous()
    new, count = torch.empty_like(old), torch.empty_like(past)
    output = query.new_empty(batch, heads, 1, value_dim)
    columns = min(COLUMNS, max(16, next_power_of_2(value_dim)))
    launch(
        cosine_decode_kernel,
        (cdiv(value_dim, columns), groups, batch),
        (query, key, value, exponent, gain, old, attention_mask, past, new, count, output),
        (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
         0 if attention_mask is None else attention_mask.stride(0)),
        {
            "DX": dim, "DY": value_dim, "BLOCK_X": max(16, next_power_of_2(dim)), "BLOCK_Y": columns,
            "RATIO": heads // groups, "KEY_SIDE": key_side, "GAIN": gain is not None,
            "MASK": attention_mask is not None,
        },
        warps=4,
        stages=1,
    )  # fmt: skip
    rings = (state.window_key, state.window_value, state.sink_key, state.sink_value)
    return output, State(new, *rings, count)
