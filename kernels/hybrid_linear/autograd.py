"""The autograd function around the launches of forward and backward."""

import torch

from .function import Call, Operands, Saved, run
from .gradients import run_backward


class HybridLinear(torch.autograd.Function):
    """Fused hybrid linear attention: `(output (B, H, T, V), kv or None, normalizer or None)`.

    Features are recomputed from the maps in the backward pass; saved are the inputs, the output, the softmax branch's
    difference from it, three floats per row and head, and the sums before each chunk.
    """

    @staticmethod
    def forward(ctx, call: Call, *operands):
        x = Operands(*operands)
        output, last_kv, last_z, (plan, sums, sums_z, saved) = run(call, x, save=True)
        ctx.call, ctx.plan = call, plan
        ctx.save_for_backward(*x, sums, sums_z, *saved)
        return output, last_kv, last_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_kv, grad_z):
        tensors, count = ctx.saved_tensors, len(Operands._fields)  # checkpointing unpacks once
        x, (sums, sums_z, *saved) = Operands(*tensors[:count]), tensors[count:]
        needs = Operands(*ctx.needs_input_grad[1:])
        incoming = (grad_output, grad_kv, grad_z)
        return None, *run_backward(ctx.call, ctx.plan, x, needs, sums, sums_z, Saved(*saved), *incoming)
