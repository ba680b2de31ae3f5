"""Cosine attention on whole calls, forward and backward, from the three passes (README.md has the formulas)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launching import dense, dense_rows
from .launch import Pass, Sharing, Side, apply_sums, project_sums, sum_side


class Call(NamedTuple):
    """What does not depend on the tensors' values; ratio = H / G, key_side whether the power is on the keys."""

    this: Pass
    ratio: int
    key_side: bool
    return_sum: bool


class Operands(NamedTuple):
    """The differentiable arguments: query, key, value, exponent, gain or None, the state's sum or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    exponent: Tensor
    gain: Tensor | None
    initial: Tensor | None


class Needed(NamedTuple):
    """Which of the operands need a gradient."""

    query: bool
    key: bool
    value: bool
    exponent: bool
    gain: bool
    initial: bool


def run(call: Call, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Output `(B, H, T, Dv)`, and the sum after the call `(B, G|H, Dk, Dv)` where it is returned."""
    query, key, value, exponent, gain, initial = operands
    keys, queries = _sides(call, operands, value)
    sums, factor, total = sum_side(
        call.this, keys, _sum_heads(call, operands), _key_sums(call), False, initial, call.return_sum
    )
    output = apply_sums(call.this, queries, keys, sums, factor, query.shape[1], _local_keys(call), False, query)
    return output, total


def _sides(call: Call, operands: Operands, gradient: Tensor) -> tuple[Side, Side]:
    """Keys with their values, queries with the output's gradient (any tensor in the forward pass)."""
    query, key, value, exponent, gain, _ = operands
    return (
        Side(key, value, exponent if call.key_side else None, None),
        Side(query, gradient, None if call.key_side else exponent, gain),
    )


def _sum_heads(call: Call, operands: Operands) -> int:
    return operands.query.shape[1] if call.key_side else operands.key.shape[1]


def _key_sums(call: Call) -> Sharing:
    """A sum per key head, or per query head where the power is on the keys."""
    return Sharing(1, call.ratio if call.key_side else 1, 1, 1)


def _local_keys(call: Call) -> Sharing:
    """A program per query head reads its group's keys."""
    return Sharing(1, 1, call.ratio, 1 if call.key_side else call.ratio)


def _local_queries(call: Call) -> Sharing:
    """A program per head of the sums: a key head's programs read the queries of all its query heads."""
    return Sharing(1, call.ratio, 1, 1) if call.key_side else Sharing(call.ratio, 1, 1, 1)


class Cosine(torch.autograd.Function):
    """`run` with gradients of all its operands; the backward pass recomputes the sums rather than keep them."""

    @staticmethod
    def forward(ctx, call: Call, *tensors):
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return run(call, Operands(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, total_gradient):
        operands = Operands(*ctx.saved_tensors)
        gradients = backward(ctx.call, operands, gradient, total_gradient, Needed(*ctx.needs_input_grad[1:]))
        return None, *gradients


def backward(call: Call, operands: Operands, gradient, total_gradient, needed: Needed) -> list[Tensor | None]:
    """Gradients of the operands, None where not needed.

    Args:
        gradient: of the output, or None. total_gradient: of the returned sum, or None.
    """
    query, key, value, exponent, gain, initial = operands
    if gradient is None:
        gradient = query.new_zeros(*query.shape[:3], value.shape[3])
    gradient, total_gradient = dense_rows(gradient), dense(total_gradient)
    keys, queries = _sides(call, operands, gradient)
    heads, sum_heads = query.shape[1], _sum_heads(call, operands)
    grad_query = grad_key = grad_value = grad_exponent = grad_gain = query_sums = key_sums = None
    by_query = needed.gain or (needed.exponent and not call.key_side)
    if needed.query or by_query:
        sums, factor, _ = sum_side(call.this, keys, sum_heads, _key_sums(call), False, initial, False)
        grad_query, query_sums = project_sums(
            call.this, queries, keys, sums, factor, heads, _local_keys(call), False, query, by_query
        )
        del sums, factor
    by_key = needed.exponent and call.key_side
    if needed.key or needed.value or needed.initial or by_key:
        sharing = _local_queries(call)
        after, factor, grad_initial = sum_side(
            call.this, queries, sum_heads, sharing._replace(x=1), True, total_gradient, needed.initial
        )
        arguments = (after, factor, sum_heads, sharing, True)
        if needed.value:
            grad_value = _over_group(apply_sums(call.this, keys, queries, *arguments, value), value)
        if needed.key or by_key:
            grad_key, key_sums = project_sums(call.this, keys, queries, *arguments, key, by_key)
            grad_key = _over_group(grad_key, key)
    else:
        grad_initial = None
    exponent_sums = key_sums if call.key_side else query_sums
    if needed.exponent and exponent_sums is not None:
        grad_exponent = exponent_sums[0].to(exponent.dtype)
    if gain is not None and query_sums is not None:
        grad_gain = query_sums[1].to(gain.dtype)
    return [grad_query, grad_key, grad_value, grad_exponent, grad_gain, grad_initial]


def _over_group(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum what the query heads of a group gave, `(B, H, T, .)` -> `(B, G, T, .)`."""
    if gradient.shape[1] == like.shape[1]:
        return gradient
    return gradient.unflatten(1, (like.shape[1], -1)).sum(2)
