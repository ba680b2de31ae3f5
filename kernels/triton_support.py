"""What every Triton kernel of this project asks first: can it run here, and how are its products rounded."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton, too, reads it once, when kernels are defined


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1`): any device, float32, for tests."""
    return INTERPRETING


def unavailable(tensor: Tensor, *others: Tensor) -> str | None:
    """Say why no Triton kernel can run on these tensors, or None when one can."""
    if not _installed():
        return "triton is not installed"
    dtype = common_dtype(tensor, *others)
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 and this call is in float64"
    if interpreting():
        return None if dtype == torch.float32 else f"Triton's interpreter is wrong in {dtype}"
    if not tensor.is_cuda:
        return f"Triton needs a GPU and the tensors are on {tensor.device.type}"
    if torch.version.hip is None and _capability(tensor.device.index) < (8, 0):
        return "the Triton kernels need a GPU of compute capability 8.0 or newer"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The one dtype that a call's queries, keys and values enter the kernels in.

    They differ under autocast: values come out of a projection in its dtype, queries and keys out of the rotation of
    such projections by float32 tables. Then it is autocast's dtype, in which it would run softmax attention itself:
    float32 keeps nothing there but the rounding of a rotation, and multiplies in three products for one. Outside
    autocast, and in the interpreter, nothing that was given is rounded.
    """
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) == 1:
        return dtypes.pop()
    device = tensors[0].device.type
    if not interpreting() and torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        if dtypes == {torch.float32, narrow}:
            return narrow
    return functools.reduce(torch.promote_types, dtypes)


def product_precision(dtype: torch.dtype) -> tuple[torch.dtype, str]:
    """The dtype that tiles are multiplied in, and Triton's `input_precision`, for inputs of `dtype`.

    bfloat16 is multiplied as it is. float16 is widened to float32 and multiplied in TF32, which keeps all of its
    mantissa and has the range that weights of e^30 need. float32 takes three TF32 products (about float32 accuracy).
    """
    if dtype == torch.bfloat16:
        return torch.bfloat16, "tf32"
    if dtype == torch.float16:
        return torch.float32, "tf32"
    return torch.float32, "ieee" if interpreting() else "tf32x3"
