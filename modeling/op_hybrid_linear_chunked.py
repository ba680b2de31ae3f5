"""The chunked PyTorch path of hybrid linear attention: linear memory in T, on CPU and GPU, under autograd.

Rows are brought to right padding. A causal row runs in segments that hand a state on; within a segment, and over a
whole bidirectional row, chunks of C queries run in parallel. Each chunk meets the keys near it one by one (softmax
inside the window, features outside it) and all the others through the sums of the chunks before (and after) it.
Cosine attention (`op_cosine_chunked.py`) runs on the same passes: its features are signed, its softmax branch is off.

Legend as in `op_hybrid_linear.py`; n chunks, K keys near a chunk (sinks first), R = H / G.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .feature_maps import FeatureMapWeights, apply_feature_map, feature_width
from .op_hybrid_linear_decay import ChunkDecay, after_entry, chunk_decay, per_head, sums_at_starts
from .op_rows import Rows, overwrite_slots, take_slots

CHUNK = 64
SEGMENT = 2048  # tokens of a causal pass: bounds what lives at once when no graph is kept
MASS_LIMIT = 30.0
DENOMINATOR_FLOOR = 1e-20
EMPTY_LEVEL = -1e30  # stands for the maximum of no scores


class Features(NamedTuple):
    """How features are made where a pass needs them.

    Fields: heads and width of what comes out; apply, from x `(B, heads of x, N, D)` and the place in its row of each
    token `(B, N)`, any number where there is no token, to features `(B, heads, N, width)`.
    """

    heads: int
    width: int
    apply: Callable[[Tensor, Tensor], Tensor]


class Settings(NamedTuple):
    """What a call fixes for all its tokens; log_weight and shift are `(1, H, 1, 1, 1)` or None.

    The maps are None where features come as tensors or not at all; softmax says whether that branch is wanted.
    """

    window: int
    sinks: int
    scaling: float
    level: str
    log_weight: Tensor | None
    shift: Tensor | None
    query_map: Features | None
    key_map: Features | None
    softmax: bool


class Branches(NamedTuple):
    """Both branches before they are joined, `(B, H, T, Dv | 1)`.

    No softmax fields without window and sinks; no mass and linear fields without features.
    """

    softmax_output: Tensor | None
    mass: Tensor | None
    numerator: Tensor | None
    denominator: Tensor | None

    def join(self) -> Tensor:
        if self.numerator is None or self.denominator is None:
            assert self.softmax_output is not None
            return self.softmax_output
        if self.mass is None or self.softmax_output is None:
            return self.numerator / self.denominator.clamp(min=DENOMINATOR_FLOOR)
        total = (self.mass + self.denominator).clamp(min=DENOMINATOR_FLOOR)
        return (self.mass * self.softmax_output + self.numerator) / total

    def linear_share(self) -> Tensor:
        assert self.denominator is not None
        total = self.denominator if self.mass is None else self.mass + self.denominator
        return self.denominator / total.clamp(min=DENOMINATOR_FLOOR)


class HybridLinearState(NamedTuple):
    """What a causal sequence leaves behind; batch first, sums in float32 (float64 for float64 input).

    Fields: kv `(B, H|G, F, Dv)` and normalizer `(B, H|G, F)`, the sums over the keys S <= j < count - W, decayed;
    window_key `(B, G, W, D)`, window_value `(B, G, W, Dv)`, the keys j >= S of the last W, as a ring: slot = j % W;
    window_features `(B, H|G, W, F)`, None when the key map came as weights; sink_key `(B, G, S, D)`, sink_value
    `(B, G, S, Dv)`; count `(B,)` int64, the real tokens so far; window_map_key `(B, G, W, D)`, what the key map reads
    of window_key's keys, None where that is the keys themselves. Slots not yet written are 0.
    """

    kv: Tensor
    normalizer: Tensor
    window_key: Tensor
    window_value: Tensor
    window_features: Tensor | None
    sink_key: Tensor
    sink_value: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    window_map_key: Tensor | None = None


class Inputs(NamedTuple):
    """One pass: query `(B, H, T, D)`, key, value, features and what their maps read as the op receives them, or None;
    log_decay `(B, H|G, T, 1)` or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_features: Tensor | None
    key_features: Tensor | None
    map_query: Tensor | None = None
    map_key: Tensor | None = None
    log_decay: Tensor | None = None

    def map(self, function) -> "Inputs":
        return Inputs._make(None if x is None else function(x) for x in self)


class Keys(NamedTuple):
    """The keys that a pass can see one by one, in the order of their position in the row.

    key, value `(B, G, N, D)`; features `(B, H|G, N, F)` or None, 0 where not visible; position and visible `(B, N)`,
    which leaves out padding and sinks; sink_key, sink_value `(B, G, S, D)`; end `(B,)`, the row's tokens so far.
    """

    key: Tensor
    value: Tensor
    features: Tensor | None
    position: Tensor
    visible: Tensor
    sink_key: Tensor
    sink_value: Tensor
    end: Tensor


def run_rows(
    query,
    key,
    value,
    query_features,
    key_features,
    *,
    window_weight=None,
    window_shift=None,
    window_reference="logsumexp",
    window=64,
    sinks=0,
    causal=True,
    scaling=None,
    attention_mask=None,
    initial_state=None,
    return_state=False,
    map_query=None,
    map_key=None,
    log_decay=None,
):
    """Run rows that may be padded; the arguments are those of `hybrid_linear_attention`.

    Returns:
        The branches in row order (real tokens first), the function that brings a `(B, H, T, *)` tensor back to the
        caller's order with 0 at padding, and the state or None.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query_map, key_map = (
        None if x is None or isinstance(x, Tensor) else _learned(x) for x in (query_features, key_features)
    )
    features = [x if isinstance(x, Tensor) else None for x in (query_features, key_features)]
    per_head = (None if x is None else x.to(dtype)[None, :, None, None, None] for x in (window_weight, window_shift))
    weight, shift = per_head
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        log_weight = None if weight is None else weight.log()
        softmax = query_features is None or window + sinks > 0
        settings = Settings(window, sinks, scaling, window_reference, log_weight, shift, query_map, key_map, softmax)
        rows = Rows(attention_mask, query)
        decay = None if log_decay is None else log_decay.to(dtype)[..., None]
        inputs = Inputs._make((query, key, value, *features, map_query, map_key, decay)).map(rows.compact)
        if causal:
            branches, state = run_causal(inputs, rows.lengths, initial_state, return_state, dtype, settings)
        else:
            branches, state = run_bidirectional(inputs, rows.lengths, dtype, settings), None
    return branches, rows.restore, state


def _learned(maps: FeatureMapWeights) -> Features:
    return Features(maps.weight.shape[0], feature_width(maps), lambda x, _: apply_feature_map(x, maps))


def run_causal(inputs, lengths, state, return_state, dtype, settings):
    """The segments of a causal row in order, the state carried from one to the next."""
    total = inputs.query.shape[2]
    if state is None:
        state = _empty_state(inputs, dtype, settings)
    parts = []
    for start in range(0, total, SEGMENT):
        segment = inputs.map(lambda x: x[:, :, start : start + SEGMENT])  # noqa: B023 (used at once)
        keys = _causal_keys(segment, (lengths - start).clamp(0, segment.query.shape[2]), state, dtype, settings)
        parts.append(_chunks(segment, keys, state, dtype, settings, causal=True))
        if return_state or start + SEGMENT < total:
            state = _advance(segment, keys, state, settings)
    if len(parts) > 1:
        fields = zip(*parts, strict=True)
        parts = [Branches(*(None if field[0] is None else torch.cat(field, dim=2) for field in fields))]
    return parts[0], (state if return_state else None)


def _empty_state(inputs, dtype, settings):
    batch, groups, _, dim = inputs.key.shape
    if settings.key_map is not None:
        heads, width = settings.key_map.heads, settings.key_map.width
    elif inputs.key_features is not None:
        heads, width = inputs.key_features.shape[1], inputs.key_features.shape[3]
    else:
        heads, width = inputs.query.shape[1], 0
    key, value, window, sinks = inputs.key, inputs.value, settings.window, settings.sinks
    value_dim = value.shape[-1]
    return HybridLinearState(
        kv=key.new_zeros(batch, heads, width, value_dim, dtype=dtype),
        normalizer=key.new_zeros(batch, heads, width, dtype=dtype),
        window_key=key.new_zeros(batch, groups, window, dim),
        window_value=value.new_zeros(batch, groups, window, value_dim),
        window_features=None if settings.key_map else key.new_zeros(batch, heads, window, width, dtype=dtype),
        sink_key=key.new_zeros(batch, groups, sinks, dim),
        sink_value=value.new_zeros(batch, groups, sinks, value_dim),
        count=torch.zeros(batch, dtype=torch.int64, device=key.device),
        window_map_key=_empty_ring(inputs.map_key, window),
    )


def _empty_ring(x: Tensor | None, window: int) -> Tensor | None:
    return None if x is None else x.new_zeros(*x.shape[:2], window, x.shape[3])


def _causal_keys(inputs, real, state, dtype, settings) -> Keys:
    """The window's keys, oldest first, then this segment's: place p holds token count - W + p."""
    window, sinks, count = settings.window, settings.sinks, state.count
    key, value = inputs.key, inputs.value
    end = count + real
    order = (count[:, None] + torch.arange(window, device=key.device)) % max(window, 1)
    keys = torch.cat([take_slots(state.window_key, order).to(dtype), key.to(dtype)], dim=2)
    values = torch.cat([take_slots(state.window_value, order).to(dtype), value.to(dtype)], dim=2)
    index = count[:, None] - window + torch.arange(keys.shape[2], device=key.device)
    visible = (index >= sinks) & (index < end[:, None])
    features = None
    if settings.key_map is not None:
        read = keys
        if inputs.map_key is not None:
            read = torch.cat([take_slots(state.window_map_key, order).to(dtype), inputs.map_key.to(dtype)], dim=2)
        features = settings.key_map.apply(read, index)
    elif inputs.key_features is not None:
        features = torch.cat([take_slots(state.window_features, order), inputs.key_features], dim=2).to(dtype)
    if features is not None:
        features = features.masked_fill(~visible[:, None, :, None], 0.0)
    places = torch.arange(sinks, device=key.device)
    sink_key = overwrite_slots(state.sink_key, key, places, count, end)
    sink_value = overwrite_slots(state.sink_value, value, places, count, end)
    return Keys(keys, values, features, index, visible, sink_key, sink_value, end)


def _advance(inputs, keys: Keys, state, settings) -> HybridLinearState:
    """The state after a segment: fold the keys that left the window, overwrite ring and sinks."""
    window, count, end = settings.window, state.count, keys.end
    kv, normalizer = state.kv, state.normalizer
    if keys.features is not None:
        left = (keys.position < end[:, None] - window)[:, None, :, None]
        folded = keys.features.masked_fill(~left, 0.0)
        if inputs.log_decay is not None:
            folded = folded * after_entry(inputs.log_decay, folded.shape[2])
            forgets = inputs.log_decay.sum(2, keepdim=True).exp()
            kv, normalizer = forgets * kv, forgets[..., 0] * normalizer
        kv, normalizer = kv + _outer(folded, keys.value), normalizer + folded.sum(2)
    # The newest token of slot s: the largest j < end with j % W == s; the sinks stay out of the ring.
    newest = end[:, None] - 1 - (end[:, None] - 1 - torch.arange(window, device=end.device)) % max(window, 1)
    newest = newest.masked_fill(newest < settings.sinks, -1)
    features, map_key = state.window_features, state.window_map_key
    if features is not None and inputs.key_features is not None:
        features = overwrite_slots(features, inputs.key_features, newest, count, end)
    if map_key is not None:
        map_key = overwrite_slots(map_key, inputs.map_key, newest, count, end)
    return HybridLinearState(
        kv,
        normalizer,
        overwrite_slots(state.window_key, inputs.key, newest, count, end),
        overwrite_slots(state.window_value, inputs.value, newest, count, end),
        features,
        keys.sink_key,
        keys.sink_value,
        end,
        map_key,
    )


def run_bidirectional(inputs, lengths, dtype, settings) -> Branches:
    """A whole row at once; place p of the keys holds token p - W, so that the first chunk's window fits."""
    window, sinks = settings.window, settings.sinks
    inputs = inputs.map(lambda x: x.to(dtype))
    key, value = (functional.pad(x, (0, 0, window, 0)) for x in (inputs.key, inputs.value))
    index = (torch.arange(key.shape[2], device=key.device) - window).expand(key.shape[0], -1)
    visible = (index >= sinks) & (index < lengths[:, None])
    features = None
    if settings.key_map is not None:
        read = key if inputs.map_key is None else functional.pad(inputs.map_key, (0, 0, window, 0))
        features = settings.key_map.apply(read, index)
    elif inputs.key_features is not None:
        features = functional.pad(inputs.key_features, (0, 0, window, 0))
    if features is not None:
        features = features.masked_fill(~visible[:, None, :, None], 0.0)
    short = max(sinks - inputs.key.shape[2], 0)
    first_key, first_value = (functional.pad(x[:, :, :sinks], (0, 0, 0, short)) for x in (inputs.key, inputs.value))
    keys = Keys(key, value, features, index, visible, first_key, first_value, lengths)
    state = _empty_state(inputs, dtype, settings)
    return _chunks(inputs, keys, state, dtype, settings, causal=False)


def _chunks(inputs, keys: Keys, state, dtype, settings, causal: bool) -> Branches:
    """Both branches of one pass. Chunk c meets the keys at places c C .. c C + W + C (+ W when bidirectional)."""
    window, sinks, length = settings.window, settings.sinks, inputs.query.shape[2]
    size = min(CHUNK, length)
    count = -(-length // size)
    ahead = 0 if causal else window
    reach = size + window + ahead
    grow = count * size - length

    def near_blocks(x):  # (B, heads, N, D) -> (B, heads, n, reach, D)
        return functional.pad(x, (0, 0, 0, grow + ahead)).unfold(2, reach, size).mT

    def with_sinks(x, first):
        return torch.cat([first.to(dtype)[:, :, None].expand(-1, -1, count, -1, -1), near_blocks(x)], dim=3)

    place = functional.pad(keys.position, (0, grow + ahead)).unfold(1, reach, size)[:, None, :, None]
    seen = functional.pad(keys.visible, (0, grow + ahead)).unfold(1, reach, size)[:, None, :, None]
    start = keys.position[:, :1] + window
    row = (start + torch.arange(count * size, device=start.device)).view(-1, 1, count, size, 1)
    first = torch.arange(sinks, device=start.device)
    first_seen = (first < keys.end[:, None])[:, None, None, None].expand(-1, -1, count, size, -1)
    if causal:
        seen, first_seen = seen & (place <= row), first_seen & (first <= row)
    inside = (row - place).abs() < window
    near = torch.cat([first_seen, seen & inside], dim=-1)

    local_value = with_sinks(keys.value, keys.sink_value)
    softmax = (None, None)
    if settings.softmax:
        query = _split(inputs.query.to(dtype), grow, size)
        softmax = _softmax_branch(query, with_sinks(keys.key, keys.sink_key), local_value, near, settings)
    linear = (None, None)
    if keys.features is not None:
        if settings.query_map is not None:
            read = inputs.query if inputs.map_query is None else inputs.map_query
            phi = settings.query_map.apply(read.to(dtype), start + torch.arange(length, device=start.device))
        else:
            assert inputs.query_features is not None
            phi = inputs.query_features.to(dtype)
        far = functional.pad(seen & ~inside, (sinks, 0))
        local_features = functional.pad(near_blocks(keys.features), (0, 0, sinks, 0))
        decay = None
        if inputs.log_decay is not None:
            decay = chunk_decay(_split(inputs.log_decay, grow, size)[..., 0])
        sums = _sums_elsewhere(keys, state, count, size, ahead, grow, causal, decay)
        linear = _linear_branch(_split(phi, grow, size), local_features, local_value, far, sums, decay, sinks)
    return Branches(*(None if x is None else x.flatten(2, 3)[:, :, :length] for x in (*softmax, *linear)))


def _split(x: Tensor, grow: int, size: int) -> Tensor:
    return functional.pad(x, (0, 0, 0, grow)).unflatten(2, (-1, size))


def _softmax_branch(query, keys, values, near, settings):
    """Softmax over the near keys: output `(B, H, n, C, Dv)` and mass `(B, H, n, C, 1)`, None without a weight."""
    groups = keys.shape[1]
    scores = _grouped(query * settings.scaling, groups, lambda q: q @ keys.mT).masked_fill(~near, -torch.inf)
    maximum = scores.amax(-1, keepdim=True).clamp(min=EMPTY_LEVEL)
    level = maximum.detach()
    weights = (scores - level).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    output = _grouped(weights, groups, lambda w: w @ values) / total
    if settings.log_weight is None:
        return output, None
    lse = total.log() + level
    r = lse if settings.level == "logsumexp" else maximum
    tilt = settings.log_weight
    if settings.shift is not None:
        tilt = tilt + settings.shift * r
    mass = (lse - r + tilt.clamp(-MASS_LIMIT, MASS_LIMIT)).exp()
    return output, mass.masked_fill(empty, 0.0)


def _linear_branch(phi_q, local_features, local_value, far, sums, decay: ChunkDecay | None, sinks: int):
    """Numerator `(B, H, n, C, Dv)` and denominator `(B, H, n, C, 1)` over the far keys."""
    heads, groups = local_features.shape[1], local_value.shape[1]
    if decay is not None:  # of a causal chunk's places only the first C, behind the sinks, can hold far keys
        place = slice(sinks, sinks + phi_q.shape[3])
        local_features, local_value, far = local_features[..., place, :], local_value[..., place, :], far[..., place]
    pairs = _grouped(phi_q, heads, lambda q: q @ local_features.mT)
    if decay is not None:
        pairs = pairs * per_head(decay.pairs, phi_q.shape[1])
        phi_q = phi_q * per_head(decay.read, phi_q.shape[1])[..., None]
    pairs = pairs.masked_fill(~far, 0.0)
    kv, normalizer = sums
    numerator = _grouped(pairs, groups, lambda p: p @ local_value) + _grouped(phi_q, heads, lambda q: q @ kv)
    denominator = pairs.sum(-1, keepdim=True) + _grouped(phi_q, heads, lambda q: q @ normalizer[..., None])
    return numerator, denominator


def _sums_elsewhere(keys: Keys, state, count, size, ahead, grow, causal, decay: ChunkDecay | None):
    """Per chunk, kv `(B, heads, n, F, Dv)` and normaliser `(B, heads, n, F)` of the keys beyond its reach."""
    kv, normalizer = state.kv.to(keys.value.dtype)[:, :, None], state.normalizer.to(keys.value.dtype)[:, :, None]
    if count == 1 or keys.features is None:
        return kv, normalizer
    features, value = (functional.pad(x, (0, 0, 0, grow + ahead)) for x in (keys.features, keys.value))

    def chunk_sums(begin):
        parts = [x[:, :, begin : begin + count * size].unflatten(2, (count, size)) for x in (features, value)]
        if decay is not None:
            parts[0] = parts[0] * decay.kept[..., None]
        return _outer(*parts), parts[0].sum(3)

    if decay is not None:
        firsts = (kv, normalizer)
        return tuple(sums_at_starts(decay.across, x, y) for x, y in zip(firsts, chunk_sums(0), strict=True))
    parts = [[_sum_before(x) for x in chunk_sums(0)]]
    if not causal:  # the keys after chunk c's reach: chunks of the row that starts 2 W further on
        parts.append([_sum_before(x.flip(2)).flip(2) for x in chunk_sums(2 * ahead)])
    return sum((kv_part for kv_part, _ in parts), kv), sum((z_part for _, z_part in parts), normalizer)


def _sum_before(x: Tensor) -> Tensor:
    """Running sum along axis 2 of what comes before each place."""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1].cumsum(2)], dim=2)


def _outer(features: Tensor, value: Tensor) -> Tensor:
    """Sum of feature times value: `(B, heads, ..., N, F)`, `(B, G, ..., N, Dv)` -> `(B, heads, ..., F, Dv)`."""
    ratio = features.shape[1] // value.shape[1]
    folded = features.unflatten(1, (-1, ratio)).mT.movedim(2, -3).flatten(-3, -2)
    return (folded @ value).unflatten(-2, (ratio, -1)).movedim(-3, 2).flatten(1, 2)


def _grouped(x: Tensor, groups: int, product) -> Tensor:
    """Multiply x `(B, H, n, C, N)` by tensors of `groups` heads, the R heads of a group laid along the rows."""
    ratio = x.shape[1] // groups
    if ratio == 1:
        return product(x)
    folded = x.unflatten(1, (groups, ratio)).movedim(2, -3).flatten(-3, -2)
    return product(folded).unflatten(-2, (ratio, -1)).movedim(-3, 2).flatten(1, 2)
