"""Launching Triton kernels with little work on the host.

Triton looks at every argument of every launch anew; with 80 arguments that takes longer than the kernels do on short
sequences. Here a launch that was compiled once is found again by what its compilation depended on: the types of the
arguments, the alignment of pointers, the values of the numbers, and the constants. Such a launch goes to the compiled
kernel directly, past Triton's hooks for profilers (those of CUDA see it all the same).
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import triton
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


Operand = TypeVar("Operand", Tensor, Tensor | None)


def dense(x: Operand) -> Operand:
    """An operand that kernels read as dense memory: what is small (weights of heads, states and their gradients, maps,
    counts), and comes expanded, sliced or transposed as callers please."""
    return None if x is None else x.contiguous()


def dense_rows(x: Operand) -> Operand:
    """An operand of which kernels know the strides, but for the last dimension's, which is 1."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


AMPLE_SHARED_MEMORY = 160 * 1024  # bytes; what the tiles of cosine and landmark attention need at most (A100, H100)


@functools.cache
def ample_shared_memory(device: torch.device) -> bool:
    """Whether one program may hold 160 KiB in shared memory."""
    if device.type != "cuda":
        return True
    utilities = triton.runtime.driver.active.utils
    return utilities.get_device_properties(device.index)["max_shared_mem"] >= AMPLE_SHARED_MEMORY


LIMIT = 10000  # launches remembered
NO_CONSTANTS: dict[str, Any] = {}
_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    numbers: tuple[int | float, ...],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    registers: int | None = None,
    shared: dict[str, Any] = NO_CONSTANTS,
) -> None:
    """Run a kernel.

    Args:
        kernel: the function that `triton.jit` returned: tensors, then numbers, then compile-time arguments.
        grid: one to three numbers of programs.
        tensors: the kernel's tensors in its order, the first one not None.
        numbers: its numbers in its order.
        constants: the compile-time arguments by name, always in the same order; those of other names are ignored.
        warps, stages: warps of a program, stages of its pipelined loops. registers: the most of a thread, or None.
        shared: more constants, which those above override, in a dictionary that never changes, known by identity.
    """
    if interpreting():
        kernel[grid](*tensors, *numbers, **_chosen(kernel, shared, constants))
        return
    device: Any = tensors[0].device.index  # type: ignore[union-attr]
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, warps, stages, registers, shared)
        return
    # Pointers as numbers, which the compiled launch takes without asking for them again.
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    together = 0
    for pointer in pointers:
        if pointer is not None:
            together |= pointer
    places = tuple([None if p is None else p & 15 for p in pointers]) if together & 15 else None
    kinds = tuple([None if x is None else x.dtype for x in tensors])
    own = tuple(constants.values())
    key = (id(kernel), id(shared), warps, stages, registers, device, kinds, places, numbers, own)
    known = _compiled.get(key)
    if known is None:
        chosen = _chosen(kernel, shared, constants)
        options = {"num_warps": warps, "num_stages": stages}
        if registers is not None:
            options["maxnreg"] = registers
        if len(_compiled) >= LIMIT:
            _compiled.clear()
        compiled = kernel[grid](*tensors, *numbers, **chosen, **options)
        _compiled[key] = compiled, (*numbers, *chosen.values()), shared  # kept, so that its identity stays its own
        return
    compiled, tail, _ = known
    compiled.run(
        *(*grid, 1, 1)[:3], torch._C._cuda_getCurrentRawStream(device), compiled.function, compiled.packed_metadata,
        None, None, None, *pointers, *tail,
    )  # fmt: skip


def _chosen(kernel: Any, shared: dict[str, Any], constants: dict[str, Any]) -> dict[str, Any]:
    """A kernel's compile-time arguments, in its order."""
    return {name: constants[name] if name in constants else shared[name] for name in _constant_names(kernel)}


@functools.cache
def _constant_names(kernel: Any) -> list[str]:
    parameters = inspect.signature(kernel.fn).parameters.values()
    return [parameter.name for parameter in parameters if parameter.annotation is tl.constexpr]
