"""Checkpoints of the published landmark-attention code as converted Llama repositories.

There the landmark is a token, the last of a vocabulary that grew by `[PAD]` and `<landmark>`; here it is a parameter
of the model, and no id. Its rows of the embeddings and of the output move to the parameter, and the vocabulary ends
where it stood: every other id keeps its number. `[PAD]` stays, because the tokenizer fills up batches with its id,
which must have a row.

The published model is LLaMA as of its first release, whatever else config.json says: the base of the rotary embedding
is 10,000, without scaling, and nothing has a bias.

Source: the code of Mohtashami and Jaggi 2023 (arXiv 2305.16300).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase

from linearize.conversion.importers.checkpoint_files import find_checkpoint, map_weights, published_config
from linearize.conversion.importers.landmark_tokenizer import published_tokenizer
from linearize.conversion.sources import Source
from linearize.conversion.students import (
    check_loaded,
    quiet_transformers,
    student_config,
    take_saved_generation_config,
)
from linearize.errors import UserError
from linearize.load_errors import explained
from linearize.modeling import LinearizedLlamaConfig, LinearizedLlamaForCausalLM

MODEL_TYPES = ("llama_with_landmark", "llama")
PUBLISHED = {"mem_id": 32001, "mem_freq": 50, "train_context_length": 512, "include_landmark_in_loss": True}
"""What the published code assumes where config.json is silent, as it always is in those of its first version."""
KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)
"""Fields of config.json that the published model reads."""
ROPE_THETA = 10_000.0
EMBEDDINGS, OUTPUTS = "model.embed_tokens.weight", "lm_head.weight"
KEY_PROJECTION = "model.layers.0.self_attn.k_proj.weight"
NOT_WEIGHTS = "rotary_emb.inv_freq"
"""A buffer that older versions of transformers saved, and this one computes."""
NEEDED = {int: "a whole number from 1", bool: "true or false"}
SUPPORTED = "only checkpoints of the published Llama code are supported"


@dataclass
class ImportedLandmark:
    """A published checkpoint as a converted model."""

    model: LinearizedLlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    """Without `<landmark>`."""
    source: Source
    settings: dict[str, Any]
    """What was read of its training: the published fields, and what became of them."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what was decided otherwise than config.json says."""


def import_landmark(
    source: str | os.PathLike[str],
    *,
    mem_id: int | None = None,
    mem_freq: int | None = None,
    block_size: int | None = None,
    top_k: int | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> ImportedLandmark:
    """Read a checkpoint of the published Llama code.

    Args:
        source: Directory or Hub id.
        mem_id: Id of the landmark token, where config.json does not say it; default 32001.
        mem_freq: Tokens between landmarks, where config.json does not say it; default 50.
        block_size: The same with the landmark counted, mem_freq + 1.
        top_k: Blocks that a query reads; default as many as the trained context has room for.
        tokenizer: Directory or Hub id of the tokenizer, where the checkpoint has none that can be read.
        revision: Of the Hub repository.
        dtype: Of the model; `auto` is that of the embeddings.

    Returns:
        The student, in evaluation mode, and what belongs to it.

    Raises:
        UserError: The checkpoint cannot be read, is of another layout, or is no landmark checkpoint.
    """
    _refuse_other_layouts(source)
    found = find_checkpoint(source, revision)
    config = published_config(found, MODEL_TYPES, SUPPORTED)
    settings = _settings(found, config, {"mem_id": mem_id, "mem_freq": _frequency(mem_freq, block_size)})
    declared = mem_id is not None or config["model_type"] != "llama" or "mem_id" in config or "mem_freq" in config
    words = published_tokenizer(found, tokenizer, settings["mem_id"], declared)
    weights = {name: tensor for name, tensor in map_weights(found).items() if not name.endswith(NOT_WEIGHTS)}
    teacher = _stock_config(found, config, weights, words, settings["mem_id"])
    attention = {
        "type": "landmark",
        "block_size": settings["mem_freq"] + 1,
        "top_k": _room(settings) if top_k is None else top_k,
        "include_landmark_in_loss": settings["include_landmark_in_loss"],
        "landmark_key": "token",
    }
    student = student_config(teacher, LinearizedLlamaConfig, attention, None, None, (), "keep")
    _move_landmark(weights, settings, tied=bool(teacher.tie_word_embeddings))
    model = _load(found, student, weights, dtype)
    take_saved_generation_config(model, str(found.path))
    settings |= {"block_size": attention["block_size"], "top_k": attention["top_k"]}
    return ImportedLandmark(model, words, found, settings, _notes(config))


def _refuse_other_layouts(source: str | os.PathLike[str]) -> None:
    """The paper's models from scratch (`lm_benchmark`) are `ckpt.pt` with `summary.json`, a GPT of another layout."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "summary.json").is_file() or any(path.glob("*.pt")):
            raise UserError(
                f"{source} is no checkpoint of the published Llama code but looks like lm_benchmark's: {SUPPORTED}"
            )
        raise UserError(f"{source} holds no config.json: {SUPPORTED}")
    if path.is_file():
        raise UserError(f"{source} is a file, as lm_benchmark's checkpoints are: {SUPPORTED}")


def _frequency(mem_freq: int | None, block_size: int | None) -> int | None:
    if mem_freq is not None and block_size is not None and block_size != mem_freq + 1:
        raise UserError(
            f"--mem_freq {mem_freq} makes blocks of {mem_freq + 1} tokens and --block_size is {block_size}: give one"
        )
    return mem_freq if block_size is None else block_size - 1


def _settings(source: Source, config: Mapping[str, Any], given: Mapping[str, int | None]) -> dict[str, Any]:
    """The published fields: of config.json, else as given, else the published defaults."""
    settings = dict(PUBLISHED)
    for name, default in PUBLISHED.items():
        value, asked = config.get(name), given.get(name)
        if value is None:
            value = default if asked is None else asked
        elif asked is not None and asked != value:
            raise UserError(
                f"{source.name} was trained with {name} {value}, as its config.json says: leave out the flag that "
                f"says {asked}"
            )
        if type(value) is not type(default) or (type(value) is int and value < 1):
            raise UserError(f"{name} is {value!r}, but it must be {NEEDED[type(default)]}")
        settings[name] = value
    return settings


def _room(settings: Mapping[str, Any]) -> int:
    """The largest top_k with which no query and key are further apart than in training, and at least 1.

    The published labels have no landmark after a row's last token, the others have one where a block ends there.
    """
    context, frequency = settings["train_context_length"], settings["mem_freq"]
    positions = context + (context - settings["include_landmark_in_loss"]) // frequency
    return max(1, positions // (frequency + 1) - 2)


def _stock_config(
    source: Source,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    mem_id: int,
) -> LlamaConfig:
    """The config of the softmax model underneath, its vocabulary cut at the landmark."""
    rows = _rows(source, weights)
    if mem_id >= rows:
        raise UserError(
            f"{source.name} has {rows} rows of embeddings, none for the landmark {mem_id}: give its id with --mem_id, "
            "or convert a model without landmarks with `linearize convert`"
        )
    fields = {name: config[name] for name in KEPT if name in config}
    pads = [tokenizer.pad_token_id, fields.get("pad_token_id")]
    fields["pad_token_id"] = next((pad for pad in pads if isinstance(pad, int) and 0 <= pad < mem_id), None)
    fields |= {"vocab_size": mem_id, "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}}
    with explained(source.name):
        stock = LlamaConfig(**fields)
    if (key := weights.get(KEY_PROJECTION)) is not None and stock.head_dim:
        stock.num_key_value_heads = max(1, key.shape[0] // stock.head_dim)
    return stock


def _rows(source: Source, weights: Mapping[str, Tensor]) -> int:
    """Size of the grown vocabulary."""
    if EMBEDDINGS not in weights:
        raise UserError(f"{source.name} has no {EMBEDDINGS}: {SUPPORTED}, adapters merged")
    rows = weights[EMBEDDINGS].shape[0]
    if OUTPUTS in weights and weights[OUTPUTS].shape[0] != rows:
        raise UserError(
            f"{source.name} has {rows} rows of embeddings and {weights[OUTPUTS].shape[0]} of outputs: save it again "
            "after its vocabulary has grown"
        )
    return rows


def _move_landmark(weights: dict[str, Tensor], settings: Mapping[str, Any], tied: bool) -> None:
    """In the weights, the landmark's rows become the mechanism's parameters, and no row from there on is left."""
    mem_id = settings["mem_id"]
    outputs = weights[EMBEDDINGS] if tied else weights.get(OUTPUTS)
    weights["model.mixer.embedding"] = weights[EMBEDDINGS][mem_id].float()
    if outputs is not None and settings["include_landmark_in_loss"]:
        weights["model.mixer.output"] = outputs[mem_id].float()
    if tied:
        weights.pop(OUTPUTS, None)
    for name in (EMBEDDINGS, OUTPUTS):
        if name in weights:
            weights[name] = weights[name][:mem_id].clone()  # a storage of its own: safetensors saves no parts


def _load(
    source: Source, config: Any, weights: dict[str, Tensor], dtype: str | torch.dtype
) -> LinearizedLlamaForCausalLM:
    """Tensors that have the dtype already are not copied."""
    dtype = weights[EMBEDDINGS].dtype if dtype == "auto" else dtype
    with quiet_transformers(), explained(source.name):
        load: Any = LinearizedLlamaForCausalLM.from_pretrained  # returns a pair when asked for the loading report
        model, info = load(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    check_loaded(source.name, info, model)
    return model.eval()


def _notes(config: Mapping[str, Any]) -> list[str]:
    """What config.json says and the published model does not read."""
    rope = config.get("rope_parameters") or {}
    notes = []
    if (theta := config.get("rope_theta", rope.get("rope_theta", ROPE_THETA))) != ROPE_THETA:
        notes.append(f"config.json says rope_theta {theta}; the published code rotates with {ROPE_THETA:.0f} always.")
    if config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        notes.append("config.json scales the rotary embedding; the published code does not.")
    return notes
