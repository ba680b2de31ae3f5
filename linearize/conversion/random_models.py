"""Models with random weights, from the settings of a pretraining, and what such a run is refused for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from linearize.config.architecture import ROPE_THETA
from linearize.conversion.students import student_config
from linearize.data.vocabulary import vocabulary_size
from linearize.errors import UserError
from linearize.modeling import BACKBONES, backbone_of

if TYPE_CHECKING:
    from linearize.runs.settings import RunConfig

STOCK: dict[str, type[PreTrainedModel]] = {
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
    "bert": BertForMaskedLM,
    "gptj": GPTJForCausalLM,
}
"""`architecture.type` -> the stock class that trains."""


def stock_config(config: RunConfig, tokenizer: Any = None) -> PreTrainedConfig:
    """The config of a stock model with the settings' shape; without a tokenizer its vocabulary is `vocab_size`."""
    shape = config.shape
    entries = config.tokenizer.vocab_size if tokenizer is None else vocabulary_size(tokenizer)
    positions = shape.n_positions or config.data.sequence_length
    common: dict[str, Any] = {
        "vocab_size": -(-entries // shape.vocab_multiple) * shape.vocab_multiple,
        "pad_token_id": None if tokenizer is None else tokenizer.pad_token_id,
    }
    if shape.tie_embeddings is not None:
        common["tie_word_embeddings"] = shape.tie_embeddings
    if shape.type != "bert":
        start, end = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        common |= {"bos_token_id": end if start is None else start, "eos_token_id": end}
    if shape.type in ("gpt2", "gptj"):
        common |= {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "n_inner")}
        common |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), shape.dropout)
        if shape.type == "gpt2":
            return GPT2Config(n_positions=positions, **common)
        return GPTJConfig(n_positions=positions, rotary_dim=shape.rotated, **common)
    common |= {
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.inner,
        "max_position_embeddings": positions,
    }
    if shape.type == "bert":
        common |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), shape.dropout)
        return BertConfig(**common)
    return LlamaConfig(
        num_key_value_heads=shape.n_kv_head or shape.n_head,
        head_dim=shape.head_dim or shape.n_embd // shape.n_head,
        attention_dropout=shape.dropout,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta or ROPE_THETA},
        **common,
    )


def random_configs(config: RunConfig, tokenizer: Any = None) -> tuple[PreTrainedConfig, PreTrainedConfig | None]:
    """The stock config of the settings' shape, and that with their attention, None where all layers are softmax.

    Raises:
        UserError: Settings that are wrong, do not fit the shape, or that no model of this type can have.
    """
    stock: Any = stock_config(config, tokenizer)
    if config.attention is None and config.mixers is None:
        return stock, None
    kind = BACKBONES[config.shape.type].config
    student: Any = student_config(
        stock, kind, config.attention, config.mixer_types, config.mixers, config.softmax_layers, "keep"
    )
    length, positions = config.data.sequence_length, config.shape.n_positions
    if positions is None and student.learned_positions:
        stock.max_position_embeddings = student.max_position_embeddings = student.positions_of(length)
    elif student.longest_text is not None and student.longest_text < length:
        raise UserError(
            f"architecture.n_positions is {positions}, but texts of {length} tokens and their landmarks take "
            f"{student.positions_of(length)}: raise it, or leave it out."
        )
    return stock, student


def random_model(config: RunConfig, tokenizer: Any) -> Any:
    """A model with random weights: those that the stock class draws, whatever the attention, so that two runs of one
    seed start alike; the mechanism's own parameters start as it says."""
    stock_class = STOCK[config.shape.type]
    stock, changed = random_configs(config, tokenizer)
    model: Any = stock_class(stock)
    if changed is None:
        return model
    student = BACKBONES[config.shape.type].model([stock_class.__name__])(changed)
    weights = model.state_dict()
    odd = [name for name in student.load_state_dict(weights, strict=False).missing_keys if "mixer." not in name]
    assert not odd, odd
    return student.eval()


def check_head(source: str | None, config: Any) -> None:
    """Refuse an encoder without the head that finds hidden tokens.

    Raises:
        UserError: It has none.
    """
    if source is not None and backbone_of(config).auto_class(config.architectures) is not AutoModelForMaskedLM:
        raise UserError(
            f"{source} has no head that finds hidden tokens: name a checkpoint whose architectures in config.json are "
            "BertForMaskedLM."
        )
