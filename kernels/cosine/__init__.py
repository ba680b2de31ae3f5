"""Kernels of `cosine_attention`: what this op offers, and the contract that it keeps."""

from .reference import reference

CONTRACT = 1


def unsupported(*args, **kwargs) -> str | None:
    """Say why `fused` cannot do this call (arguments of the public function), or None when it can."""
    return "this version has no fused Triton kernel for cosine_attention"


__all__ = ["CONTRACT", "reference", "unsupported"]
