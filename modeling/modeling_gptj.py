"""GPT-J whose attention layers may be any mechanism of the registry; stock checkpoints load by name.

Attention and MLP read one norm, and the rotary embedding turns neighbouring dimensions, the first `rotary_dim` of a
head. Positions are computed, where the stock model reads them from a table that ends.
"""

from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GPTJConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gptj.modeling_gptj import (
    GPTJAttention,
    GPTJBlock,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
    GPTJPreTrainedModel,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import can_return_tuple

from .backbone import MixerAttention, MixerModelMixin
from .base_forward import base_forward
from .cache_names import CACHE, EitherCacheName, named
from .configuration import MixerConfigMixin
from .far_sinks import plan_far_sinks
from .model_call import layer_masks, start_call

ROTARY_BASE = 10_000


@strict
class LinearizedGPTJConfig(MixerConfigMixin, GPTJConfig):
    """A GPT-J config that names the attention of every layer."""

    model_type = "linearized_gptj"
    mixer_types: list[str] | None = None
    mixers: dict | None = None

    def __post_init__(self, **kwargs):
        for name in self.attribute_map.keys() & kwargs.keys():  # the mixers need num_hidden_layers, which is n_layer
            setattr(self, name, kwargs.pop(name))
        head_dim = self.hidden_size // self.num_attention_heads
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= head_dim:
            raise ValueError(
                f"rotary_dim is {self.rotary_dim}, but it must be even, above 0 and at most the head dimension "
                f"{head_dim}: correct it in the teacher's config.json"
            )
        self.prepare_mixers()
        if head_dim % 2 and any(settings["type"] == "landmark" for settings in (self.mixers or {}).values()):
            raise ValueError(
                f"the head dimension is {head_dim}, and landmark attention rotates pairs of dimensions: choose "
                "another attention for this model"
            )
        super().__post_init__(**kwargs)


class GPTJRotatedAttention(EitherCacheName, GPTJAttention):
    """The stock softmax attention, for layers that keep it, with the model's tables in place of its own."""

    def __init__(self, config: LinearizedGPTJConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.is_causal, self.scaling, self.attention_dropout = True, self.head_dim**-0.5, config.attn_pdrop
        if hasattr(self, "embed_positions"):  # up to transformers 5.23; then the model has the table
            del self.embed_positions

    def project(self, hidden_states) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, T, H, D)`, not rotated."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        return tuple(projection(hidden_states).view(shape) for projection in (self.q_proj, self.k_proj, self.v_proj))

    def rotate(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """`(B, T, H, D)` with its first dimensions rotated by sines and cosines `(B or 1, T, rotary_dim / 2)`."""
        sine, cosine = (table.to(x.dtype) for table in rotary)
        turned = apply_rotary_pos_emb(x[..., : self.rotary_dim], sine, cosine)
        return torch.cat([turned, x[..., self.rotary_dim :]], dim=-1)

    def forward(  # type: ignore[override] # the tables come from the model
        self, hidden_states, rotary, past_key_values=None, attention_mask=None, **kwargs
    ):
        query, key, value = self.project(hidden_states)
        query, key = (self.rotate(x, rotary).transpose(1, 2) for x in (query, key))
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, softmax_attention)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = interface(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        output = self.out_proj(output.reshape(hidden_states.shape).contiguous())
        return self.resid_dropout(output), weights


def softmax_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The stock softmax attention as an attention function, scores in float32: `(B, T, H, D)`, and the weights."""
    scores = query.float() @ key.float().transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1).to(value.dtype), dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def eager_attention_forward(*args, **kwargs):
    """`softmax_attention` without its weights, which would stay in memory while the mechanism is trained on the
    output."""
    return softmax_attention(*args, **kwargs)[0], None


class LinearizedGPTJAttention(MixerAttention, GPTJRotatedAttention):
    def __init__(self, config: LinearizedGPTJConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.add_mixer(config, config.num_attention_heads, config.num_attention_heads)

    def forward(  # type: ignore[override]
        self, hidden_states, rotary, past_key_values=None, attention_mask=None, padding_mask=None, **kwargs
    ):
        query, key, value = self.project(hidden_states)
        context = self.context(query.transpose(1, 2), key.transpose(1, 2), hidden_states)
        if kwargs.get("landmarks") is None:
            query, key = self.rotate(query, rotary), self.rotate(key, rotary)
        else:
            query, key = by_halves(query, self.rotary_dim), by_halves(key, self.rotary_dim)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = self.attend(
            query, key, value, attention_mask, padding_mask, past_key_values, eager_attention_forward,
            context=context, **kwargs,
        )  # fmt: skip
        output = self.out_proj(output.reshape(hidden_states.shape).contiguous())
        return self.resid_dropout(output), None


def by_halves(x: Tensor, rotary_dim: int) -> Tensor:
    """The dimensions in the order of mechanisms that rotate by themselves: pairs (i, i + D/2), in place of neighbours.

    Scores are sums over dimensions, so that queries and keys in any one order give the same.
    """
    middle = (rotary_dim + x.shape[-1]) // 2
    return torch.cat([x[..., 0:rotary_dim:2], x[..., rotary_dim:middle], x[..., 1:rotary_dim:2], x[..., middle:]], -1)


class LinearizedGPTJBlock(GPTJBlock):
    def __init__(self, config: LinearizedGPTJConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        converted = config.mixer(layer_idx) is not None
        self.attn = (LinearizedGPTJAttention if converted else GPTJRotatedAttention)(config, layer_idx)

    def forward(self, hidden_states, **kwargs):  # type: ignore[override]
        normed = self.ln_1(hidden_states)
        attended, _ = self.attn(normed, **kwargs)
        return attended + self.mlp(normed) + hidden_states


class LinearizedGPTJPreTrainedModel(MixerModelMixin, GPTJPreTrainedModel):
    config: LinearizedGPTJConfig
    config_class = LinearizedGPTJConfig
    auto_classes = {
        "AutoModel": "LinearizedGPTJModel",
        "AutoModelForCausalLM": "LinearizedGPTJForCausalLM",
        "AutoModelForSequenceClassification": "LinearizedGPTJForSequenceClassification",
        "AutoModelForQuestionAnswering": "LinearizedGPTJForQuestionAnswering",
    }
    layers_path, attention_path = "h", "attn"
    _no_split_modules = ["LinearizedGPTJBlock"]
    _can_record_outputs = {"hidden_states": LinearizedGPTJBlock, "attentions": GPTJRotatedAttention}
    # Constants that old checkpoints hold: the causal mask and the value at masked places.
    _keys_to_ignore_on_load_unexpected = ["attn.bias", "attn.masked_bias"]

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, GPTJAttention):  # the stock way fills its table, up to transformers 5.23
            super()._init_weights(module)


class LinearizedGPTJModel(LinearizedGPTJPreTrainedModel, GPTJModel):
    def __init__(self, config: LinearizedGPTJConfig):
        super().__init__(config)
        if hasattr(self, "rotary_emb"):  # from transformers 5.24 on: the table of positions
            del self.rotary_emb
        self.h = nn.ModuleList([LinearizedGPTJBlock(config, i) for i in range(config.num_hidden_layers)])
        self.add_landmarks()
        self.post_init()

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Sines and cosines `(B or 1, T, rotary_dim / 2)` of positions, float32."""
        with torch.autocast(position_ids.device.type, enabled=False):
            place = torch.arange(0, self.config.rotary_dim, 2, device=position_ids.device).float()
            angles = position_ids[..., None].float() * (1.0 / ROTARY_BASE ** (place / self.config.rotary_dim))
            return angles.sin(), angles.cos()

    def rotary_tables(self, positions: int, device=None) -> tuple[Tensor, Tensor]:
        sine, cosine = self.rotary(torch.arange(positions, device=device))
        still = (self.config.hidden_size // self.config.num_attention_heads - self.config.rotary_dim) // 2
        return tuple(  # type: ignore[return-value]
            nn.functional.pad(table, (0, still), value=value).repeat(1, 2)
            for table, value in ((cosine, 1.0), (sine, 0.0))
        )

    def key_rotation(self, positions: int) -> Callable[[Tensor], Tensor]:
        """What rotates keys `(B, H, T, D)` that have a position on to one that is `positions` later."""
        attention: Any = self.h[0].attn
        tables = self.rotary(torch.full((1, 1), positions, device=self.wte.weight.device))

        def rotate(key: Tensor) -> Tensor:
            wide = key.to(torch.promote_types(key.dtype, torch.float32)).transpose(1, 2)
            here = tuple(x.to(key.device) for x in tables)
            return attention.rotate(wide, here).transpose(1, 2).to(key.dtype)

        return rotate

    @base_forward
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        hidden_states, past_key_values, position_ids = start_call(
            self, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache
        )
        causal_mask, padding_mask = layer_masks(
            self, hidden_states, attention_mask, position_ids, past_key_values, kwargs.get("packing")
        )
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        hidden_states = self.drop(hidden_states)
        rotary = self.rotary(position_ids)
        kwargs |= plan_far_sinks(self, hidden_states, padding_mask, past_key_values, kwargs.get("packing"))
        for block in self.h:
            hidden_states = block(
                hidden_states,
                rotary=rotary,
                attention_mask=causal_mask,
                padding_mask=padding_mask,
                use_cache=use_cache,
                **named(past_key_values),
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), **named(past_key_values))


class LinearizedGPTJForCausalLM(LinearizedGPTJPreTrainedModel, GPTJForCausalLM):
    def __init__(self, config: LinearizedGPTJConfig):
        super().__init__(config)
        self.transformer = LinearizedGPTJModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        output = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **named(output.get(CACHE)),
        )


class LinearizedGPTJHead(LinearizedGPTJPreTrainedModel):
    """Goes before a stock model with a head: the model below is the converted one."""

    transformer: Any

    def __init__(self, config: LinearizedGPTJConfig):
        super().__init__(config)
        self.transformer = LinearizedGPTJModel(config)
        self.post_init()


class LinearizedGPTJForSequenceClassification(LinearizedGPTJHead, GPTJForSequenceClassification):
    pass


class LinearizedGPTJForQuestionAnswering(LinearizedGPTJHead, GPTJForQuestionAnswering):
    pass
