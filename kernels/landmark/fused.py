"""The Triton backend of `landmark_attention`: what it can do, and the call around the kernels."""

import torch
from torch import Tensor

from ..hybrid_linear.rows import compacted, make_rows
from ..launching import ample_shared_memory, dense_rows
from ..triton_support import common_dtype, unavailable
from .function import Call, Landmark, run_forward

BLOCK_SIZES = (16, 32, 64, 128)
WIDEST = 128
MOST_ROWS = 65535  # programs along the second side of a CUDA grid


def unsupported(query, key, value, *, block_size, **options) -> str | None:
    """Say why `fused` cannot do this call (arguments of the public function), or None when it can."""
    reason = unavailable(query, key, value)
    if reason is not None:
        return reason
    if block_size not in BLOCK_SIZES:
        return f"its Triton kernels take blocks of 16, 32, 64 or 128 tokens, this call has blocks of {block_size}"
    if query.shape[-1] > WIDEST:
        return f"its Triton kernels hold a head dimension of at most {WIDEST}, this call has {query.shape[-1]}"
    if common_dtype(query, key, value) == torch.float32 and block_size == 128 and query.shape[-1] > 64:
        width = query.shape[-1]
        return f"in float32 its Triton kernels take blocks of 128 up to a head dimension of 64, this call has {width}"
    if not ample_shared_memory(query.device):
        return "its Triton kernels need a GPU with 160 KiB of shared memory for one program, such as an A100 or H100"
    rows = query.shape[0]  # one where packed
    if rows * query.shape[1] > MOST_ROWS:
        return f"the Triton kernels run {MOST_ROWS} rows times heads at most, this call has {rows} x {query.shape[1]}"
    return None


@torch.compiler.disable  # torch.compile would follow the launches down to the pointers
def fused(
    query,
    key,
    value,
    *,
    block_size,
    offset=0,
    scaling=None,
    attention_mask=None,
    cu_seqlens=None,
    open_blocks=None,
):
    """Landmark attention by Triton kernels; arguments and returns of `landmark_attention`."""
    if query.shape[0] == 0 or query.shape[2] == 0:
        return query, None
    if isinstance(offset, Tensor):
        offset = offset.to(device=query.device, dtype=torch.int32).contiguous()
    if open_blocks is not None:
        open_blocks = open_blocks.to(device=query.device, dtype=torch.uint8).contiguous()
    attention_mask, (query, key, value), restore = compacted(attention_mask, query, key, value)
    rows = make_rows(query, attention_mask, cu_seqlens, None)
    call = Call(rows, block_size, query.shape[-1] ** -0.5 if scaling is None else scaling, offset, open_blocks)
    given, dtype = query.dtype, common_dtype(query, key, value)
    query, key, value = (dense_rows(x.to(dtype)) for x in (query, key, value))
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return restore(Landmark.apply(call, query, key, value)).to(given), None
    return restore(run_forward(call, query, key, value, save=False)[0]).to(given), None
