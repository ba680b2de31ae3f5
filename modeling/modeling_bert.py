"""BERT whose attention layers may be any mechanism of the registry that looks both ways; stock checkpoints load by
name.

An encoder keeps no cache: every forward sees the whole text. Positions count padding, as the stock model's do.
"""

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import BertConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLayer,
    BertModel,
    BertPreTrainedModel,
    BertSelfAttention,
    eager_attention_forward,
)
from transformers.utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .backbone import MixerAttention, MixerModelMixin
from .base_forward import entry_per_layer
from .configuration import MixerConfigMixin
from .model_call import mixer_padding, softmax_layers

NO_CACHE = (
    "a converted BERT is an encoder, which has no cache and no cross-attention: leave out use_cache, past_key_values "
    "and encoder_hidden_states"
)


@strict
class LinearizedBertConfig(MixerConfigMixin, BertConfig):
    """A BERT config that names the attention of every layer."""

    model_type = "linearized_bert"
    learned_positions = True
    mixer_types: list[str] | None = None
    mixers: dict | None = None

    def __post_init__(self, **kwargs):
        if self.is_decoder or self.add_cross_attention:
            raise ValueError(
                "a converted BERT is an encoder: convert a checkpoint whose is_decoder and add_cross_attention are "
                "false in config.json"
            )
        self.prepare_mixers()
        self.require_bidirectional()
        self.use_cache = False  # true in every stock config, encoders included
        super().__post_init__(**kwargs)


class LinearizedBertSelfAttention(MixerAttention, BertSelfAttention):
    causal = False

    def __init__(self, config: LinearizedBertConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.head_dim, self.attention_dropout = self.attention_head_size, config.attention_probs_dropout_prob
        self.add_mixer(config, config.num_attention_heads, config.num_attention_heads)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, padding_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2) for projection in (self.query, self.key, self.value)
        )
        output = self.attend(query, key, value, attention_mask, padding_mask, None, eager_attention_forward, **kwargs)
        return output.reshape(*hidden_states.shape[:-1], -1).contiguous(), None


class LinearizedBertLayer(BertLayer):
    def __init__(self, config: LinearizedBertConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.mixer(layer_idx) is not None:
            self.attention.self = LinearizedBertSelfAttention(config, layer_idx)


class LinearizedBertPreTrainedModel(MixerModelMixin, BertPreTrainedModel):
    config: LinearizedBertConfig
    config_class = LinearizedBertConfig
    auto_classes = {
        "AutoModel": "LinearizedBertModel",
        "AutoModelForMaskedLM": "LinearizedBertForMaskedLM",
        "AutoModelForSequenceClassification": "LinearizedBertForSequenceClassification",
        "AutoModelForTokenClassification": "LinearizedBertForTokenClassification",
        "AutoModelForQuestionAnswering": "LinearizedBertForQuestionAnswering",
    }
    layers_path, attention_path = "encoder.layer", "attention.self"
    too_long = "shorten the text, or truncate it in the tokenizer"
    _is_stateful = False
    _no_split_modules = ["BertEmbeddings", "LinearizedBertLayer"]
    _can_record_outputs = {"hidden_states": LinearizedBertLayer, "attentions": BertSelfAttention}

    def captured_decoding(self, compile: bool = False):
        raise ValueError(NO_CACHE)


class LinearizedBertModel(LinearizedBertPreTrainedModel, BertModel):
    optional_weights = ("pooler.",)  # of checkpoints that were saved under a head without one
    # Heads of checkpoints that were saved with one.
    _keys_to_ignore_on_load_unexpected = [r"^cls\.", r"^classifier\.", r"^qa_outputs\."]

    def __init__(self, config: LinearizedBertConfig, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        layers = [LinearizedBertLayer(config, i) for i in range(config.num_hidden_layers)]
        self.encoder.layer = nn.ModuleList(layers)
        self.post_init()

    @entry_per_layer
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if use_cache or past_key_values is not None or encoder_hidden_states is not None:
            raise ValueError(NO_CACHE)
        self._check_length(input_ids if inputs_embeds is None else inputs_embeds, position_ids)
        hidden_states = self.embeddings(
            input_ids=input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
        )
        padding_mask = mixer_padding(attention_mask, hidden_states)
        softmax_mask = None
        if softmax_layers(self):
            softmax_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        hidden_states = self.encoder(
            hidden_states,
            attention_mask=softmax_mask,
            padding_mask=padding_mask,
            position_ids=position_ids,
            **kwargs,
        ).last_hidden_state
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states,
            pooler_output=None if self.pooler is None else self.pooler(hidden_states),
        )

    def _check_length(self, inputs: Tensor, position_ids: Tensor | None) -> None:
        """Positions that were given are looked at on a CPU only: on a GPU that would stop the host."""
        if position_ids is None:
            self.check_positions(inputs.shape[1])
        elif position_ids.device.type == "cpu" and not is_tracing():
            self.check_positions(int(position_ids.max()) + 1)


class LinearizedBertForMaskedLM(LinearizedBertPreTrainedModel, BertForMaskedLM):
    # Of pretraining checkpoints: the next-sentence head, and the pooler that it reads.
    _keys_to_ignore_on_load_unexpected = [r"^cls\.seq_relationship\.", r"^bert\.pooler\."]

    def __init__(self, config: LinearizedBertConfig):
        super().__init__(config)
        self.bert = LinearizedBertModel(config, add_pooling_layer=False)
        self.post_init()


class LinearizedBertForSequenceClassification(LinearizedBertPreTrainedModel, BertForSequenceClassification):
    def __init__(self, config: LinearizedBertConfig):
        super().__init__(config)
        self.bert = LinearizedBertModel(config)
        self.post_init()


class LinearizedBertForTokenClassification(LinearizedBertPreTrainedModel, BertForTokenClassification):
    _keys_to_ignore_on_load_unexpected = [r"^bert\.pooler\."]

    def __init__(self, config: LinearizedBertConfig):
        super().__init__(config)
        self.bert = LinearizedBertModel(config, add_pooling_layer=False)
        self.post_init()


class LinearizedBertForQuestionAnswering(LinearizedBertPreTrainedModel, BertForQuestionAnswering):
    _keys_to_ignore_on_load_unexpected = [r"^bert\.pooler\."]

    def __init__(self, config: LinearizedBertConfig):
        super().__init__(config)
        self.bert = LinearizedBertModel(config, add_pooling_layer=False)
        self.post_init()
