"""Llama whose attention layers may be any mechanism of the registry; stock checkpoints load by name."""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbone import MixerAttention, MixerModelMixin, layer_masks, new_cache, real_positions
from .configuration import MixerConfigMixin


@strict
class LinearizedLlamaConfig(MixerConfigMixin, LlamaConfig):
    """A Llama config that names the attention of every layer."""

    model_type = "linearized_llama"
    mixer_types: list[str] | None = None
    mixers: dict | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.prepare_mixers()
        super().__post_init__(**kwargs)


class LinearizedLlamaAttention(MixerAttention, LlamaAttention):
    def __init__(self, config: LinearizedLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.add_mixer(config, config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads)

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        padding_mask=None,
        **kwargs,
    ):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        output = self.attend(
            query, key, value, attention_mask, padding_mask, past_key_values, eager_attention_forward, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), None


class LinearizedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: LinearizedLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.mixer(layer_idx) is not None:
            self.self_attn = LinearizedLlamaAttention(config, layer_idx)


class LinearizedLlamaPreTrainedModel(MixerModelMixin, LlamaPreTrainedModel):
    config: LinearizedLlamaConfig
    config_class = LinearizedLlamaConfig
    _no_split_modules = ["LinearizedLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": LinearizedLlamaDecoderLayer, "attentions": LlamaAttention}


class LinearizedLlamaModel(LinearizedLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config: LinearizedLlamaConfig):
        super().__init__(config)
        layers = [LinearizedLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = real_positions(attention_mask, hidden_states.shape[1], past, hidden_states.device)
        causal_mask, padding_mask = layer_masks(self, hidden_states, attention_mask, position_ids, past_key_values)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                padding_mask=padding_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class LinearizedLlamaForCausalLM(LinearizedLlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: LinearizedLlamaConfig):
        super().__init__(config)
        self.model = LinearizedLlamaModel(config)
        self.post_init()
