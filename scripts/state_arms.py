"""Quadratic definitions of attention with a bounded state, to try an idea on a real model before it gets an op.

`ArmAttention` takes the place of a Llama layer's attention and keeps its projections. What a layer may see is a
`See`: a window, sinks, some old tokens kept exactly or blocks of them read again, and a memory of all others. Kept
tokens and blocks are masks over all pairs of tokens, a memory beside a plain window is read in chunks
(`memory_scans.py`): one definition serves training, and scoring at any length that fits.

- Kept tokens: a token leaves the window with a score, the softmax mass that it received from the queries of its
  key/value head's group (`late`: only from those at least half a window away). Of all tokens that have left, the
  `kept` best, less `age_penalty` nats a thousand tokens of age, stay visible exactly. The store changes once every 64
  tokens. Heavy hitters: Zhang et al. 2023, arXiv 2306.14048; beside a linear memory: STILL, arXiv 2602.02180.
- Blocks: all old tokens are stored, and each query reads those of the `blocks` blocks of `STEP` tokens with the
  largest mean score (its product with the mean of the block's keys), the same for all query heads of a key/value head
  (their softmax over blocks, summed): landmarks without training (arXiv 2305.16300), as in NSA (2502.11089).
- Memory: `memory_arms.py`; by default hybrid linear attention, softmax maps of the unrotated queries and keys, a decay
  gate per key/value head from the layer's input, forgetting counted from a key's entry (OPS.md 1, contract 2).
- Window dropout: in finetuning a layer is left without its window, all earlier tokens in the memory, with a
  probability that falls to 0 (scheduled sliding-window dropout, arXiv 2510.05901).

Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim.
"""

import math
from dataclasses import dataclass, replace

import torch
from memory_arms import LinearMemory, make_memory
from memory_scans import check_scans, difference, window_read
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

STEP = 64
"""Tokens between two changes of the store of kept tokens, and of a block that is read again."""
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
    """Bytes of a number in the memory's sums; 2: rounded to bf16 in scoring (`gated_scan`)."""
    variant: str = ""
    """What the memory is (`memory_arms.make_memory`)."""
    window_dropout: float = 0.0
    """Probability of the first finetuning step that the window is left out."""
    blocks: int = 0
    """Blocks of old tokens read besides; all old tokens are then stored."""
    spare: int = 0
    """Bytes of state beside these."""

    def state_bytes(self, groups: int, head_dim: int, length: int) -> int:
        """Bytes of one sequence's state after `length` tokens: bf16 keys and values, an int32 place a kept token."""
        exact = length if self.window == 0 or self.blocks else min(length, self.window + self.sinks + self.kept)
        places = 4 * groups * self.kept + 2 * groups * head_dim * (length // STEP) * bool(self.blocks)
        columns = head_dim + (self.variant != "delta")
        sums = groups * 2 * self.memory * columns * self.memory_bytes
        return exact * groups * head_dim * 4 + places + sums + self.spare


class ArmAttention(nn.Module):
    """A Llama attention that sees what it is told to.

    Attributes:
        see: what it sees; None is the teacher.
        with_memory: False leaves the memory out, the window's own arm.
        dropout: probability that a call with gradients leaves the window out.
        observer: called with `(self, hidden, query, key, value, raw_query, raw_key, output)` after each call.
    """

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.stock, self.with_memory, self.dropout, self.observer = stock, True, 0.0, None
        self.see: See | None = None
        self.memory: nn.Module | None = None

    def remember(self, see: See, heads: int, groups: int, hidden: int) -> None:
        """Give it the memory that `see` asks for."""
        device = self.stock.q_proj.weight.device
        self.memory = make_memory(heads, groups, self.stock.head_dim, see.memory, hidden, see.variant).to(device)

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        stock = self.stock
        shape = (*hidden_states.shape[:-1], -1, stock.head_dim)
        raw_query, raw_key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (stock.q_proj, stock.k_proj, stock.v_proj)
        )
        query, key = apply_rotary_pos_emb(raw_query, raw_key, *position_embeddings)
        query, key = query.to(value.dtype), key.to(value.dtype)  # a float32 rotation under autocast leaves float32
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
        if see.memory == 0 or not self.with_memory:
            return _masked(query, key, value, visible_pairs(see, query, key))
        visible = visible_pairs(see, query, key) if see.kept else None
        call = (query, key, value, raw_query, raw_key, hidden, visible)
        if torch.is_grad_enabled():  # the scores of all layers at once would not fit
            return checkpoint(self.mixed, *call, float(torch.rand(())) < self.dropout, use_reentrant=False)
        return self.mixed(*call)

    def mixed(self, query, key, value, raw_query, raw_key, hidden, visible=None, linear_only=False) -> Tensor:
        """Window and memory together; `linear_only`: every earlier token through the memory."""
        memory, see = self.memory, self.see
        assert memory is not None and see is not None
        if visible is not None and not linear_only:
            return self.mixed_pairs(query, key, value, raw_query, raw_key, hidden, visible)
        memory.rounded = see.memory_bytes == 2 and not torch.is_grad_enabled()
        window, sinks = (0, 0) if linear_only else (see.window, see.sinks)
        read = memory.read(raw_query, raw_key, value, hidden, window, sinks)
        if linear_only:
            return memory.alone(read, hidden).to(query.dtype)
        grouped = query.unflatten(1, (key.shape[1], -1))
        near, level = (x.flatten(1, 2) for x in window_read(grouped, key, value, window, sinks))
        return memory.mixed(read, near, level, hidden).to(query.dtype)

    def mixed_pairs(self, query, key, value, raw_query, raw_key, hidden, visible) -> Tensor:
        """Memory of all pairs of tokens that are not visible, and softmax of those that are: for kept tokens."""
        memory = self.memory
        assert isinstance(memory, LinearMemory) and self.see is not None and memory.variant == ""
        length, repeat = query.shape[2], query.shape[1] // key.shape[1]
        place = torch.arange(length, device=query.device)
        query_features, key_features = memory.features(raw_query, raw_key)
        sums = memory.log_decay(hidden)[..., 0].cumsum(-1).repeat_interleave(repeat, 1)
        entry = sums[..., (place + self.see.window).clamp_max(length - 1)]
        key_features, key, value = (x.repeat_interleave(repeat, 1) for x in (key_features, key, value))
        outputs = [
            mix_block(
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
    return (both @ value.to(both.dtype)) / both.sum(-1, keepdim=True).clamp_min(1e-20)


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
    if see.blocks:
        return near | block_pairs(see, query, key)
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


@torch.no_grad()
def block_pairs(see: See, query: Tensor, key: Tensor) -> Tensor:
    """Pairs that the best blocks give: `(B, H, T, T)`. A block is read once its first token has left the window."""
    length, repeat = query.shape[2], query.shape[1] // key.shape[1]
    place = torch.arange(length, device=query.device)
    pooled = F.pad(key, (0, 0, 0, -length % STEP)).unflatten(2, (-1, STEP)).mean(3)
    scores = (query.unflatten(1, (-1, repeat)) @ pooled.mT[:, :, None]).float() * query.shape[-1] ** -0.5
    gone = torch.arange(pooled.shape[2], device=query.device) * STEP <= place[:, None] - see.window
    mass = scores.masked_fill(~gone, -1e9).softmax(-1).sum(2).masked_fill(~gone, -1)
    best = mass.topk(min(see.blocks, mass.shape[-1]), dim=-1)
    read = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best.indices, best.values >= 0)
    return read.repeat_interleave(STEP, 3)[..., :length].repeat_interleave(repeat, 1)


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


def check() -> dict[str, float]:
    """The chunked forms against loops, and a memory read in chunks against the definition over pairs (float64)."""
    results = check_scans()
    torch.manual_seed(0)
    heads, groups, dim, length, width = 4, 2, 16, 200, 24
    arm = ArmAttention(nn.Identity())
    arm.see = See(window=32, memory=8)
    memory = arm.memory = make_memory(heads, groups, dim, 8, width, "").double()
    for parameter in memory.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    memory.gate_bias.data -= 3
    query, key, value, raw_query, raw_key = (
        torch.randn(2, count, length, dim, dtype=torch.float64) for count in (heads, groups, groups, heads, groups)
    )
    call = (query, key, value, raw_query, raw_key, torch.randn(2, length, width, dtype=torch.float64))
    pairs = window_pairs(32, 4, length, query.device)
    see = See(window=70, blocks=2)
    long = [torch.randn(1, count, 500, dim, dtype=torch.float64) for count in (heads, groups)]
    results["blocks"] = float((block_pairs(see, *long) != _blocks_of_each_query(see, *long)).sum())
    with torch.no_grad():
        results["memory"] = difference(arm.mixed(*call), arm.mixed(*call, pairs))
        changed = arm.mixed(*call)
        arm.see = replace(arm.see, memory_bytes=2)
        results["rounding of bf16 sums (no error)"] = difference(arm.mixed(*call), changed)
    return results


def _blocks_of_each_query(see: See, query: Tensor, key: Tensor) -> Tensor:
    """`block_pairs`, one query at a time."""
    (_, heads, length, dim), groups = query.shape, key.shape[1]
    pairs = torch.zeros(1, heads, length, length, dtype=torch.bool)
    for head in range(heads):
        group = head * groups // heads
        members = query[0, group * heads // groups : (group + 1) * heads // groups]
        for place in range(see.window, length):
            starts = range(0, place - see.window + 1, STEP)
            means = torch.stack([key[0, group, start : start + STEP].sum(0) / STEP for start in starts])
            mass = (members[:, place] @ means.mT * dim**-0.5).softmax(-1).sum(0)
            for block in mass.topk(min(see.blocks, len(mass))).indices.tolist():
                pairs[0, head, place, block * STEP : (block + 1) * STEP] = True
    return pairs
