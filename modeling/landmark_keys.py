"""Keys of landmarks made from the keys of their blocks.

A landmark's score stands for its whole block in the softmax over blocks: the grouped softmax is the ordinary one where
it equals the logsumexp of the block's scores, whose first-order form in the query is a weighted mean of the keys. The
published landmark learns its key from nothing, through all layers; here it starts from that mean, whose weights and
linear map are fitted to the model's own scores before any training.

Where a landmark only selects, a block can be ranked by a bound of its tokens' scores instead, which nothing fits.

Source: the grouped softmax is that of Mohtashami and Jaggi 2023 (arXiv 2305.16300); the pooled keys are this
project's. Mean keys of blocks select blocks in Lu et al. 2025 (MoBA, arXiv 2502.13189), without a gate.
Bounds of the keys rank blocks in Tang et al. 2024 (Quest, arXiv 2406.10774); a block's parts are this project's.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init


class LandmarkKeys(nn.Module):
    """`mix(sum_j softmax_j(w . k_j + u_j) k_j) + bias + c k_landmark`, for each key head; float32 parameters.

    Args:
        heads: G, of keys. head_dim: D. block_size: P, the landmark included.
    """

    def __init__(self, heads: int, head_dim: int, block_size: int):
        super().__init__()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(heads, *shape, dtype=torch.float32))

        self.content = parameter(head_dim)
        self.place = parameter(block_size - 1)
        self.mix = parameter(head_dim, head_dim)
        self.bias = parameter(head_dim)
        self.landmark = parameter()

    def reset_parameters(self) -> None:
        """The plain mean of the block's keys, and nothing of the landmark's own."""
        for zeros in (self.content, self.place, self.bias, self.landmark):
            init.constant_(zeros, 0.0)
        init.copy_(self.mix, torch.eye(self.mix.shape[-1], device=self.mix.device).expand_as(self.mix))

    def forward(self, blocks: Tensor) -> Tensor:
        """Landmarks' keys `(B, G, U, D)` of complete blocks `(B, G, U, P, D)`, rotated by their place in the block."""
        with torch.autocast(blocks.device.type, enabled=False):
            return self._pooled(blocks)

    def _pooled(self, blocks: Tensor) -> Tensor:
        keys, own = blocks[..., :-1, :], blocks[..., -1, :]
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        weights = (keys @ self.content.to(keys.dtype)[:, None, :, None])[..., 0] + self.place.to(keys.dtype)[:, None]
        pooled = (weights.softmax(-1)[..., None, :] @ keys)[..., 0, :] @ self.mix.to(keys.dtype)
        pooled = pooled + self.bias.to(keys.dtype)[:, None]
        return (pooled + self.landmark.to(keys.dtype)[:, None, None] * own).to(blocks.dtype)


def key_bounds(blocks: Tensor, parts: int) -> Tensor:
    """The greatest and the least key of each part of a block, elementwise.

    Args:
        blocks: `(B, G, U, P, D)`, keys rotated by their place in the block, the landmark last.
        parts: C, runs of the P - 1 tokens as equal in length as they can be.

    Returns:
        `(B, G, U, C, 2 D)`, greatest first.
    """
    tokens = blocks.shape[3] - 1
    bounds = torch.arange(parts + 1, device=blocks.device) * tokens // parts
    place = bounds[:-1, None] + torch.arange(-(-tokens // parts), device=blocks.device)
    keys = blocks[:, :, :, torch.minimum(place, bounds[1:, None] - 1)]  # a short part has its last token twice
    return torch.cat([keys.amax(-2), keys.amin(-2)], dim=-1)
