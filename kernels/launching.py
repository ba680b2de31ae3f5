"""Launching Triton kernels with little work on the host.

Triton looks at every argument of every launch anew; with 80 arguments that takes longer than the kernels do on short
sequences. Here a launch that was compiled once is found again by what its compilation depended on: the types of the
arguments, the alignment of pointers, the values of the numbers, and the constants. Such a launch goes to the compiled
kernel directly, past Triton's hooks for profilers (those of CUDA see it all the same).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .triton_support import interpreting

LIMIT = 10000  # launches remembered
_compiled: dict[tuple, Any] = {}


class Constants:
    """Compile-time arguments of one kernel, compared by identity: make them once and keep them.

    Args:
        kernel: the function that `triton.jit` returned; its compile-time arguments are its last ones.
        values: at least one value for each of them, by name; others are ignored.
        warps, stages: warps of a program, stages of its pipelined loops. registers: most of a thread, or None.
    """

    def __init__(self, kernel: Any, values: dict[str, Any], warps: int, stages: int, registers=None):
        parameters = inspect.signature(kernel.fn).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.annotation is tl.constexpr]
        self.kernel = kernel
        self.values = {name: values[name] for name in names}
        self.tail = tuple(self.values.values())
        self.options = {"num_warps": warps, "num_stages": stages}
        if registers is not None:
            self.options["maxnreg"] = registers


def launch(constants: Constants, grid: tuple[int, ...], tensors: Sequence[Tensor | None], numbers: Sequence) -> None:
    """Run a kernel whose arguments are tensors (or None), then numbers, then constants, in its order."""
    kernel = constants.kernel
    if interpreting():
        kernel[grid](*tensors, *numbers, **constants.values)
        return
    device = tensors[0].device.index  # type: ignore[union-attr]
    places = tuple([None if x is None else (x.dtype, x.data_ptr() & 15) for x in tensors])
    key = (constants, device, places, tuple(numbers))
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= LIMIT:
            _compiled.clear()
        _compiled[key] = kernel[grid](*tensors, *numbers, **constants.values, **constants.options)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(
        *(*grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, None, None, None,
        *tensors, *numbers, *constants.tail,
    )  # fmt: skip
