"""Quadratic definitions of attention with a bounded state, to try an idea on a real model before it gets an op.

`ArmAttention` takes the place of a Llama layer's attention and keeps its projections. What a layer may see is a
`See`: a window, sinks, some old tokens kept exactly, and a memory of all others. Everything is masks over all pairs of
tokens, so one definition serves training, and scoring at any length that fits; nothing here is fast.

- Kept tokens: a token leaves the window with a score, the softmax mass that it received from the queries of its
  key/value head's group (`late`: only from those at least half a window away). Of all tokens that have left, the
  `kept` best, less `age_penalty` nats a thousand tokens of age, stay visible exactly. The store changes once every 64
  tokens. Heavy hitters: Zhang et al. 2023, arXiv 2306.14048; beside a linear memory: STILL, arXiv 2602.02180.
- Memory: hybrid linear attention, softmax maps of the unrotated queries and keys, a decay gate per key/value head from
  the layer's input, forgetting counted from a key's entry into the memory (OPS.md 1, contract 2).

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

STEP = 64
"""Tokens between two changes of the store of kept tokens."""
BLOCK = 1024
"""Queries whose scores are in memory at once."""


@dataclass(frozen=True)
class See:
    """What one layer sees. A window of 0 stands for softmax attention over everything."""

    window: int = 0
    sinks: int = 4
    kept: int = 0
    late: bool = False
    age_penalty: float = 0.0
    memory: int = 0
    """Width f of the memory's maps (F = 2 f); 0: no memory."""
    memory_bytes: int = 4
    """Bytes of a number in the memory's sums."""

    def state_bytes(self, groups: int, head_dim: int, length: int) -> int:
        """Bytes of one sequence's state after `length` tokens: bf16 keys and values, an int32 place a kept token."""
        exact = length if self.window == 0 else min(length, self.window + self.sinks + self.kept)
        places = 4 * groups * self.kept
        sums = groups * 2 * self.memory * (head_dim + 1) * self.memory_bytes
        return exact * groups * head_dim * 4 + places + sums


class Memory(nn.Module):
    """Maps per query head and key/value head, the window's weight and shift, and the gate; float32."""

    def __init__(self, heads: int, groups: int, head_dim: int, width: int, hidden: int):
        super().__init__()
        pairs = [i for p in range(head_dim // 2 - width // 2, head_dim // 2) for i in (p, p + head_dim // 2)]
        eye = torch.eye(head_dim)[:, pairs]
        self.query_map = nn.Parameter(eye.repeat(heads, 1, 1))
        self.key_map = nn.Parameter(eye.repeat(groups, 1, 1))
        self.query_magnitude = nn.Parameter(torch.zeros(heads, head_dim))
        self.key_magnitude = nn.Parameter(torch.zeros(groups, head_dim))
        self.log_weight = nn.Parameter(torch.full((heads,), math.log(16.0)))
        self.shift = nn.Parameter(torch.full((heads,), 0.5))
        self.gate_weight = nn.Parameter(torch.zeros(groups, hidden))
        self.gate_bias = nn.Parameter(torch.full((groups,), 6.0))

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return (
            _features(query, self.query_map, self.query_magnitude),
            _features(key, self.key_map, self.key_magnitude),
        )

    def decay_sums(self, hidden: Tensor) -> Tensor:
        """Running sums of the log decay: `(B, G, T)`."""
        gate = torch.einsum("btc,gc->bgt", hidden.float(), self.gate_weight) + self.gate_bias[None, :, None]
        return F.logsigmoid(gate).cumsum(-1)


def _features(x: Tensor, weight: Tensor, magnitude: Tensor) -> Tensor:
    mapped = torch.einsum("bhtd,hdf->bhtf", x.float(), weight)
    both = torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1).clamp_min(1e-12)
    return both * torch.einsum("bhtd,hd->bht", x.float(), magnitude).clamp(-10, 10).exp()[..., None]


class ArmAttention(nn.Module):
    """A Llama attention that sees what it is told to.

    Attributes:
        see: what it sees; None is the teacher.
        with_memory: False leaves the memory out, the window's own arm.
        observer: called with `(self, hidden, query, key, value, raw_query, raw_key, output)` after each call.
    """

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.stock, self.see, self.with_memory, self.observer = stock, None, True, None
        self.memory: Memory | None = None

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        stock = self.stock
        shape = (*hidden_states.shape[:-1], -1, stock.head_dim)
        raw_query, raw_key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (stock.q_proj, stock.k_proj, stock.v_proj)
        )
        query, key = apply_rotary_pos_emb(raw_query, raw_key, *position_embeddings)
        inputs = (hidden_states, query, key, value, raw_query, raw_key)
        with torch.autocast(hidden_states.device.type, enabled=False):  # it would round the memory's products
            output = self.attend(*inputs)
        if self.observer is not None:
            self.observer(self, *inputs, output)
        merged = output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        return stock.o_proj(merged.to(hidden_states.dtype)), None

    def attend(self, hidden, query, key, value, raw_query, raw_key) -> Tensor:
        see = self.see
        if see is None or see.window == 0:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        visible = visible_pairs(see, query, key)
        if see.memory == 0 or not self.with_memory:
            return _masked(query, key, value, visible)
        call = (query, key, value, raw_query, raw_key, hidden, visible)
        if torch.is_grad_enabled():  # the scores of all layers at once would not fit
            return torch.utils.checkpoint.checkpoint(self.mixed, *call, use_reentrant=False)
        return self.mixed(*call)

    def mixed(self, query, key, value, raw_query, raw_key, hidden, visible, linear_only=False) -> Tensor:
        """Window and memory under one denominator; `linear_only`: every earlier key through the memory."""
        memory = self.memory
        assert memory is not None and self.see is not None
        length, repeat = query.shape[2], query.shape[1] // key.shape[1]
        place = torch.arange(length, device=query.device)
        query_features, key_features = memory.features(raw_query, raw_key)
        sums = memory.decay_sums(hidden).repeat_interleave(repeat, 1)
        entry = sums[..., (place + (0 if linear_only else self.see.window)).clamp_max(length - 1)]
        key_features, key, value = (x.repeat_interleave(repeat, 1) for x in (key_features, key, value))
        mix = _remember if linear_only else mix_block
        outputs = [
            mix(
                query[:, :, rows],
                key,
                value,
                query_features[:, :, rows],
                key_features,
                sums[..., rows],
                entry,
                (place[rows, None] >= place[None])[None, None],
                visible[..., rows, :],
                memory.log_weight,
                memory.shift,
            )
            for rows in (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))
        ]
        return torch.cat(outputs, 2).to(query.dtype)


def _remember(query, key, value, query_features, key_features, sums, entry, causal, *unused) -> Tensor:
    decay = (sums[..., None] - entry[..., None, :]).clamp_max(0).exp()
    weights = (query_features @ key_features.mT) * decay * causal
    return (weights @ value.float()) / weights.sum(-1, keepdim=True).clamp_min(1e-20)


def mix_block(
    query, key, value, query_features, key_features, sums, entry, causal, visible, log_weight, shift
) -> Tensor:
    """The mixed output of a block of queries, float32."""
    decay = (sums[..., None] - entry[..., None, :]).clamp_max(0).exp()
    weights = (query_features @ key_features.mT) * decay * (causal & ~visible)
    scores = ((query @ key.mT).float() * query.shape[-1] ** -0.5).masked_fill(~visible, -1e9)
    level = scores.logsumexp(-1, keepdim=True)
    mass = (log_weight[:, None, None] + shift[:, None, None] * level).clamp(-30, 30).exp()
    both = weights + mass * (scores - level).exp()
    return (both @ value.float()) / both.sum(-1, keepdim=True).clamp_min(1e-20)


def _masked(query, key, value, visible) -> Tensor:
    repeat = query.shape[1] // key.shape[1]  # with a mask, only heads as many as the queries' have a fast kernel
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


_WINDOWS: dict[tuple, Tensor] = {}


def window_pairs(window: int, sinks: int, length: int, device) -> Tensor:
    """`(1, 1, T, T)`: the causal pairs within the window or of a sink."""
    name = (window, sinks, length, str(device))
    if name not in _WINDOWS:
        place = torch.arange(length, device=device)
        distance = place[:, None] - place[None]
        near = (distance < window) | (place[None] < sinks)
        _WINDOWS[name] = ((distance >= 0) & near)[None, None]
    return _WINDOWS[name]


def visible_pairs(see: See, query: Tensor, key: Tensor) -> Tensor:
    """Pairs that the softmax sees: `(1, 1, T, T)`, or `(B, H, T, T)` where tokens are kept."""
    length = query.shape[2]
    near = window_pairs(see.window, see.sinks, length, query.device)
    if see.kept == 0 or length <= see.window + see.sinks:
        return near
    with torch.no_grad():
        score = received_mass(see, query, key, near)
        kept = kept_places(see, score)
    repeat = query.shape[1] // key.shape[1]
    later = kept.repeat_interleave(STEP, 2)[:, :, :length]
    place = torch.arange(length, device=query.device)
    out = place[:, None] - place[None] >= see.window
    return near | (later & out).repeat_interleave(repeat, 1)


def received_mass(see: See, query: Tensor, key: Tensor, near: Tensor) -> Tensor:
    """The softmax mass of a key over the queries whose window it is in, summed over its group: `(B, G, T)`."""
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    keys = key.repeat_interleave(heads // groups, 1)
    place = torch.arange(length, device=query.device)
    total = torch.zeros(batch, heads, length, device=query.device)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        first = max(0, start - see.window)  # sinks are never scored, so their columns may be missing
        columns = torch.cat([place[: min(see.sinks, first)], place[first:stop]])
        seen = near[0, 0, start:stop][:, columns]
        scores = (query[:, :, start:stop] @ keys[:, :, columns].mT).float() * dim**-0.5
        mass = scores.masked_fill(~seen, -1e9).softmax(-1)
        distance = place[start:stop, None] - columns[None]
        counted = (distance < see.window) & (distance >= (see.window // 2 if see.late else 0))
        total.index_add_(2, columns, (mass * counted).sum(2))
    return total.unflatten(1, (groups, -1)).sum(2)


def kept_places(see: See, score: Tensor) -> Tensor:
    """Which tokens are in the store during each step: `(B, G, steps, T)`, bool."""
    batch, groups, length = score.shape
    steps = -(-length // STEP)
    place = torch.arange(length, device=score.device)
    start = torch.arange(steps, device=score.device) * STEP
    gone = (place[None] <= start[:, None] - see.window) & (place[None] >= see.sinks)
    aged = score.clamp_min(1e-20).log()[:, :, None] + see.age_penalty * place / 1000  # the same age for all at a time
    ranked = aged.masked_fill(~gone, -math.inf)
    best = ranked.topk(min(see.kept, length), dim=-1)
    store = torch.zeros(batch, groups, steps, length, dtype=torch.bool, device=score.device)
    return store.scatter_(-1, best.indices, best.values > -math.inf)
