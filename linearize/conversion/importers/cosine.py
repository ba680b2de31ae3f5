"""Checkpoints of the published cosine-attention code as converted BERT and GPT-J repositories.

They are stock models whose attention layers have one more tensor, `norm_const` `(1, H, 1, 1)`: the logit of each
head's exponent, which is `exponent_logit` here. In BERT a value is divided by the number of real tokens to the
exponent's power, in GPT-J by the number of real tokens up to its own: the scale is on the key's side there, and one
that sits on the query's would be another model.

A checkpoint without `norm_const` has softmax attention and needs no import. What lies beside the weights (optimiser,
schedule, settings and tokenizer as pickles) is not read.

Source: the code of Mongaras et al. 2024 (arXiv 2409.18747).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from linearize.conversion.importers.checkpoint_files import find_checkpoint, map_weights, published_config
from linearize.conversion.sources import Source
from linearize.conversion.students import (
    NOT_CARRIED,
    check_loaded,
    load_tokenizer,
    quiet_transformers,
    student_config,
    take_saved_generation_config,
)
from linearize.errors import UserError
from linearize.load_errors import explained
from linearize.modeling import BACKBONES

NORM_CONST = "norm_const"
EXPONENT = "mixer.scales.exponent_logit"
PUBLISHED = {"window": 0, "sinks": 0, "gain": False, "directions": "rotated", "gate": "none"}
"""Nothing but the cosines and the exponents."""
NOT_WEIGHTS = re.compile(r".*\.(attn\.(bias|masked_bias|embed_positions)|embeddings\.(position_ids|token_type_ids))")
"""Constants: causal masks, rotary tables and counters."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
SUPPORTED = "only the published cosine checkpoints are supported, which are BERT and GPT-J"


@dataclass(frozen=True)
class Kind:
    """What the published code makes of one architecture.

    attention is the prefix of a layer's own tensors, with `{}` for its number; stock is the class of a checkpoint that
    does not name its own.
    """

    title: str
    attention: str
    embeddings: str
    scale_side: str
    stock: str
    tokenizer: str
    """The one that the published models were trained with."""


KINDS = {
    "bert": Kind(
        "BERT",
        "bert.encoder.layer.{}.attention.self.",
        "bert.embeddings.word_embeddings.weight",
        "query",
        "BertForPreTraining",
        "google-bert/bert-base-cased",
    ),
    "gptj": Kind(
        "GPT-J",
        "transformer.h.{}.attn.",
        "transformer.wte.weight",
        "key",
        "GPTJForCausalLM",
        "EleutherAI/gpt-j-6b",
    ),
}


@dataclass
class ImportedCosine:
    """A published checkpoint as a converted model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None where the checkpoint holds no tokenizer files."""
    source: Source
    settings: dict[str, Any]
    """What was read of it: its architecture, its layers, the side of the scale, the range of its exponents."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what was left out."""


def import_cosine(
    source: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> ImportedCosine:
    """Read a checkpoint of the published cosine-attention code.

    Args:
        source: Directory or Hub id.
        tokenizer: Directory or Hub id of the tokenizer, where the checkpoint has none.
        revision: Of the Hub repository.
        dtype: Of the model, but for its exponents, which stay float32; `auto` is that of the embeddings.

    Returns:
        The student, in evaluation mode, and what belongs to it.

    Raises:
        UserError: The checkpoint cannot be read, is of another layout, or has softmax attention.
    """
    if (path := Path(source)).is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        raise UserError(f"{source} is no directory with a config.json: give the checkpoint's directory or its Hub id")
    found = find_checkpoint(source, revision)
    config = _read_config(found)
    kind = KINDS[config["model_type"]]
    teacher = _stock_config(found, config)
    weights = {name: x for name, x in map_weights(found).items() if not NOT_WEIGHTS.fullmatch(name)}
    if not any(name.endswith(f".{NORM_CONST}") for name in weights):
        raise UserError(
            f"{found.name} has softmax attention (its weights hold no {NORM_CONST}), so there is nothing to import: "
            f"load it with {_stock_class(config)} of transformers"
        )
    exponents = _move_exponents(found, weights, teacher, kind)
    words = _tokenizer(found, tokenizer)
    model = _load(found, teacher, weights, kind, dtype)
    settings: dict[str, Any] = {
        "architecture": _stock_class(config),
        "layers": len(exponents),
        "scale_side": kind.scale_side,
        "exponents": [round(float(x), 4) for x in (exponents.min(), exponents.max())],
    }
    return ImportedCosine(model, words, found, settings, _notes(settings["architecture"], words, kind))


def _read_config(source: Source) -> dict[str, Any]:
    config = published_config(source, KINDS, SUPPORTED)
    if (positions := config.get("position_embedding_type", "absolute")) != "absolute":
        raise UserError(f"{source.name} has {positions} positions, which the published cosine BERT does not have")
    return config


def _stock_config(source: Source, config: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of the softmax model underneath, with the fields that it knows."""
    stock: Any = CONFIG_MAPPING[config["model_type"]]
    known = stock().to_dict().keys() - set(NOT_CARRIED)
    with explained(source.name):
        teacher = stock(**{name: value for name, value in config.items() if name in known})
    teacher.architectures = [_stock_class(config)]
    return teacher


def _stock_class(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else KINDS[config["model_type"]].stock


def _move_exponents(source: Source, weights: dict[str, Tensor], teacher: Any, kind: Kind) -> Tensor:
    """In the weights, `norm_const` becomes the mechanism's parameter; returns the exponents `(layers, H)`."""
    heads, logits = teacher.num_attention_heads, []
    for layer in range(teacher.num_hidden_layers):
        name = f"{kind.attention.format(layer)}{NORM_CONST}"
        if name not in weights:
            raise UserError(f"{source.name} lacks {name}, the exponents of one of its layers: complete the checkpoint")
        logit = weights.pop(name)
        if logit.shape != (1, heads, 1, 1):
            raise UserError(
                f"{name} of {source.name} has the shape {tuple(logit.shape)}, but {heads} heads have "
                f"{(1, heads, 1, 1)}: give the config.json that goes with the weights"
            )
        logits.append(logit.flatten().float())
        if not logits[-1].isfinite().all():
            raise UserError(f"{name} of {source.name} holds numbers that are not finite: its training has failed")
        weights[f"{kind.attention.format(layer)}{EXPONENT}"] = logits[-1]
    return torch.stack(logits).sigmoid()


def _tokenizer(source: Source, name: str | None) -> PreTrainedTokenizerBase | None:
    if name is not None:
        return load_tokenizer(name)
    if not any((source.path / file).is_file() for file in TOKENIZER_FILES):
        return None
    try:
        return load_tokenizer(source.path)
    except UserError as error:
        raise UserError(f"{source.name} has no tokenizer that can be read: give one with --tokenizer") from error


def _load(source: Source, teacher: Any, weights: dict[str, Tensor], kind: Kind, dtype: str | torch.dtype) -> Any:
    """Tensors that have the dtype already are not copied."""
    backbone = BACKBONES[teacher.model_type]
    attention = {"type": "cosine", **PUBLISHED, "scale_side": kind.scale_side}
    config = student_config(teacher, backbone.config, attention, None, None, (), "keep")
    load: Any = backbone.model(teacher.architectures).from_pretrained  # returns a pair when asked for the report
    if dtype == "auto":
        dtype = weights[kind.embeddings].dtype if kind.embeddings in weights else torch.float32
    with quiet_transformers(), explained(source.name):
        model, info = load(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    check_loaded(source.name, info, model)
    if model.can_generate():
        take_saved_generation_config(model, str(source.path))
    return model.eval()


def _notes(architecture: str, tokenizer: PreTrainedTokenizerBase | None, kind: Kind) -> list[str]:
    notes = []
    if architecture == "BertForPreTraining":
        notes.append("Its next-sentence head and pooler are left out; the masked language model is kept.")
    if tokenizer is None:
        notes.append(f"No tokenizer is in it: give --tokenizer {kind.tokenizer} to save the published one along.")
    return notes
