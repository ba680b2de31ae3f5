"""What `salient_attention` offers beside its chunked path: the definition, and the contract that it keeps."""

from .reference import reference

CONTRACT = 1


def unsupported(*args, **kwargs) -> str | None:
    """Say why `fused` cannot do this call: there is no fused kernel of this op."""
    return "salient-token attention has no Triton kernel"


__all__ = ["CONTRACT", "reference", "unsupported"]
