"""The Triton backend of `salient_attention`: what it can do, and the call around the kernels."""

import torch
from torch.nn import functional

from ..hybrid_linear.rows import compacted, make_rows
from ..launching import dense_rows
from ..triton_support import common_dtype
from .decode import decode_step, decode_unsupported
from .function import Call, Salient, run_choice, run_forward
from .states import next_state, with_state

MOST_ROWS = 65535  # programs along the second side of a CUDA grid


def unsupported(query, key, value, *, window, sinks, kept, **options) -> str | None:
    """Say why `fused` cannot do this call (arguments of the public function), or None when it can."""
    reason = decode_unsupported(query, key, value, sinks=sinks, kept=kept)
    if reason is not None:
        return reason
    if query.shape[0] * query.shape[1] > MOST_ROWS:
        rows = f"{query.shape[0]} x {query.shape[1]}"
        return f"the Triton kernels run {MOST_ROWS} rows times heads at most, this call has {rows}"
    return None


@torch.compiler.disable  # torch.compile would follow the launches down to the pointers
def fused(
    query,
    key,
    value,
    *,
    window,
    sinks,
    kept,
    age_penalty,
    scaling=None,
    attention_mask=None,
    cu_seqlens=None,
    initial_state=None,
    return_state=False,
):
    """Salient-token attention by Triton kernels; arguments and returns of `salient_attention`."""
    options = {"window": window, "sinks": sinks, "kept": kept, "age_penalty": age_penalty}
    options |= {"scaling": query.shape[-1] ** -0.5 if scaling is None else scaling}
    if query.shape[2] == 0:  # as one padded token
        padded = [functional.pad(x, (0, 0, 0, 1)) for x in (query, key, value)]
        mask = query.new_zeros(query.shape[0], 1, dtype=torch.bool)
        output, state = fused(
            *padded, **options, attention_mask=mask, initial_state=initial_state, return_state=return_state
        )
        return output[:, :, :0], state
    train = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *(initial_state or ())))
    if query.shape[2] == 1 and initial_state is not None and return_state and not train:
        return decode_step(query, key, value, **options, attention_mask=attention_mask, state=initial_state)
    attention_mask, (query, key, value), restore = compacted(attention_mask, query, key, value)
    rows = make_rows(query, attention_mask, cu_seqlens, None if initial_state is None else initial_state.count)
    call = Call(rows, **options)
    held, old_mass, old_rank = (key, value), None, None
    if initial_state is not None:
        held, old_mass, old_rank = with_state(call, initial_state, key, value)
    dtype = common_dtype(query, key, value)
    q, k, v = (dense_rows(x.to(dtype)) for x in (query, *held))
    choice = run_choice(call, q, k, old_mass, old_rank) if kept else None
    lists, until = (None, None) if choice is None else choice[:2]
    if train:
        output = Salient.apply(call, lists, until, q, k, v)
    else:
        output, _ = run_forward(call, q, k, v, lists, until, save=False)
    output = restore(output).to(query.dtype)
    return output, next_state(call, initial_state, key, value, held, choice) if return_state else None
