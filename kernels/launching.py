"""Launching Triton kernels with little work on the host.

Triton looks at every argument of every launch anew; with 80 arguments that takes longer than the kernels do on short
sequences. Here a launch that was compiled once is found again by what its compilation depended on: the types of the
arguments, the alignment of pointers, the values of the numbers, and the constants. Such a launch goes to the compiled
kernel directly, past Triton's hooks for profilers (those of CUDA see it all the same).
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .triton_support import interpreting


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes microseconds."""
    return -(-a // b)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size` >= 1."""
    return 1 << (size - 1).bit_length()


def tile_side(size: int) -> int:
    """The side of a tile that holds `size` and can be multiplied: a power of two, at least 16."""
    return max(16, next_power_of_2(max(size, 1)))


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype, as a compile-time argument."""
    return getattr(tl, str(dtype).removeprefix("torch."))


LIMIT = 10000  # launches remembered
_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    registers: int | None = None,
) -> None:
    """Run a kernel.

    Args:
        kernel: the function that `triton.jit` returned; its compile-time arguments are its last ones.
        grid: one to three numbers of programs.
        arguments: tensors (the first one is not None), None and numbers, in the kernel's order.
        constants: the compile-time arguments by name, always in the same order; those of other names are ignored.
        warps, stages: warps of a program, stages of its pipelined loops. registers: the most of a thread, or None.
    """
    if interpreting():
        kernel[grid](*arguments, **{name: constants[name] for name in _constant_names(kernel)})
        return
    device = arguments[0].device.index
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, arguments, constants, warps, stages, registers)
        return
    kinds: list[Any] = []
    values: list[Any] = []  # pointers as numbers, which the compiled launch takes without asking for them again
    for x in arguments:
        if isinstance(x, Tensor):
            pointer = x.data_ptr()
            kinds.append((x.dtype, pointer & 15))
            values.append(pointer)
        else:
            kinds.append(x)
            values.append(x)
    key = (id(kernel), warps, stages, registers, device, tuple(kinds), tuple(constants.values()))
    known = _compiled.get(key)
    if known is None:
        chosen = {name: constants[name] for name in _constant_names(kernel)}
        options = {"num_warps": warps, "num_stages": stages}
        if registers is not None:
            options["maxnreg"] = registers
        if len(_compiled) >= LIMIT:
            _compiled.clear()
        _compiled[key] = kernel[grid](*arguments, **chosen, **options), tuple(chosen.values())
        return
    compiled, tail = known
    compiled.run(
        *(*grid, 1, 1)[:3], torch._C._cuda_getCurrentRawStream(device), compiled.function, compiled.packed_metadata,
        None, None, None, *values, *tail,
    )  # fmt: skip


@functools.cache
def _constant_names(kernel: Any) -> list[str]:
    parameters = inspect.signature(kernel.fn).parameters.values()
    return [parameter.name for parameter in parameters if parameter.annotation is tl.constexpr]
