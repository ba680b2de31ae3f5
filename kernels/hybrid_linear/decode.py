"""One token of hybrid linear attention per row, state included, in one launch.

No program of the kernel reads what another writes:

- functional (`decode_step`): the new state goes to fresh tensors;
- in place (`decode_step_`): the ring has W + 1 slots (token j in slot j % (W + 1)), so that the new token's slot is
  one that nobody reads; its own key and value come from the input; and the normaliser has two halves, of which a step
  reads the one of `count % 2` and writes the other. The caller advances `count`, once per token for all layers.

Legend: B batch, H query heads, G key/value heads, HK state heads (H, or G when a group shares its key map), D head
dim, Dm width of what the maps read, Dv value dim, F features, f width of a map, W window, S sinks.
"""

import torch
from torch import Tensor

from ..launching import cdiv, dense, dense_rows, launch, next_power_of_2
from ..triton_support import unavailable
from .decode_kernel import hybrid_linear_decode_kernel
from .reference import State

ACTIVATIONS = {"softmax": 1, "exp": 2, "relu": 3, "elu": 4}  # 0: features are given
SIGNED = (1, 2)  # activations that keep both signs of the map's output, F = 2 f
MAX_DIM = MAX_FEATURES = 256
TILE = 16384  # elements of the sums that a program holds
MAP_TILE = 4096  # elements of a map's weight that a program holds at once
KEY_TILE = 4096  # elements of the window's keys, then values, that a program holds at once
MAX_REGISTERS = 128  # of a thread, where that spills nothing: two programs of 8 warps share a multiprocessor
PROGRAMS = 132  # fewer than this: value dimensions are divided further, down to MIN_BLOCK_DV
MIN_BLOCK_DV = 32
HEADS_TOGETHER: int | None = None  # heads of a row that run side by side; None is a group, which shares a window


def decode_unsupported(query: Tensor, query_features, key_features) -> str | None:
    """Say why no decode kernel can do a call of one token, or None when one can."""
    reason = unavailable(query)
    if reason is not None:
        return reason
    if query.shape[-1] > MAX_DIM:
        return f"the decode kernel takes head dimensions up to {MAX_DIM} and this one is {query.shape[-1]}"
    for features in (query_features, key_features):
        if features is None:
            continue
        if feature_count(features) > MAX_FEATURES:
            return f"the decode kernel takes up to {MAX_FEATURES} features and these are {feature_count(features)}"
        if not isinstance(features, Tensor) and features.weight.shape[1] > MAX_DIM:
            return (
                f"the decode kernel takes maps of up to {MAX_DIM} numbers, this one reads {features.weight.shape[1]}"
            )
    return None


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features,
    key_features,
    *,
    window_weight: Tensor | None,
    window_shift: Tensor | None,
    window_reference: str,
    window: int,
    sinks: int,
    scaling: float | None,
    attention_mask: Tensor | None,
    state,
    map_query: Tensor | None = None,
    map_key: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, State]:
    """One token per row from an old state to a new one, in one launch; arguments as in `hybrid_linear_attention`.

    Args:
        query: `(B, H, 1, D)`; key `(B, G, 1, D)`; value `(B, G, 1, Dv)`; features `(B, heads, 1, F)`, maps or None.
        attention_mask: `(B, 1)`, 0 leaves the row's state as it is and gives 0.
        state: fields of `HybridLinearState`; not changed.
        map_query, map_key, log_decay: `(B, H, 1, Dm)`, `(B, G, 1, Dm)`, `(B, HK, 1)` or None.

    Returns:
        Output `(B, H, 1, Dv)` in the query's dtype, and the new state's fields.
    """
    old = State._make(map(dense, state))
    new = State._make(None if x is None else torch.empty_like(x) for x in old)
    output = _launch(
        (query, key, value, query_features, key_features, map_query, map_key, log_decay),
        (window_weight, window_shift, window_reference, window, sinks, scaling, attention_mask),
        old,
        new,
        in_place=False,
        log_weight=False,
    )
    return output, new


def decode_step_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features,
    key_features,
    *,
    window_weight: Tensor | None,
    window_shift: Tensor | None,
    window_reference: str,
    window: int,
    sinks: int,
    scaling: float | None,
    attention_mask: Tensor | None,
    buffers,
    count: Tensor,
    map_query: Tensor | None = None,
    map_key: Tensor | None = None,
    log_decay: Tensor | None = None,
    log_weight: bool = False,
) -> Tensor:
    """One token per row that changes the buffers in place, in one launch; CUDA graphs replay it.

    Args: those of `decode_step`, and
        buffers: contiguous fields. kv `(B, HK, F, Dv)` and normalizer `(2, B, HK, F)`, float32, half `count % 2`
            of a row being its current one; ring key `(B, G, R, D)`, value `(B, G, R, Dv)` and features `(B, HK, R, F)`
            (None with a map), R = W + 1 (0 when W = 0), token j in slot j % R; sink key and value `(B, G, S, *)`;
            ring_map_key `(B, G, R, Dm)` or None.
        count: `(B,)` int64, each row's tokens before this one; the caller advances it.
        log_weight: `window_weight` is its logarithm.

    Returns:
        Output `(B, H, 1, Dv)` in the query's dtype.
    """
    *fields, ring_map_key = buffers
    held = State._make((*fields, count, ring_map_key))
    return _launch(
        (query, key, value, query_features, key_features, map_query, map_key, log_decay),
        (window_weight, window_shift, window_reference, window, sinks, scaling, attention_mask),
        held,
        held,
        in_place=True,
        log_weight=log_weight,
    )


def feature_count(features) -> int:
    """F of given features or of a map."""
    if isinstance(features, Tensor):
        return features.shape[-1]
    return features.weight.shape[-1] * (2 if ACTIVATIONS[features.activation] in SIGNED else 1)


def _launch(inputs, options, old: State, new: State, *, in_place: bool, log_weight: bool) -> Tensor:
    query, key, value, query_features, key_features, map_query, map_key, log_decay = inputs
    window_weight, window_shift, window_reference, window, sinks, scaling, mask = options
    query, key, value, map_query, map_key = map(dense_rows, (query, key, value, map_query, map_key))
    batch, heads, _, dim = query.shape
    groups, value_dim, state_heads = key.shape[1], value.shape[-1], old.kv.shape[1]
    query_given, query_map, query_activation = _split_features(query_features)
    key_given, key_map, key_activation = _split_features(key_features)
    count = 0 if query_features is None else feature_count(query_features)
    halves = 2 if {query_activation, key_activation} & set(SIGNED) else 1
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else (mask != 0).view(torch.uint8)
    output = torch.empty(batch, heads, 1, value_dim, dtype=query.dtype, device=query.device)
    map_dim = dim if map_query is None else map_query.shape[-1]
    blocks, limits = _blocks(
        batch * state_heads, heads // state_heads, dim, map_dim, value_dim, halves, count // halves, window, sinks
    )
    grid = (batch * state_heads * cdiv(value_dim, blocks["BLOCK_DV"]),)
    weights = (dense(x) for x in (*query_map, *key_map, window_weight, window_shift))
    per_token = (query, key, value, query_given, key_given, map_query, map_key, log_decay)
    tensors = (*per_token, *weights, mask)
    launch(
        hybrid_linear_decode_kernel,
        grid,
        (
            *(query if x is None else x for x in (*tensors, *old, *new)),  # what is absent is never read
            output,
        ),
        (
            *(stride for x in per_token for stride in _strides(x)),
            0 if mask is None else mask.stride(0),
            old.normalizer.stride(0) if in_place else 0,
            dim**-0.5 if scaling is None else scaling,
            batch,
        ),
        {
            "H": heads,
            "G": groups,
            "HK": state_heads,
            "D": dim,
            "DM": map_dim,
            "DV": value_dim,
            "W": window,
            "S": sinks,
            "WIDTH": count // halves,
            "HALVES": halves,
            "QUERY_ACTIVATION": query_activation,
            "KEY_ACTIVATION": key_activation,
            "QUERY_BIAS": query_map[1] is not None,
            "KEY_BIAS": key_map[1] is not None,
            "QUERY_MAGNITUDE": query_map[2] is not None,
            "KEY_MAGNITUDE": key_map[2] is not None,
            "HAS_SHIFT": window_shift is not None,
            "HAS_MASK": mask is not None,
            "MAPPED": map_key is not None,
            "DECAY": log_decay is not None,
            "LOG_WEIGHT": log_weight,
            "MAXIMUM": window_reference == "max",
            "IN_PLACE": in_place,
            "INNER": state_heads // groups if HEADS_TOGETHER is None else min(HEADS_TOGETHER, state_heads),
            **blocks,
        },
        **limits,
    )
    return output


def _split_features(features):
    """Given features, the map's three tensors, and the activation's number; what is absent is None."""
    if features is None or isinstance(features, Tensor):
        return dense_rows(features), (None, None, None), 0
    return None, (features.weight, features.bias, features.magnitude), ACTIVATIONS[features.activation]


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _blocks(
    programs: int, ratio: int, dim: int, map_dim: int, value_dim: int, halves: int, width: int, window: int, sinks: int
):
    """Tile sizes by shape: the sums fit a program's registers, and a small batch still fills the device."""
    dim2, map_dim2, width2 = (next_power_of_2(max(size, 1)) for size in (dim, map_dim, width))
    value2 = next_power_of_2(value_dim)
    block_dv = min(value2, max(TILE // (halves * width2), 16))
    while block_dv > MIN_BLOCK_DV and programs * cdiv(value_dim, block_dv) * 2 <= PROGRAMS:
        block_dv //= 2
    tokens = max(KEY_TILE // max(dim2, block_dv), 16)
    blocks = {
        "D2": dim2,
        "DM2": map_dim2,
        "F2": width2,
        "BLOCK_DV": block_dv,
        "BLOCK_D": min(map_dim2, max(MAP_TILE // width2, 16)),
        "BLOCK_W": min(next_power_of_2(max(window, 1)), tokens),
        "BLOCK_S": min(next_power_of_2(max(sinks, 1)), tokens),
    }
    if halves * width2 * block_dv <= TILE // 4:
        return blocks, {"warps": 4, "stages": 3}
    return blocks, {"warps": 8, "stages": 3, "registers": MAX_REGISTERS if ratio == 1 and dim2 <= 128 else None}
