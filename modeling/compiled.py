"""Functions that are compiled while a model trains, when asked for.

Only then: shapes are fixed in training, and in generation every new one would be compiled.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_active = False


@contextmanager
def compiled_training() -> Iterator[None]:
    """Within the block, the inner functions of gain-cell and landmark attention run compiled where gradients are
    taken, for fixed shapes."""
    global _active
    with torch._dynamo.config.patch(recompile_limit=256):  # one for each tile of a sequence
        _active = True
        try:
            yield
        finally:
            _active = False
            _compile.cache_clear()


def for_training(function: Callable) -> Callable:
    """The compiled function within `compiled_training` where gradients are taken, else the function."""
    return _compile(function) if _active and torch.is_grad_enabled() else function


@functools.cache
def _compile(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)
