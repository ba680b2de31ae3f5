"""The second op of `kernels/landmark`, `landmark_retrieval_attention`: the dispatch finds one op per folder."""

from ..landmark.reference import retrieval_reference as reference

CONTRACT = 2


def unsupported(*args, **kwargs) -> str | None:
    """Say why `fused` cannot do this call: there is no fused kernel of this op."""
    return "landmark retrieval has no Triton kernel"


__all__ = ["CONTRACT", "reference", "unsupported"]
