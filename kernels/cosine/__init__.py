"""Kernels of `cosine_attention`: what this op offers, and the contract that it keeps."""

from ..loading import on_first_use
from .reference import reference

CONTRACT = 2
unsupported, fused = on_first_use(__name__)

__all__ = ["CONTRACT", "fused", "reference", "unsupported"]
