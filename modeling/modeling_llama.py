"""Llama whose attention layers may be any mechanism of the registry; stock checkpoints load by name."""

from huggingface_hub.dataclasses import strict
from transformers import AutoModel, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    LlamaPreTrainedModel,
)

from .backbone import MixerModelMixin, RotaryAttention, RotaryModel
from .configuration import MixerConfigMixin


@strict
class LinearizedLlamaConfig(MixerConfigMixin, LlamaConfig):
    """A Llama config that names the attention of every layer."""

    model_type = "linearized_llama"
    mixer_types: list[str] | None = None
    mixers: dict | None = None

    def __post_init__(self, **kwargs):
        self.prepare_mixers()
        super().__post_init__(**kwargs)


class LinearizedLlamaAttention(RotaryAttention, LlamaAttention):
    pass


class LinearizedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: LinearizedLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.mixer(layer_idx) is not None:
            self.self_attn = LinearizedLlamaAttention(config, layer_idx)


class LinearizedLlamaPreTrainedModel(MixerModelMixin, LlamaPreTrainedModel):
    config: LinearizedLlamaConfig
    config_class = LinearizedLlamaConfig
    auto_classes = {
        "AutoModel": "LinearizedLlamaModel",
        "AutoModelForCausalLM": "LinearizedLlamaForCausalLM",
        "AutoModelForSequenceClassification": "LinearizedLlamaForSequenceClassification",
        "AutoModelForTokenClassification": "LinearizedLlamaForTokenClassification",
        "AutoModelForQuestionAnswering": "LinearizedLlamaForQuestionAnswering",
    }
    _no_split_modules = ["LinearizedLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": LinearizedLlamaDecoderLayer, "attentions": LlamaAttention}


class LinearizedLlamaModel(RotaryModel, LinearizedLlamaPreTrainedModel, LlamaModel):
    layer_class = LinearizedLlamaDecoderLayer


class LinearizedLlamaForCausalLM(LinearizedLlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: LinearizedLlamaConfig):
        super().__init__(config)
        self.model = LinearizedLlamaModel(config)
        self.post_init()


# The stock heads take their base model from AutoModel.
AutoModel.register(LinearizedLlamaConfig, LinearizedLlamaModel, exist_ok=True)


class LinearizedLlamaForSequenceClassification(LinearizedLlamaPreTrainedModel, LlamaForSequenceClassification):
    pass


class LinearizedLlamaForTokenClassification(LinearizedLlamaPreTrainedModel, LlamaForTokenClassification):
    pass


class LinearizedLlamaForQuestionAnswering(LinearizedLlamaPreTrainedModel, LlamaForQuestionAnswering):
    base_model_prefix = "model"  # that of every other head, whose checkpoints load here
