"""The backward pass: three kernels, those of the maps, then the sums over query heads, sinks and window weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..launching import cdiv, dense, dense_rows, launch
from ..triton_support import product_precision
from .backward import hybrid_linear_bwd_key_kernel, hybrid_linear_bwd_query_kernel, hybrid_linear_bwd_reverse_kernel
from .decay import decay_gradient
from .function import (
    LOG2E,
    Call,
    Operands,
    Plan,
    Saved,
    make_features,
    map_sources,
    map_spans,
    maps_of,
    new_buffer,
    strides,
    sum_blocks,
)
from .maps import map_backward
from .rows import PACKED, PLAIN, Rows

Found = dict[str, Tensor | None]  # gradients by the operands' names


class Pass(NamedTuple):
    """What the launches of one backward pass share.

    Fields: feature_q, feature_k `(B, H | E, T, F)` or None; sums, sums_z, the forward's before each chunk;
    grad `(B, H, T, V)`; grad_kv, grad_z, gradients of the last sums or None; needs, which operands need a gradient;
    inputs, features, whether those of query, key and value, and of the features are to be computed.
    """

    call: Call
    plan: Plan
    x: Operands
    feature_q: Tensor | None
    feature_k: Tensor | None
    sums: Tensor | None
    sums_z: Tensor | None
    saved: Saved
    grad: Tensor
    grad_kv: Tensor | None
    grad_z: Tensor | None
    needs: Operands
    inputs: bool
    features: bool


def run_backward(
    call: Call, plan: Plan, x: Operands, needs: Operands, sums, sums_z, saved: Saved, grad, grad_kv, grad_z
) -> list[Tensor | None]:
    """Gradients in the order of `Operands`, None where not needed.

    Args:
        needs: which operands need a gradient. sums, sums_z: the forward's, before each chunk.
        grad `(B, H, T, V)`; grad_kv, grad_z: gradients of the last sums, or None.
    """
    grad, grad_kv, grad_z = dense_rows(grad), dense(grad_kv), dense(grad_z)
    linear = plan.settings.values["LINEAR"]
    inputs = any((needs.query, needs.key, needs.value, needs.sink_key, needs.sink_value))
    maps_need = any((needs.q_weight, needs.q_bias, needs.q_magnitude, needs.k_weight, needs.k_bias, needs.k_magnitude))
    read_maps = bool(needs.map_query or needs.map_key) or (inputs and x.map_query is None)
    through_maps = read_maps and any(name is not None for name in call.activations)
    features = linear and bool(needs.feature_q or needs.feature_k or maps_need or through_maps or needs.log_decay)
    this = Pass(
        call, plan, x, *make_features(call, x), sums, sums_z, saved, grad, grad_kv, grad_z, needs, inputs, features
    )  # fmt: skip
    found: Found = {}
    terms, grad_query, grad_feature_q, sink_parts = _query_side(this, found)
    back: tuple[Tensor | None, Tensor | None] = (None, None)
    across: Tensor | None = None
    if linear and (inputs or features or needs.first_kv):
        back, across = _reverse(this, terms, found)
    if inputs or features:
        grad_key, grad_value, grad_feature_k, key_terms = _key_side(this, terms, back)
        if needs.log_decay:
            assert key_terms is not None and across is not None
            found["log_decay"] = _decay_gradient(this, terms, key_terms, across)
        _through_maps(this, found, (grad_query, grad_key), (grad_feature_q, grad_feature_k))
        if inputs and call.sinks:
            _add_sinks(this, found, sink_parts, (grad_key, grad_value))
        found |= {"query": grad_query, "key": grad_key, "value": grad_value}
    return [
        _like(found.get(name), tensor) if need and tensor is not None else None
        for name, tensor, need in zip(x._fields, x, needs, strict=True)
    ]


def _like(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    """A gradient in its tensor's dtype; zeros where nothing flows."""
    return torch.zeros_like(tensor) if gradient is None else gradient.to(tensor.dtype)


def _feature_dtype(this: Pass, given: Tensor | None) -> torch.dtype:
    """Dtype of a feature's gradient: that of the features, given or computed."""
    return product_precision(this.x.query.dtype)[0] if given is None else given.dtype


def _turn(gradient: Tensor | None) -> Tensor | None:
    """`(B, T, H, .)`, as the kernels write, to `(B, H, T, .)`."""
    return None if gradient is None else gradient.transpose(1, 2)


def _query_side(this: Pass, found: Found):
    """Launch the query kernel; the window's gradients are left in `found`.

    Returns:
        Terms `(4 to 6, B, H, T)` float32; gradients of queries and query features `(B, H, T, D | F)` or None; the
        blocks' parts of the gradients of sink keys and values `(B H, programs, S, D | V)`, or twice None.
    """
    call, plan, x, saved = this.call, this.plan, this.x, this.saved
    settings, rows, sizes = plan.settings, call.rows, plan.settings.tiles.query
    shape = settings.values
    batch, heads, length, dim = x.query.shape
    plain, spans = rows.kind == PLAIN, call.window + call.sinks > 0
    programs = plan.queries.total * (settings.tiles.chunk // sizes.block)
    planes = 4 + call.maximum + shape["DECAY"]
    terms = torch.empty(planes, batch, heads, length, dtype=torch.float32, device=x.query.device)
    grad_query = grad_feature = part_weight = part_key = part_value = None
    if this.inputs:
        grad_query = new_buffer(batch, length, heads, dim, whole=plain and spans, like=x.query)
    if this.features:
        dtype = _feature_dtype(this, x.feature_q)
        grad_feature = new_buffer(batch, length, heads, shape["F"], whole=plain, like=x.query, dtype=dtype)
    if spans and shape["LINEAR"]:
        part_weight = terms.new_empty(batch * heads, programs, 2)
    if this.inputs and call.sinks:
        part_key = terms.new_empty(batch * heads, programs, call.sinks, dim)
        part_value = terms.new_empty(batch * heads, programs, call.sinks, shape["V"])
    sinks = (x.key, x.value) if x.sink_key is None else (x.sink_key, x.sink_value)
    launch(
        hybrid_linear_bwd_query_kernel,
        (programs, batch * heads),
        (x.query, x.key, x.value, this.feature_k, *sinks, this.sums, this.sums_z, saved.decay, x.weight, x.shift,
         saved.output, saved.difference, this.grad, saved.stats, saved.best,
         grad_query, grad_feature, terms, part_weight, part_key, part_value,
         plan.queries.row, plan.queries.base, rows.start, rows.size, rows.past),
        (rows.number, length, plan.queries.total, call.window, call.scaling * LOG2E, call.scaling,
         batch * heads * length, *strides(*sinks, x.query, x.key, x.value, this.feature_k, this.grad)),
        {"BQ": sizes.block, "BK": sizes.inner, "INPUTS": this.inputs, "FEATURES": this.features},
        *sizes[2:],
        shared=shape,
    )  # fmt: skip
    if part_weight is not None and (this.needs.weight or this.needs.shift):
        found["weight"], found["shift"] = part_weight.view(batch, heads, programs, 2).sum((0, 2)).unbind(1)
    return terms, _turn(grad_query), _turn(grad_feature), (part_key, part_value)


def _reverse(this: Pass, terms: Tensor, found: Found) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Launch the reverse walk: what the queries after each chunk send back, and the gradient of the state's sums.

    Returns:
        The sums `(B H, slots, F, V)` and `(B H, slots, F)`, and of a memory that forgets their products with the
        forward's, `(tiles of V, B H, slots, F)`, else None.
    """
    call, plan, x = this.call, this.plan, this.x
    settings, rows, shape = plan.settings, call.rows, plan.settings.values
    batch, heads, length, _ = x.query.shape
    width, value_dim, slots = shape["F"], shape["V"], plan.queries.total
    dot, _ = product_precision(x.query.dtype)
    sums = terms.new_empty(batch * heads, slots, width, value_dim, dtype=dot)
    sums_z = terms.new_empty(batch * heads, slots, width)
    first_kv = first_z = None
    if rows.past is not None:
        first_kv = terms.new_empty(batch, heads, width, value_dim)
        first_z = terms.new_empty(batch, heads, width)
    block_f, block_v = sum_blocks(settings)
    across = None
    if shape["DECAY"]:
        across = terms.new_empty(cdiv(value_dim, block_v), batch * heads, slots, width)
    launch(
        hybrid_linear_bwd_reverse_kernel,
        (cdiv(width, block_f) * cdiv(value_dim, block_v), rows.number * heads),
        (this.feature_q, this.grad, terms, sums, sums_z, first_kv, first_z,
         this.saved.decay, this.sums, this.sums_z, this.grad_kv, this.grad_z, across,
         rows.start, rows.size, plan.queries.base),
        (length, slots, batch * heads * length, batch * heads, *strides(this.feature_q, this.grad)),
        {"BF": block_f, "BV": block_v, "LAST": this.grad_kv is not None},
        *settings.tiles.sums[2:],
        shared=shape,
    )  # fmt: skip
    for name, part, last in (("first_kv", first_kv, this.grad_kv), ("first_z", first_z, this.grad_z)):
        if part is not None:
            total = _per_group(part, shape["E"])
            found[name] = total if last is None or across is not None else total + last
    return (sums, sums_z), across


def _decay_gradient(this: Pass, terms: Tensor, key_terms: Tensor, across: Tensor) -> Tensor:
    """The gradient of log_decay, `(B, E, T)`."""
    ends, saved, blocks = None, this.saved, this.plan.queries
    if this.grad_kv is not None:
        assert this.grad_z is not None and saved.last_kv is not None and saved.last_z is not None
        ends = (this.grad_kv * saved.last_kv).sum((2, 3)) + (this.grad_z * saved.last_z).sum(2)
    shared = this.plan.settings.values
    return decay_gradient(this.call.rows, blocks, terms, key_terms, across, ends, this.call.window, shared)


def _per_group(gradient: Tensor, groups: int) -> Tensor:
    """Sum `(B, H, ...)` over the query heads that share one of `groups` heads."""
    heads = gradient.shape[1]
    return gradient if heads == groups else gradient.unflatten(1, (groups, heads // groups)).sum(2)


def _key_side(this: Pass, terms: Tensor, back: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    """Launch the key kernel: gradients of keys, values `(B, G, T', .)` and key features `(B, E, T', F)`, and
    `(B, H, T')` phi_k . d phi_k of a memory that forgets."""
    call, plan, x, saved = this.call, this.plan, this.x, this.saved
    settings, rows, sizes, blocks = plan.settings, call.rows, plan.settings.tiles.key, plan.keys
    shape = settings.values
    batch, heads, length, dim = x.query.shape
    key_length, plain = x.key.shape[2], rows.kind == PLAIN
    grad_key = grad_value = grad_feature = key_terms = None
    if this.inputs:
        grad_key = new_buffer(batch, key_length, heads, dim, whole=plain and call.window > 0, like=x.key)
        grad_value = new_buffer(batch, key_length, heads, shape["V"], whole=plain, like=x.value)
    if this.features:
        dtype = _feature_dtype(this, x.feature_k)
        grad_feature = new_buffer(batch, key_length, heads, shape["F"], whole=plain, like=x.key, dtype=dtype)
        if shape["DECAY"]:
            key_terms = terms.new_empty(batch, heads, key_length)
    last = shape["LINEAR"] and this.grad_kv is not None
    launch(
        hybrid_linear_bwd_key_kernel,
        (blocks.total * (settings.tiles.chunk // sizes.block), batch * heads),
        (x.query, x.key, x.value, this.feature_q, this.feature_k, this.grad, terms, saved.stats, saved.best, *back,
         this.grad_kv if last else None, this.grad_z if last else None, saved.decay,
         grad_key, grad_value, grad_feature, key_terms,
         blocks.row, blocks.base, plan.queries.base, rows.start, rows.size, rows.past),
        (rows.number, length, plan.queries.total, call.window, key_length, call.scaling * LOG2E, call.scaling,
         batch * heads * length, batch * shape["E"] * length,
         *strides(x.query, x.key, x.value, this.feature_q, this.feature_k, this.grad)),
        {"BN": sizes.block, "BM": sizes.inner, "LAST": last, "INPUTS": this.inputs, "FEATURES": this.features},
        *sizes[2:],
        shared=shape,
    )  # fmt: skip
    gradients = zip((grad_key, grad_value, grad_feature), (shape["G"], shape["G"], shape["E"]), strict=True)
    return [*(None if g is None else _per_group(g.transpose(1, 2), groups) for g, groups in gradients), key_terms]


def _through_maps(this: Pass, found: Found, grad_inputs, grad_features) -> None:
    """Gradients of features or of their maps, and of what the maps read: tensors of their own, or query and key,
    whose gradients at hand it is added to."""
    own = this.x.map_query is not None
    if own:
        grad_inputs = (None, None)
    names = ("map_query", "map_key") if own else ("query", "key")
    sides = zip(
        names, maps_of(this.call, this.x), map_spans(this.call), map_sources(this.x), grad_inputs, grad_features,
        strict=True,
    )  # fmt: skip
    for name, map_, span, source, target, grad in sides:
        letter = "q" if name.endswith("query") else "k"
        if map_ is None or grad is None:
            found[f"feature_{letter}"] = grad
            continue
        batch, _, length, dim = source.shape
        heads, buffer = grad.shape[1], target
        if (own and getattr(this.needs, name)) or (target is not None and target.shape[1] != heads):
            buffer = torch.empty(batch, length, heads, dim, dtype=source.dtype, device=source.device).transpose(1, 2)
        parts = map_backward(source, map_, grad, grad_x=buffer, span=span, add=buffer is target)
        if own and buffer is not None:
            found[name] = _per_group(buffer, source.shape[1])
        elif buffer is not target:
            target += _per_group(buffer, target.shape[1])
        found |= {f"{letter}_{part}": g for part, g in zip(("weight", "bias", "magnitude"), parts, strict=True)}


def _add_sinks(this: Pass, found: Found, parts, gradients) -> None:
    """Add up the blocks' parts of the sinks' gradients, and put them where the sinks came from."""
    rows, sinks = this.call.rows, this.call.sinks
    for name, part, target in zip(("sink_key", "sink_value"), parts, gradients, strict=True):
        batch, groups = target.shape[:2]
        part = part.unflatten(0, (batch, groups, -1)).sum(2)
        if rows.past is not None:
            found[name] = part.sum(2)
        elif rows.kind == PLAIN:
            there = min(sinks, target.shape[2])
            target[:, :, :there] += part.sum(2)[:, :, :there].to(target.dtype)
        else:
            _scatter_sinks(rows, this.plan, part, target)


def _scatter_sinks(rows: Rows, plan: Plan, part: Tensor, target: Tensor) -> None:
    """Sinks of padded or packed rows: part `(B, G, programs, S, .)`, each added at its row's first tokens."""
    assert rows.start is not None
    place = torch.arange(part.shape[3], device=part.device)
    batch = torch.arange(rows.number, device=part.device)[:, None]
    if rows.kind == PACKED:
        assert plan.queries.row is not None
        owner = plan.queries.row.repeat_interleave(plan.settings.tiles.chunk // plan.settings.tiles.query.block)
        chosen = (owner == batch).to(part.dtype)
        total = torch.einsum("np,bgpsd->nbgsd", chosen, part)[:, 0]
        start, size = rows.start[:-1], rows.start[1:] - rows.start[:-1]
        batch = torch.zeros_like(batch)
    else:
        assert rows.size is not None
        total, start, size = part.sum(2), rows.start, rows.size
    inside = (place < size[:, None])[:, None, :, None]
    index = (start[:, None] + place).clamp(max=target.shape[2] - 1).long()
    total = total.masked_fill(~inside, 0.0).movedim(1, 2).to(target.dtype)
    target.transpose(1, 2).index_put_((batch.expand_as(index), index), total, accumulate=True)
