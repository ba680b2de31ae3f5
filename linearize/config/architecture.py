"""A model of random weights: its shape and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from linearize.config.values import convert_fields, require

ENCODERS = ("bert",)
"""Types that find hidden tokens; the others predict the next one."""
SIZES = (
    *("n_layer", "n_head", "n_embd", "n_inner", "n_kv_head", "head_dim"),
    *("rotary_dim", "n_positions", "vocab_multiple"),
)
LLAMA_ONLY = {
    "n_kv_head": "grouped keys and values",
    "head_dim": "heads of another width",
    "rope_theta": "rotations to set",
}
"""Settings that the other types have no place for, and what they are about."""
LLAMA_ROUND = 64
"""The inner width of a Llama that none is given for is a multiple of this."""
ROPE_THETA = 10_000.0
ROTARY_DIM = 64
"""Channels of a head that a GPT-J rotates, at most, where none are given."""


@dataclass
class ArchitectureConfig:
    """The shape of a model of random weights; its vocabulary is the tokenizer's."""

    type: Literal["gpt2", "llama", "bert", "gptj"] = "gpt2"
    """The architecture: a GPT-2, a Llama, a GPT-J, or a BERT, which learns to find hidden tokens."""
    n_layer: int = 12
    """Layers (12 in GPT-2 of 124 M and in BERT-base)."""
    n_head: int = 12
    """Attention heads (12 in GPT-2 of 124 M and in BERT-base)."""
    n_embd: int = 768
    """Width, a multiple of the heads (768 in GPT-2 of 124 M and in BERT-base)."""
    n_inner: int | None = None
    """Width inside the feed-forward layers; none: 4 times `n_embd`, and in a Llama, whose layers have three matrices
    for two, 8/3 of it up to a multiple of 64."""
    n_kv_head: int | None = None
    """Key/value heads of a Llama, which groups of attention heads share; none: as many as attention heads."""
    head_dim: int | None = None
    """Width of a head of a Llama; none: `n_embd / n_head`."""
    n_positions: int | None = None
    """Positions that the model has, `data.sequence_length` at least; none: just so many."""
    rope_theta: float | None = None
    """Base of a Llama's rotary embedding; none: 10000."""
    rotary_dim: int | None = None
    """Channels of each head that a GPT-J rotates, an even number; none: 64, or all of a narrower head."""
    tie_embeddings: bool | None = None
    """Use the matrix of the embeddings for the output too; none: as the architecture has it (GPT-2 and BERT yes,
    Llama and GPT-J no)."""
    vocab_multiple: int = 1
    """Fill the vocabulary up to a multiple of this with entries that no text has."""
    dropout: float = 0.0
    """Dropout of embeddings, attention and residuals, of attention alone in a Llama (0.1 in GPT-2 and BERT; 0 where no
    text is seen often)."""

    def __post_init__(self) -> None:
        convert_fields(self, "architecture")
        for key in SIZES:
            value = getattr(self, key)
            require(value is None or value >= 1, f"architecture.{key} is {value}, but it must be at least 1.")
        for key, what in LLAMA_ONLY.items():
            require(
                self.type == "llama" or getattr(self, key) is None,
                f"architecture.{key} is set, but architecture.type {self.type} has no {what}: leave it out, or set "
                "type to llama.",
            )
        require(
            self.head_dim is not None or self.n_embd % self.n_head == 0,
            f"architecture.n_embd is {self.n_embd}, but it must be a multiple of architecture.n_head ({self.n_head}).",
        )
        if self.type == "llama":
            self._check_llama()
        self._check_rotary_dim()
        require(
            0 <= self.dropout < 1, f"architecture.dropout is {self.dropout}, but it must be at least 0 and below 1."
        )

    def _check_llama(self) -> None:
        width = self.head_dim or self.n_embd // self.n_head
        require(
            width % 2 == 0,
            f"The heads of architecture are {width} wide, but a Llama rotates pairs: choose an even head_dim.",
        )
        require(
            self.n_head % (self.n_kv_head or self.n_head) == 0,
            f"architecture.n_head is {self.n_head}, but it must be a multiple of architecture.n_kv_head "
            f"({self.n_kv_head}).",
        )
        require(
            self.rope_theta is None or self.rope_theta > 0,
            f"architecture.rope_theta is {self.rope_theta}, but it must be positive.",
        )

    def _check_rotary_dim(self) -> None:
        if self.type != "gptj":
            require(
                self.rotary_dim is None,
                f"architecture.rotary_dim is set, but architecture.type {self.type} has no part of a head to rotate: "
                "leave it out, or set type to gptj.",
            )
            return
        width, rotated = self.n_embd // self.n_head, self.rotated
        require(
            rotated % 2 == 0 and rotated <= width,
            f"architecture.rotary_dim is {rotated}, but it must be even and at most the width of a head ({width}).",
        )

    @property
    def rotated(self) -> int:
        """Channels of each head that a GPT-J rotates."""
        return min(ROTARY_DIM, self.n_embd // self.n_head) if self.rotary_dim is None else self.rotary_dim

    @property
    def encoder(self) -> bool:
        """Whether it learns to find hidden tokens rather than the next one."""
        return self.type in ENCODERS

    @property
    def inner(self) -> int:
        """Width inside the feed-forward layers."""
        if self.n_inner is not None:
            return self.n_inner
        if self.type != "llama":
            return 4 * self.n_embd
        return -(-8 * self.n_embd // (3 * LLAMA_ROUND)) * LLAMA_ROUND


@dataclass
class TokenizerConfig:
    """Where the tokenizer of a model of random weights comes from; any other model has its own."""

    source: Literal["load", "train"] = "load"
    """Load a tokenizer, or train one on the training text (documents that are carved off for validation included): a
    byte-level BPE, and WordPiece with its marks for an encoder."""
    name_or_path: str | None = None
    """Hub id or local directory of the tokenizer to load; none: the model's, and for random weights GPT-2's, or BERT's
    cased one for an encoder."""
    vocab_size: int = 50_257
    """Entries of a trained tokenizer, at most; a loaded one has its own."""
    characters: int = 100_000_000
    """Characters of text that a tokenizer is trained on, at most."""

    def __post_init__(self) -> None:
        convert_fields(self, "tokenizer")
        require(
            self.vocab_size >= 257,
            f"tokenizer.vocab_size is {self.vocab_size}, but it must be at least 257: all bytes and the end of a "
            "text.",
        )
        require(self.characters >= 1, f"tokenizer.characters is {self.characters}, but it must be at least 1.")
