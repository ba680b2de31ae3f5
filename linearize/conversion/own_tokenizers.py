"""The tokenizer of a pretraining: loaded, or trained on the training text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from linearize.conversion.students import load_tokenizer
from linearize.data import packing as data_packing
from linearize.data.documents import resolve_format, split_text
from linearize.data.sequences import cache_root, main_process_first, open_training_source
from linearize.data.sources import text_pieces
from linearize.errors import UserError

if TYPE_CHECKING:
    from linearize.data.sources import Source
    from linearize.runs.settings import RunConfig

GPT2_TOKENIZER, BERT_TOKENIZER = "openai-community/gpt2", "google-bert/bert-base-cased"
END_OF_TEXT = "<|endoftext|>"
MARKS = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
"""Of an encoder's tokenizer, in the order of their numbers."""
ALPHABET_SHARE = 4
"""Letters take at most a quarter of WordPiece's entries; rarer ones are unknown."""


def make_tokenizer(config: RunConfig, encoder: bool) -> Any:
    """The tokenizer of a run, of an encoder or of a decoder.

    Raises:
        UserError: It cannot be loaded, it has no token that ends a text (a decoder's) or hides one (an encoder's), or
            there is no plain text to train it on.
    """
    source = config.tokenizer.name_or_path or (BERT_TOKENIZER if encoder else GPT2_TOKENIZER)
    if config.tokenizer.source == "train":
        tokenizer = main_process_first(lambda: _trained_tokenizer(config, encoder))
    else:
        tokenizer = load_tokenizer(source)
        if encoder and tokenizer.mask_token_id is None:
            raise UserError(
                f"The tokenizer {source} has no token that hides another (mask_token), which an "
                "encoder learns from: name another, or set tokenizer.source to train."
            )
        if not encoder and tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer {source} has no token that ends a text (eos_token), which "
                "separates documents: name another, or set tokenizer.source to train."
            )
    tokenizer.model_max_length = config.data.sequence_length
    return tokenizer


def _trained_tokenizer(config: RunConfig, encoder: bool) -> Any:
    """The tokenizer of the training text, from the cache of the data where it has it."""
    source = open_training_source(config.data)
    column = config.data.text_field
    if resolve_format(source, config.data.format, column, config.data.messages_field) != "text":
        raise UserError(
            f"A tokenizer is trained on plain text, but {source.name} holds chat or instruction records: set "
            "tokenizer.source to load, or data.format to text."
        )
    train = train_wordpiece if encoder else train_tokenizer
    key = data_packing.cache_key(
        kind="wordpiece" if encoder else "tokenizer",
        source=source.identity,
        field=column,
        vocab_size=config.tokenizer.vocab_size,
        characters=config.tokenizer.characters,
        tokenizers=tokenizers.__version__,
    )

    def build(folder: Path) -> dict[str, Any]:
        texts = _first_characters(source, column, config.tokenizer.characters)
        trained = train(texts, config.tokenizer.vocab_size)
        trained.save_pretrained(folder)
        return {"entries": len(trained)}

    return load_tokenizer(str(data_packing.cached(cache_root(config.data.cache_dir), key, build)))


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's: it can write anything, and `<|endoftext|>` ends a text.

    Args:
        texts: What it learns its merges from.
        vocab_size: Entries, at most; a short text gives fewer.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )


def train_wordpiece(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """WordPiece as BERT's cased one: `[CLS]` before a text and `[SEP]` behind it, `[MASK]` to hide a token.

    Args:
        texts: What it learns its pieces from.
        vocab_size: Entries, at most; a short text gives fewer.
    """
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=MARKS["unk_token"]))
    pieces.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces.decoder = tokenizers.decoders.WordPiece()
    marks = list(MARKS.values())
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=marks,
        limit_alphabet=vocab_size // ALPHABET_SHARE,
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    first, last = MARKS["cls_token"], MARKS["sep_token"]
    pieces.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(mark, pieces.token_to_id(mark)) for mark in (first, last)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=pieces, model_input_names=names, **MARKS)


def _first_characters(source: Source, column: str, limit: int) -> Iterator[str]:
    """Pieces of the records' texts, up to `limit` characters."""
    left = limit
    for where, record in source.records():
        for piece in split_text(text_pieces(record, column, where)):
            yield piece.text[:left]
            left -= len(piece.text)
            if left <= 0:
                return
