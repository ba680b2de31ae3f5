"""The way out of accelerate's mixed precision, which replaces a model's `forward` by one under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

FORWARD, ORIGINAL = "forward", "_original_forward"
"""What accelerate puts on a model that it prepares: the new method, and the one before it."""


@contextmanager
def outside_mixed_precision(model: nn.Module) -> Iterator[None]:
    """Within the block the model and what is in it run in the type of their weights, in the middle of training too."""
    wrapped = [(module, module.__dict__[FORWARD]) for module in model.modules() if ORIGINAL in module.__dict__]
    for module, _ in wrapped:
        _unwrap(module)
    try:
        yield
    finally:
        for module, forward in wrapped:
            module.__dict__[FORWARD] = forward


def leave_mixed_precision(model: nn.Module) -> None:
    """Take what mixed precision put on a model, and on what is in it, off for good."""
    for module in model.modules():
        if ORIGINAL in module.__dict__:
            _unwrap(module)
            del module.__dict__[ORIGINAL]


def _unwrap(module: Any) -> None:
    original = module.__dict__[ORIGINAL]
    if getattr(original, "__func__", None) is type(module).forward:
        module.__dict__.pop(FORWARD, None)
    else:  # it had a `forward` of its own before, such as the hooks of a device map
        module.__dict__[FORWARD] = original
