"""LandmarkAttention: softmax attention in groups, with the best blocks of a long text read and the others left.

Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300). The landmark tokens themselves are the model's business:
`landmark_tokens.py` puts them between a call's tokens, this mechanism finds them by their positions.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional

from .counter_draws import draw_words, uniform
from .landmark_keys import LandmarkKeys, key_bounds
from .op_dispatch import check_contract
from .op_landmark import (
    CONTRACT,
    LandmarkBlocks,
    check_block_size,
    check_block_weight,
    check_retrieval,
    landmark_attention,
    landmark_retrieval_attention,
)
from .op_landmark_chunked import Grid, TextGrid

LAYERS = 2  # counters of a row's draws before those of its layers
LANDMARK_KEYS = ("pooled", "token", "bounds")


@strict
@dataclass
class LandmarkAttentionConfig:
    """Settings of `LandmarkAttention`; every one is written into config.json."""

    type: str = "landmark"
    block_size: int = 64
    """Tokens of a block, its landmark included; the same in every layer."""
    top_k: int = 14
    """Blocks that a query reads beside its own; no query and key are further apart than (top_k + 2) x block_size."""
    selection: str = "token_and_head"
    """Which blocks a query reads: the best for each token and head (`token_and_head`); for each head, shared by the
    call's tokens of a block (`head`), the later ones of the call among them, so that what a token reads depends on how
    the text is cut into calls; for each token, shared by the heads (`token`)."""
    landmark_key: str = "pooled"
    """Where a landmark's key comes from: from the keys of its block, by learned weights and a linear map, and in part
    from the landmark token (`pooled`), which can be fitted to the model before it trains; from the token alone, as
    published (`token`); or there is none, and the least and greatest of the block's keys bound its tokens' scores
    (`bounds`, with block_weight `tokens`), which nothing is fitted for."""
    key_parts: int = 1
    """Parts of a block with bounds of their own, of which the best counts; as many as the block has tokens: blocks are
    ranked by their tokens' own scores. Each part takes as much room as one token's key and value."""
    block_weight: str = "landmark"
    """What a block that is read weighs by: its landmark's score, as published (`landmark`); or its tokens' own scores,
    so that landmarks only select and what is read is read by ordinary softmax attention (`tokens`)."""
    max_blocks: int | None = None
    """Blocks that a query may read from, the last ones; the cache holds up to twice as many. None: all."""
    offload: bool = False
    """Keep blocks in CPU memory and their landmarks on the GPU; a step moves only the blocks that are read."""
    block_dropout: float = 0.0
    """In training, the largest share of a row's blocks that the blocks after them do not read (each row draws its own
    share, from 0 on, and each layer other blocks), so that retrieval is trained too."""
    block_dropout_rows: float = 1.0
    """Share of the training rows, drawn at random, that block_dropout leaves blocks out of; the others read all."""
    include_landmark_in_loss: bool = False
    """The published labels: a block's last token predicts the landmark, and the landmark the next token."""
    contract: int = CONTRACT
    """Contract of the op that the checkpoint was saved with."""

    def __post_init__(self) -> None:
        if self.type != "landmark":
            raise ValueError(f"type is {self.type!r}: choose one of landmark")
        check_block_size(self.block_size)
        check_retrieval(self.top_k, self.max_blocks, self.selection)
        if self.landmark_key not in LANDMARK_KEYS:
            raise ValueError(f"landmark_key is {self.landmark_key!r}: choose one of {', '.join(LANDMARK_KEYS)}")
        check_block_weight(self.block_weight)
        self._check_bounds()
        if self.block_weight == "tokens" and self.landmark_key == "token":
            raise ValueError(
                "with block_weight tokens nothing trains a landmark's own key: set landmark_key to pooled, which is "
                "fitted"
            )
        if not 0 <= self.block_dropout < 1:
            raise ValueError(f"block_dropout is {self.block_dropout}: it must be at least 0 and below 1")
        if not 0 <= self.block_dropout_rows <= 1:
            raise ValueError(f"block_dropout_rows is {self.block_dropout_rows}: it must be between 0 and 1")
        self._check_contract()

    def _check_bounds(self) -> None:
        if self.landmark_key != "bounds":
            if self.key_parts != 1:
                raise ValueError(f"key_parts is {self.key_parts}: only landmark_key bounds has parts, leave it out")
            return
        if self.block_weight != "tokens":
            raise ValueError("landmark_key bounds only selects blocks: set block_weight to tokens")
        if not 1 <= self.key_parts < self.block_size:
            raise ValueError(
                f"key_parts is {self.key_parts}: a block of {self.block_size - 1} tokens has 1 to as many parts"
            )

    def _check_contract(self) -> None:
        """Contract 2 changed what a block weighs by its landmark, and nothing of a block that weighs by its tokens."""
        if self.contract == 1 and self.block_weight == "tokens":
            return
        if self.contract == 1:
            raise ValueError(
                "this checkpoint was saved with contract 1 of landmark attention, which weighed a block by the score "
                f"that selected it, and this version of linearize supports {CONTRACT}, which weighs it where it is "
                "read, as published: set contract to 2 in its config.json to read the same weights so, or load it "
                "with trust_remote_code=True where linearize is not installed"
            )
        check_contract("landmark attention", self.contract, CONTRACT)

    def resolve(self, head_dim: int) -> None:
        """Nothing depends on the model."""

    @property
    def reach(self) -> int:
        """Positions that retrieval counts with."""
        return (self.top_k + 2) * self.block_size


class LandmarkAttention(nn.Module):
    """Mixes tokens in place of softmax attention; the backbone projects before and after, and rotates nothing.

    The landmark's embedding belongs to the model; what is learned here is how landmarks' keys are pooled.

    Args:
        config: settings, resolved.
        num_heads: H. num_key_value_heads: G. head_dim: D. scaling: of the softmax scores.

    Attributes:
        keys: what pools landmarks' keys, or None.
        observer: called in a whole text's pass with `(mixer, query, blocks, landmarks)`: unrotated queries, and keys
            `(B, G, U, P, D)` rotated by their place in the block, before they are pooled; what it changes in `keys`
            counts in the same pass.
    """

    arms = ("mixed",)
    layer_idx = 0

    def __init__(self, config, num_heads: int, num_key_value_heads: int, head_dim: int, scaling: float):
        super().__init__()
        self.config, self.scaling, self.op_backend = config, scaling, "auto"
        self.keys = (
            LandmarkKeys(num_key_value_heads, head_dim, config.block_size) if config.landmark_key == "pooled" else None
        )
        self.observer: Callable[..., None] | None = None

    @staticmethod
    def parameter_group(name: str) -> str:
        """Which learning rate a parameter takes."""
        return "landmark"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding_mask: Tensor | None = None,
        cache_layer=None,
        arm: str = "mixed",
        causal: bool = True,
        landmarks=None,
    ) -> Tensor:
        """Attend.

        Args:
            query: `(B, H, T, D)`; key, value: `(B, G, T, D)`; not rotated, landmarks among the tokens.
            padding_mask: in `landmarks` already.
            cache_layer: holder of the blocks, or None.
            arm: `mixed`, the only one.
            causal: True.
            landmarks: the call's `Landmarks`: positions, and the tables that rotate.

        Returns:
            `(B, H, T, D)` in the query's dtype.
        """
        if arm not in self.arms:
            raise ValueError(f"unknown arm {arm!r} of landmark attention: it has no branches, use mixed")
        if not causal:
            raise ValueError("landmark attention is causal: a block's landmark comes after its tokens")
        if landmarks is None:
            raise ValueError("landmark attention needs the model's landmarks: call it through the model")
        if landmarks.packing is not None and not self.training:  # each by the path of its own length
            return self._attend_texts(query, key, value, landmarks)
        whole = self.training or query.shape[2] <= (self.config.top_k + 1) * self.config.block_size
        if cache_layer is None and whole:
            return self._attend_all(query, key, value, landmarks)
        size, rotary = self.config.block_size, landmarks.rotary
        placed = rotated(key, rotary, landmarks.position.clamp(min=0) % size)
        if cache_layer is None:
            grid = self._grid(key, landmarks)
            local = self._key_blocks(grid, query, placed, landmarks), grid.spread(value).unflatten(2, (-1, size))
            number = torch.arange(local[0].shape[2], device=key.device)
            first = torch.zeros(key.shape[0], dtype=torch.long, device=key.device)
            blocks = LandmarkBlocks(*local, self._summary(local[0]), torch.where(grid.real[..., -1], number, -1))
        else:
            finish = self._finished if landmarks.position.shape[1] > landmarks.tokens else None
            local, first, blocks = cache_layer.append(
                placed, value, landmarks, size, self.config.max_blocks, self.config.offload, finish, self._summary
            )
        return landmark_retrieval_attention(
            query, local[0], local[1], blocks,
            position=landmarks.position, first=first, top_k=self.config.top_k,
            selection=self.config.selection, max_blocks=self.config.max_blocks, rotary=rotary,
            scaling=self.scaling, block_weight=self.config.block_weight, backend=self.op_backend,
        )  # fmt: skip

    def _attend_texts(self, query: Tensor, key: Tensor, value: Tensor, landmarks) -> Tensor:
        """Packed texts, each as if it were alone."""
        packing = landmarks.packing
        bounds = packing.cu_seqlens.tolist()
        joined = [packing.join(x) for x in (query, key, value)]
        outputs = [
            self(*(x[:, :, start:stop] for x in joined), landmarks=landmarks.of_text(number, stop - start))
            for number, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]
        return packing.split(torch.cat(outputs, dim=2))

    def _attend_all(self, query: Tensor, key: Tensor, value: Tensor, landmarks) -> Tensor:
        """A whole text, or packed ones, every block open but those that training leaves out."""
        size, rotary, at = self.config.block_size, landmarks.rotary, landmarks.position.clamp(min=0)
        by_tokens, packing = self.config.block_weight == "tokens", landmarks.packing
        joined = packing is not None and not by_tokens
        if joined:
            query, key, value = (packing.join(x) for x in (query, key, value))
            at = packing.join(at[:, None, :, None])[:, 0, :, 0]
        if self.keys is None or (by_tokens and self.observer is None):  # no landmark's key is read
            key = rotated(key, rotary, at)
        else:
            grid = TextGrid(at[0], size) if joined else self._grid(key, landmarks)
            blocks = self._key_blocks(grid, query, rotated(key, rotary, at % size), landmarks)
            key = grid.collect(block_rotated(blocks, rotary, size, grid.number).flatten(2, 3))
        if by_tokens:
            return self._attend_tokens(rotated(query, rotary, at), key, value, landmarks)
        mask = None if landmarks.position_is_simple or joined else landmarks.position >= 0
        output, _ = landmark_attention(
            rotated(query, rotary, at), key, value,
            block_size=size, scaling=self.scaling, attention_mask=mask, open_blocks=self._open_blocks(landmarks),
            cu_seqlens=packing.cu_seqlens if joined else None, backend=self.op_backend,
        )  # fmt: skip
        return packing.split(output) if joined else output

    def _attend_tokens(self, query: Tensor, key: Tensor, value: Tensor, landmarks) -> Tensor:
        """A whole text by ordinary softmax attention over the tokens of open blocks."""
        visible = landmarks.visible(self.config.block_size)
        if (open_blocks := self._open_blocks(landmarks)) is not None:
            block = landmarks.position.clamp(min=0) // self.config.block_size
            packing = landmarks.packing
            is_open = open_blocks.gather(1, block) if packing is None else open_blocks[packing.text, block]
            visible = visible & (is_open[:, None] | (block[:, None] == block[..., None]))
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible[:, None], scale=self.scaling, enable_gqa=True
        )
        return output if landmarks.position_is_simple else output.masked_fill(landmarks.padding(), 0.0)

    def _open_blocks(self, landmarks) -> Tensor | None:
        """`(texts, blocks)`, those that training does not leave out; None outside training, for all."""
        if landmarks.drawn is None or not self.training or not self.config.block_dropout:
            return None
        length, device = landmarks.position.shape[1], landmarks.position.device
        share, chance = landmarks.drawn.split(1, dim=1)
        share = self.config.block_dropout * share * (chance < self.config.block_dropout_rows)
        block = torch.arange(-(-length // self.config.block_size), device=device)
        return uniform(draw_words(landmarks.seeds[:, None], LAYERS + self.layer_idx, block)) >= share

    def _grid(self, key: Tensor, landmarks) -> Grid:
        mask = None if landmarks.position_is_simple else landmarks.position >= 0
        return Grid(key, self.config.block_size, 0, mask)

    def _key_blocks(self, grid: Grid, query: Tensor, placed: Tensor, landmarks) -> Tensor:
        """The keys of a whole text `(B, G, U, P, D)`, those of landmarks pooled."""
        blocks = grid.spread(placed).unflatten(2, (-1, self.config.block_size))
        if self.observer is not None:
            self.observer(self, query, blocks, landmarks)
        return self._finished(blocks, grid.real[..., -1])

    def _finished(self, blocks: Tensor, complete: Tensor) -> Tensor:
        """Keys `(B, G, U, P, D)`, those of landmarks pooled in the blocks that are `complete`, `(B, U)`."""
        if self.keys is None:
            return blocks
        own = torch.where(complete[:, None, :, None], self.keys(blocks), blocks[..., -1, :])
        return torch.cat([blocks[..., :-1, :], own[..., None, :]], dim=-2)

    def _summary(self, blocks: Tensor) -> Tensor:
        """What ranks blocks of the keys `(B, G, U, P, D)`: their landmarks' keys, or bounds of their tokens'."""
        bounds = self.config.landmark_key == "bounds"
        return key_bounds(blocks, self.config.key_parts) if bounds else blocks[..., -1, :]


def block_rotated(
    blocks: Tensor, rotary: tuple[Tensor, Tensor] | None, block_size: int, number: Tensor | None = None
) -> Tensor:
    """`(B, heads, U, any, D)`, rotated by the place in the block: rotated on to that in the text, in its dtype.

    The rotation by the place has put the tables' common factor in (YaRN and longrope have one), so this leaves it out.

    number: `(U,)`, of each block in its text; None, 0 to U - 1.
    """
    if rotary is None:
        return blocks
    start = (torch.arange(blocks.shape[2], device=blocks.device) if number is None else number) * block_size
    factor = rotary[0][:1]  # cosines of 0
    cos, sin = ((table[start] / factor)[:, None] for table in rotary)
    front, back = blocks.chunk(2, dim=-1)
    return (blocks * cos + torch.cat([-back, front], dim=-1) * sin).to(blocks.dtype)


def rotated(x: Tensor, rotary: tuple[Tensor, Tensor] | None, position: Tensor) -> Tensor:
    """`(B, heads, T, D)` rotated to the positions `(B, T)`, in its dtype."""
    if rotary is None:
        return x
    cos, sin = (table[position][:, None] for table in rotary)
    front, back = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-back, front], dim=-1) * sin).to(x.dtype)


def calibrates(settings: Mapping[str, Any]) -> bool:
    """Whether there is anything to fit to the model: pooled keys."""
    return settings.get("landmark_key", LandmarkAttentionConfig.landmark_key) == "pooled"


def state_bytes(config, num_heads, num_key_value_heads, head_dim, num_tokens, dtype_bytes) -> int:
    """Bytes of one sequence's blocks after `num_tokens` tokens, wherever they lie: keys, values and landmarks. A
    cache's spare slots are not among them: up to half as many, or with `max_blocks` as many again and at least 16."""
    blocks = num_tokens // (config.block_size - 1)
    if config.max_blocks is not None:
        blocks = min(blocks, config.max_blocks)
    key = num_key_value_heads * head_dim * dtype_bytes
    ranks = 2 * config.key_parts if config.landmark_key == "bounds" else 1  # keys' worth, of a block
    return (blocks + 1) * config.block_size * 2 * key + blocks * (ranks * key + 8)
