"""Kernels of `cosine_attention`: what this op offers, and the contract that it keeps."""

import functools
import importlib

from .reference import reference

CONTRACT = 2


def unsupported(*args, **kwargs) -> str | None:
    """Say why `fused` cannot do this call (arguments of the public function), or None when it can."""
    from ..triton_support import unavailable

    return unavailable(*args[:3]) or _load().unsupported(*args, **kwargs)


def fused(*args, **kwargs):
    """Run the Triton kernels; they are loaded on first use."""
    return _load().fused(*args, **kwargs)


@functools.cache
def _load():
    module = importlib.import_module(".fused", __name__)
    globals()["fused"] = module.fused  # importing a submodule binds its name here
    return module


__all__ = ["CONTRACT", "fused", "reference", "unsupported"]
