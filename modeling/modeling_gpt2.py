"""GPT-2 whose attention layers may be any mechanism of the registry; stock checkpoints load by name."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GPT2Config
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2Attention,
    GPT2Block,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
    eager_attention_forward,
)
from transformers.utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder

from .backbone import MixerAttention, MixerModelMixin
from .base_forward import base_forward
from .cache_names import named
from .configuration import MixerConfigMixin
from .model_call import layer_masks, start_call


@strict
class LinearizedGPT2Config(MixerConfigMixin, GPT2Config):
    """A GPT-2 config that names the attention of every layer."""

    model_type = "linearized_gpt2"
    learned_positions = True
    mixer_types: list[str] | None = None
    mixers: dict | None = None

    def __post_init__(self, **kwargs):
        for name in self.attribute_map.keys() & kwargs.keys():  # the mixers need num_hidden_layers, which is n_layer
            setattr(self, name, kwargs.pop(name))
        if self.reorder_and_upcast_attn:
            raise ValueError(
                "a converted GPT-2 does not reorder and upcast its softmax attention: set reorder_and_upcast_attn to "
                "false in the teacher's config.json, which gives the same numbers in float32"
            )
        if self.add_cross_attention:
            raise ValueError(
                "a converted GPT-2 has no cross-attention: convert a decoder-only checkpoint, whose "
                "add_cross_attention is false"
            )
        self.prepare_mixers()
        super().__post_init__(**kwargs)


class LinearizedGPT2Attention(MixerAttention, GPT2Attention):
    def __init__(self, config: LinearizedGPT2Config, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.attention_dropout = config.attn_pdrop
        self.add_mixer(config, config.num_attention_heads, config.num_attention_heads)

    def forward(  # type: ignore[override] # no cross-attention
        self, hidden_states, past_key_values=None, attention_mask=None, padding_mask=None, **kwargs
    ):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projected = self.c_attn(hidden_states).split(self.split_size, dim=2)
        query, key, value = (x.view(shape).transpose(1, 2) for x in projected)
        output = self.attend(
            query, key, value, attention_mask, padding_mask, past_key_values, eager_attention_forward, **kwargs
        )
        output = self.c_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        return self.resid_dropout(output), None


class LinearizedGPT2Block(GPT2Block):
    def __init__(self, config: LinearizedGPT2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.mixer(layer_idx) is not None:
            self.attn = LinearizedGPT2Attention(config, layer_idx)


class LinearizedGPT2PreTrainedModel(MixerModelMixin, GPT2PreTrainedModel):
    config: LinearizedGPT2Config
    config_class = LinearizedGPT2Config
    auto_classes = {
        "AutoModel": "LinearizedGPT2Model",
        "AutoModelForCausalLM": "LinearizedGPT2ForCausalLM",
        "AutoModelForSequenceClassification": "LinearizedGPT2ForSequenceClassification",
        "AutoModelForTokenClassification": "LinearizedGPT2ForTokenClassification",
        "AutoModelForQuestionAnswering": "LinearizedGPT2ForQuestionAnswering",
    }
    layers_path, attention_path = "h", "attn"
    _no_split_modules = ["LinearizedGPT2Block"]
    _can_record_outputs = {
        "hidden_states": LinearizedGPT2Block,
        "attentions": OutputRecorder(GPT2Attention, layer_name=".attn", index=1),
    }
    # Constants that old checkpoints hold: the causal mask and the value at masked places.
    _keys_to_ignore_on_load_unexpected = ["attn.bias", "attn.masked_bias"]


class LinearizedGPT2Model(LinearizedGPT2PreTrainedModel, GPT2Model):
    def __init__(self, config: LinearizedGPT2Config):
        super().__init__(config)
        self.h = nn.ModuleList([LinearizedGPT2Block(config, i) for i in range(config.num_hidden_layers)])
        self.add_landmarks()
        self.post_init()

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
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        hidden_states, past_key_values, position_ids = start_call(
            self, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache
        )
        tokens = hidden_states.shape[1] + (0 if past_key_values is None else past_key_values.get_seq_length())
        # Padding takes no position, a landmark does. On a GPU to ask would stop the host: it is asked only in doubt.
        assert self.max_positions is not None, "this backbone learns its positions"
        doubtful = tokens > self.max_positions or kwargs.get("landmarks") is not None
        if not is_tracing():
            if doubtful or position_ids.device.type == "cpu":
                tokens = int(position_ids.max()) + 1
            self.check_positions(tokens)
        causal_mask, padding_mask = layer_masks(
            self, hidden_states, attention_mask, position_ids, past_key_values, kwargs.get("packing")
        )
        hidden_states = hidden_states + self.wpe(position_ids).to(hidden_states.device)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        hidden_states = self.drop(hidden_states)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                padding_mask=padding_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **named(past_key_values),
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.ln_f(hidden_states), **named(past_key_values)
        )


class LinearizedGPT2ForCausalLM(LinearizedGPT2PreTrainedModel, GPT2LMHeadModel):
    def __init__(self, config: LinearizedGPT2Config):
        super().__init__(config)
        self.transformer = LinearizedGPT2Model(config)
        self.post_init()


class LinearizedGPT2Head(LinearizedGPT2PreTrainedModel):
    """Goes before a stock model with a head: the model below is the converted one."""

    transformer: Any

    def __init__(self, config: LinearizedGPT2Config):
        super().__init__(config)
        self.transformer = LinearizedGPT2Model(config)
        self.post_init()


class LinearizedGPT2ForSequenceClassification(LinearizedGPT2Head, GPT2ForSequenceClassification):
    pass


class LinearizedGPT2ForTokenClassification(LinearizedGPT2Head, GPT2ForTokenClassification):
    pass


class LinearizedGPT2ForQuestionAnswering(LinearizedGPT2Head, GPT2ForQuestionAnswering):
    pass
