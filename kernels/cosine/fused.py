"""The Triton backend of `cosine_attention`: what it can do, and the call around the kernels."""

import torch
from torch import Tensor

from ..hybrid_linear.rows import compacted, make_rows
from ..launching import dense, dense_rows
from ..triton_support import common_dtype, unavailable
from .decode import decode_step
from .function import Call, Cosine, Operands, run
from .launch import make_pass
from .reference import State

WIDEST = 256


def unsupported(query, key, value, *, window=0, sinks=0, **options) -> str | None:
    """Say why `fused` cannot do this call (arguments of the public function), or None when it can."""
    reason = unavailable(query, key, value)
    if reason is not None:
        return reason
    if options.get("log_decay") is not None:
        return "its Triton kernels do not forget yet: log_decay runs on the PyTorch path"
    if window or sinks:
        return "its Triton kernels sum over all visible keys, without window and sinks"
    for name, width in (("query and key width", query.shape[-1]), ("value width", value.shape[-1])):
        if width > WIDEST:
            return f"the Triton kernels hold a {name} of at most {WIDEST}, this call has {width}"
    return None


@torch.compiler.disable  # torch.compile would follow the launches down to the pointers
def fused(
    query,
    key,
    value,
    *,
    exponent,
    gain=None,
    causal=True,
    scale_side="query",
    window=0,
    sinks=0,
    attention_mask=None,
    cu_seqlens=None,
    initial_state=None,
    return_state=False,
    log_decay=None,
):
    """Cosine attention by Triton kernels; arguments and returns of `cosine_attention`."""
    key_side = causal and scale_side == "key"
    if query.shape[2] == 0 or query.shape[0] == 0:
        output = query.new_zeros(*query.shape[:3], value.shape[3])
        heads = query.shape[1] if key_side else key.shape[1]
        empty = key.new_zeros(key.shape[0], heads, key.shape[3], value.shape[3], dtype=torch.float32)
        kv = empty if initial_state is None else initial_state.kv
        return output, _state(query, key, value, initial_state, kv, 0) if return_state else None
    initial = None if initial_state is None else initial_state.kv
    tensors = (query, key, value, exponent, gain, initial)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    exponent, gain = dense(exponent), dense(gain)
    if query.shape[2] == 1 and initial_state is not None and return_state and not train:
        return decode_step(
            *map(dense_rows, (query, key, value)), exponent=exponent, gain=gain, key_side=key_side,
            attention_mask=attention_mask, state=initial_state,
        )  # fmt: skip
    attention_mask, (query, key, value), restore = compacted(attention_mask, query, key, value)
    past = None if initial_state is None else initial_state.count
    rows = make_rows(query, attention_mask, cu_seqlens, past)
    dtype = common_dtype(query, key, value)
    q, k, v = (dense_rows(x.to(dtype)) for x in (query, key, value))
    this = make_pass(rows, q, v, causal)
    call = Call(this, query.shape[1] // key.shape[1], key_side, return_state)
    operands = Operands(q, k, v, exponent, gain, None if initial is None else dense(initial.float()))
    output, total = Cosine.apply(call, *operands) if train else run(call, operands)
    output = restore(output).to(query.dtype)
    if not return_state:
        return output, None
    assert total is not None
    return output, _state(query, key, value, initial_state, total, rows.length if rows.size is None else rows.size)


def _state(query, key, value, before, kv: Tensor, tokens: Tensor | int) -> State:
    """The state after a call of `tokens` real tokens per row; window and sinks hold none."""
    if before is not None:
        rings = (before.window_key, before.window_value, before.sink_key, before.sink_value)
        return State(kv, *rings, before.count + tokens)
    empty_key, empty_value = (x.new_zeros(x.shape[0], x.shape[1], 0, x.shape[3]) for x in (key, value))
    count = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device) + tokens
    return State(kv, empty_key, empty_value, empty_key, empty_value, count)
