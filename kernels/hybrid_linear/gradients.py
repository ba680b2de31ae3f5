"""The backward pass: four launches at most, then the sums over query heads, sinks and window weights."""

from typing import Any

import torch
from torch import Tensor

from ..launching import cdiv, launch
from ..triton_support import product_precision
from .backward import hybrid_linear_bwd_key_kernel, hybrid_linear_bwd_query_kernel, hybrid_linear_bwd_reverse_kernel
from .function import (
    LOG2E,
    Call,
    Operands,
    Plan,
    Saved,
    make_features,
    map_spans,
    maps_of,
    new_buffer,
    strides,
    sum_blocks,
)
from .maps import map_backward
from .rows import PACKED, PLAIN


def run_backward(
    call: Call, plan: Plan, x: Operands, needs: Operands, sums, sums_z, saved: Saved, grad, grad_kv, grad_z
):
    """Gradients in the order of `Operands`, None where not needed.

    Args:
        needs: which operands need a gradient. sums, sums_z: the forward's, before each chunk.
        grad `(B, H, T, V)`; grad_kv, grad_z: gradients of the last sums, or None.
    """
    if grad.stride(3) != 1:
        grad = grad.contiguous()
    feature_q, feature_k = make_features(call, x)
    inputs = any((needs.query, needs.key, needs.value, needs.sink_key, needs.sink_value))
    maps_need = any((needs.q_weight, needs.q_bias, needs.q_magnitude, needs.k_weight, needs.k_bias, needs.k_magnitude))
    through_maps = inputs and any(name is not None for name in call.activations)
    features = plan.settings.values["LINEAR"] and bool(needs.feature_q or needs.feature_k or maps_need or through_maps)
    found: dict[str, Tensor | None] = {}
    terms, grad_query, grad_feature_q = _query_side(
        call, plan, x, feature_k, sums, sums_z, saved, grad, inputs, features, needs.weight or needs.shift, found
    )
    if plan.settings.values["LINEAR"] and (inputs or features or needs.first_kv):
        back = _reverse(call, plan, x, feature_q, grad, terms, found, grad_kv, grad_z)
    else:
        back = (None, None)
    if inputs or features:
        grad_key, grad_value, grad_feature_k = _key_side(
            call, plan, x, feature_q, feature_k, saved, grad, terms, back, grad_kv, grad_z, inputs, features
        )
        _through_maps(call, x, found, (grad_query, grad_key), (grad_feature_q, grad_feature_k), inputs)
        if inputs:
            _add_sinks(call, plan, x, found, grad_key, grad_value)
        found |= {"query": grad_query, "key": grad_key, "value": grad_value}
    return [
        _like(found.get(name), tensor) if need else None
        for name, tensor, need in zip(x._fields, x, needs, strict=True)
    ]


def _like(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    """A gradient in its tensor's dtype; zeros where nothing flows."""
    return torch.zeros_like(tensor) if gradient is None else gradient.to(tensor.dtype)


def _query_side(call, plan, x, feature_k, sums, sums_z, saved, grad, inputs, features, mix, found):
    """Launch the query kernel: per-row terms, gradients of queries and their features; leaves the parts in `found`."""
    settings, rows, sizes = plan.settings, call.rows, plan.settings.tiles.query
    shape = settings.values
    batch, heads, length, dim = x.query.shape
    spans = call.window + call.sinks > 0
    programs = plan.queries.count * (settings.tiles.chunk // sizes.block)
    device, kind = x.query.device, rows.kind
    planes = 5 if call.maximum else 4
    terms = torch.empty(planes, batch, heads, length, dtype=torch.float32, device=device)
    grad_query = grad_feature = part_weight = part_key = part_value = None
    if inputs:
        make = new_buffer if spans else _zeros
        grad_query = make(kind, batch, length, heads, dim, like=x.query)
    if features:
        given = x.feature_q if call.activations[0] is None else None
        dtype = product_precision(x.query.dtype)[0] if given is None else given.dtype
        grad_feature = new_buffer(kind, batch, length, heads, shape["F"], like=x.query, dtype=dtype)
    if spans and plan.settings.values["LINEAR"]:
        part_weight = terms.new_empty(batch * heads, programs, 2)
    if inputs and call.sinks:
        part_key = terms.new_empty(batch * heads, programs, call.sinks, dim)
        part_value = terms.new_empty(batch * heads, programs, call.sinks, shape["V"])
    sinks = (x.key, x.value) if x.sink_key is None else (x.sink_key, x.sink_value)
    launch(
        hybrid_linear_bwd_query_kernel,
        (programs, batch * heads),
        (x.query, x.key, x.value, feature_k, *sinks, sums, sums_z, x.weight, x.shift, saved.output,
         saved.difference, grad, saved.stats, saved.best, grad_query,
         grad_feature, terms, part_weight, part_key, part_value, plan.queries.row, plan.queries.base, rows.start,
         rows.size, rows.past,
         rows.number, length, plan.slots, call.window, call.scaling * LOG2E, call.scaling, batch * heads * length,
         *strides(*sinks, x.query, x.key, x.value, feature_k, grad)),
        {**shape, "BQ": sizes.block, "BK": sizes.inner, "INPUTS": inputs, "FEATURES": features},
        *sizes[2:],
    )  # fmt: skip
    if part_weight is not None and mix:
        found["weight"], found["shift"] = part_weight.view(batch, heads, programs, 2).sum((0, 2)).unbind(1)
    if part_key is not None:
        found["part_key"], found["part_value"] = part_key, part_value
    turned = [None if g is None else g.transpose(1, 2) for g in (grad_query, grad_feature)]
    return terms, *turned


def _zeros(kind, *size, like, dtype=None):
    return torch.zeros(size, dtype=dtype or like.dtype, device=like.device)


def _reverse(call, plan, x, feature_q, grad, terms, found, grad_kv, grad_z):
    """Launch the reverse walk: what the queries after each chunk send back, and the gradient of the state's sums."""
    settings, rows, shape = plan.settings, call.rows, plan.settings.values
    batch, heads, length, _ = x.query.shape
    width, value_dim, past = shape["F"], shape["V"], rows.past is not None
    dot, _ = product_precision(x.query.dtype)
    device = x.query.device
    sums = torch.empty(batch * heads, plan.slots, width, value_dim, dtype=dot, device=device)
    sums_z = torch.empty(batch * heads, plan.slots, width, dtype=torch.float32, device=device)
    first_kv = torch.empty(batch, heads, width, value_dim, dtype=torch.float32, device=device) if past else None
    first_z = torch.empty(batch, heads, width, dtype=torch.float32, device=device) if past else None
    block_f, block_v = sum_blocks(settings)
    launch(
        hybrid_linear_bwd_reverse_kernel,
        (cdiv(width, block_f) * cdiv(value_dim, block_v), rows.number * heads),
        (feature_q, grad, terms, sums, sums_z, first_kv, first_z, rows.start, rows.size, plan.queries.base,
         length, plan.slots, batch * heads * length, *strides(feature_q, grad)),
        {**shape, "BF": block_f, "BV": block_v},
        *settings.tiles.sums[2:],
    )  # fmt: skip
    if past:
        for name, part, last in (("first_kv", first_kv, grad_kv), ("first_z", first_z, grad_z)):
            total = _per_group(part, shape["E"])
            found[name] = total if last is None else total + last
    return sums, sums_z


def _per_group(gradient: Tensor, groups: int) -> Tensor:
    """Sum `(B, H, ...)` over the query heads that share one of `groups` heads."""
    heads = gradient.shape[1]
    return gradient if heads == groups else gradient.unflatten(1, (groups, heads // groups)).sum(2)


def _key_side(call, plan, x, feature_q, feature_k, saved, grad, terms, back, grad_kv, grad_z, inputs, features):
    """Launch the key kernel: gradients of keys, values `(B, G, T', .)` and key features `(B, E, T', F)`."""
    settings, rows, sizes = plan.settings, call.rows, plan.settings.tiles.key
    shape = settings.values
    batch, heads, length, dim = x.query.shape
    key_length = x.key.shape[2]
    kind, linear = rows.kind, plan.settings.values["LINEAR"]
    grad_key = grad_value = grad_feature = None
    if inputs:
        grad_key = (new_buffer if call.window else _zeros)(kind, batch, key_length, heads, dim, like=x.key)
        grad_value = new_buffer(kind, batch, key_length, heads, shape["V"], like=x.value)
    if features:
        given = x.feature_k if call.activations[1] is None else None
        dtype = product_precision(x.query.dtype)[0] if given is None else given.dtype
        grad_feature = new_buffer(kind, batch, key_length, heads, shape["F"], like=x.key, dtype=dtype)
    last = linear and grad_kv is not None
    blocks = plan.keys
    launch(
        hybrid_linear_bwd_key_kernel,
        (blocks.count * (settings.tiles.chunk // sizes.block), batch * heads),
        (x.query, x.key, x.value, feature_q, feature_k, grad, terms, saved.stats, saved.best, *back,
         grad_kv if last else None, grad_z if last else None, grad_key, grad_value, grad_feature,
         blocks.row, blocks.base, plan.queries.base, rows.start, rows.size, rows.past,
         rows.number, length, plan.slots, call.window, key_length, call.scaling * LOG2E, call.scaling,
         batch * heads * length, *strides(x.query, x.key, x.value, feature_q, feature_k, grad)),
        {**shape, "BN": sizes.block, "BM": sizes.inner, "LAST": last, "INPUTS": inputs, "FEATURES": features},
        *sizes[2:],
    )  # fmt: skip
    turned: list[Any] = [None if g is None else g.transpose(1, 2) for g in (grad_key, grad_value, grad_feature)]
    for place, groups in enumerate((shape["G"], shape["G"], shape["E"])):
        if turned[place] is not None:
            turned[place] = _per_group(turned[place], groups)
    return turned


def _through_maps(call, x, found, grad_inputs, grad_features, inputs):
    """Gradients of features or of their maps; a map's gradient of query or key is added to the one at hand."""
    names = (("feature_q", "q"), ("feature_k", "k"))
    for side, (map_, span, (name, letter)) in enumerate(zip(maps_of(call, x), map_spans(call), names, strict=True)):
        if map_ is None or grad_features[side] is None:
            found[name] = grad_features[side]
            continue
        source = x.query if side == 0 else x.key
        target, heads = grad_inputs[side], grad_features[side].shape[1]
        add = None
        if inputs:
            add = (
                target
                if target.shape[1] == heads
                else _zeros(None, *source.shape[:1], heads, *source.shape[2:], like=source)
            )
        parts = map_backward(source, map_, grad_features[side], grad_x=add, span=span)
        if add is not None and add is not target:
            target += _per_group(add, target.shape[1])
        found |= {
            f"{letter}_{part}": value for part, value in zip(("weight", "bias", "magnitude"), parts, strict=True)
        }


def _add_sinks(call, plan, x, found, grad_key, grad_value):
    """Add up the blocks' parts of the sinks' gradients, and put them where the sinks came from."""
    if not call.sinks:
        return
    rows, sinks = call.rows, call.sinks
    for name, target in (("key", grad_key), ("value", grad_value)):
        part = found.pop(f"part_{name}")
        batch, groups = target.shape[:2]
        part = part.unflatten(0, (batch, groups, -1)).sum(2)
        if rows.past is not None:
            found[f"sink_{name}"] = part.sum(2)
        elif rows.kind == PLAIN:
            there = min(sinks, target.shape[2])
            target[:, :, :there] += part.sum(2)[:, :, :there].to(target.dtype)
        else:
            _scatter_sinks(rows, plan, part, target)


def _scatter_sinks(rows, plan, part, target):
    """Sinks of padded or packed rows: part `(B, G, programs, S, .)`, each added at its row's first tokens."""
    place = torch.arange(part.shape[3], device=part.device)
    if rows.kind == PACKED:
        repeat = plan.settings.tiles.chunk // plan.settings.tiles.query.block
        owner = plan.queries.row.repeat_interleave(repeat)
        chosen = (owner == torch.arange(rows.number, device=part.device)[:, None]).to(part.dtype)
        total = torch.einsum("np,bgpsd->nbgsd", chosen, part)[:, 0]
        start, size = rows.start[:-1], rows.start[1:] - rows.start[:-1]
    else:
        total, start, size = part.sum(2), rows.start, rows.size
    inside = (place < size[:, None])[:, None, :, None]
    index = (start[:, None] + place).clamp(max=target.shape[2] - 1).long()
    batch = (
        torch.zeros_like(index) if rows.kind == PACKED else torch.arange(index.shape[0], device=index.device)[:, None]
    )
    total = total.masked_fill(~inside, 0.0).movedim(1, 2).to(target.dtype)
    target.transpose(1, 2).index_put_((batch.expand_as(index), index), total, accumulate=True)
