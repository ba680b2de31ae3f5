"""What a pretraining starts from: a model with random weights, and a tokenizer that is loaded or trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from linearize import data_packing
from linearize.conversion import load_model, load_tokenizer
from linearize.data import cache_root, main_process_first, open_training_source
from linearize.data_documents import resolve_format, split_text
from linearize.errors import UserError

if TYPE_CHECKING:
    from linearize.data_sources import Source
    from linearize.distillation import Distiller
    from linearize.pretraining import PretrainConfig

END_OF_TEXT = "<|endoftext|>"


def build_model(config: PretrainConfig, tokenizer: Any) -> Any:
    """The checkpoint's model, or one with random weights, in float32 on the CPU.

    Raises:
        UserError: The checkpoint cannot be read, has too few positions or entries for text and tokenizer, or has no
            scalers where only they are to train.
    """
    shape = config.model
    set_seed(config.seed)
    if config.model_name_or_path is not None:
        model = _checked(load_model(config.model_name_or_path), config, tokenizer)
        return model if config.training.train == "all" else _freeze_all_but_scalers(model)
    if config.training.train != "all":
        raise UserError("training.train is scalers, but random weights have none: set model_name_or_path.")
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.data.sequence_length,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.n_embd,
            embd_pdrop=shape.dropout,
            attn_pdrop=shape.dropout,
            resid_pdrop=shape.dropout,
            bos_token_id=tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _freeze_all_but_scalers(model: Any) -> Any:
    from linearize.adaptation import scalers_of

    model.requires_grad_(False)
    for scaler in scalers_of(model).values():
        scaler.requires_grad_(True)
    return model


def build_distiller(config: PretrainConfig, model: Any) -> Distiller | None:
    """The teacher of `config.distillation`, in float32 on the CPU, or None.

    Raises:
        UserError: It cannot be read, or does not fit the model.
    """
    if config.distillation is None or config.distillation.teacher is None:
        return None
    from linearize.distillation import Distiller

    return Distiller(load_model(config.distillation.teacher), model, config.distillation)


def _checked(model: Any, config: PretrainConfig, tokenizer: Any) -> Any:
    positions, length = getattr(model.config, "max_position_embeddings", None), config.data.sequence_length
    if positions is not None and length > positions:
        raise UserError(
            f"data.sequence_length is {length}, but {config.model_name_or_path} has {positions} positions: lower it."
        )
    entries = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > entries:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} entries and {config.model_name_or_path} has {entries}: name the "
            "tokenizer that the checkpoint was trained with."
        )
    return model


def make_tokenizer(config: PretrainConfig) -> Any:
    """The tokenizer of a run.

    Raises:
        UserError: It cannot be loaded, it has no token that ends a text, or there is no plain text to train it on.
    """
    if config.tokenizer == "train":
        tokenizer = main_process_first(lambda: _trained_tokenizer(config))
    else:
        tokenizer = load_tokenizer(config.tokenizer_source)
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer {config.tokenizer_source} has no token that ends a text (eos_token), which "
                "separates documents: name another, or set tokenizer to train."
            )
    tokenizer.model_max_length = config.data.sequence_length
    return tokenizer


def _trained_tokenizer(config: PretrainConfig) -> Any:
    """The tokenizer of the training text, from the cache of the data where it has it."""
    source = open_training_source(config.data)
    column = config.data.text_field
    if resolve_format(source, config.data.format, column, config.data.messages_field) != "text":
        raise UserError(
            f"A tokenizer is trained on plain text, but {source.name} holds chat or instruction records: set "
            "tokenizer to load, or data.format to text."
        )
    key = data_packing.cache_key(
        kind="tokenizer",
        source=source.identity,
        field=column,
        vocab_size=config.vocab_size,
        characters=config.tokenizer_characters,
        tokenizers=tokenizers.__version__,
    )

    def build(folder: Path) -> dict[str, Any]:
        texts = _first_characters(source, column, config.tokenizer_characters)
        trained = train_tokenizer(texts, config.vocab_size)
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


def _first_characters(source: Source, column: str, limit: int) -> Iterator[str]:
    """Pieces of the records' texts, up to `limit` characters."""
    left = limit
    for _, record in source.records():
        text = record.get(column)
        if not isinstance(text, str):
            continue
        for piece, _, _ in split_text(text[:left]):
            yield piece
        left -= len(text)
        if left <= 0:
            return
