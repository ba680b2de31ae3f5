"""Kernels of `salient_attention`: what this op offers, and the contract that it keeps."""

from ..loading import on_first_use
from .reference import reference

CONTRACT = 1
unsupported, fused = on_first_use(__name__)

__all__ = ["CONTRACT", "fused", "reference", "unsupported"]
