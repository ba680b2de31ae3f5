"""Mistral whose attention layers may be any mechanism of the registry; stock checkpoints load by name.

A Llama but for its sliding window, which softmax layers and the teacher arm have as the stock model has it.
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoModel, MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    MistralPreTrainedModel,
)

from .backbone import MixerModelMixin, RotaryAttention, RotaryModel
from .configuration import MixerConfigMixin


@strict
class LinearizedMistralConfig(MixerConfigMixin, MistralConfig):
    """A Mistral config that names the attention of every layer; `sliding_window` is its softmax layers' alone."""

    model_type = "linearized_mistral"
    mixer_types: list[str] | None = None
    mixers: dict | None = None

    def __post_init__(self, **kwargs):
        if self.sliding_window is not None and self.sliding_window < 2:  # the stock cache of 1 token keeps all
            raise ValueError(
                f"sliding_window is {self.sliding_window}, but it must be at least 2 tokens, or null for none"
            )
        self.prepare_mixers()
        super().__post_init__(**kwargs)

    @property
    def softmax_window(self) -> int | None:
        return self.sliding_window


class LinearizedMistralAttention(RotaryAttention, MistralAttention):
    pass


class LinearizedMistralDecoderLayer(MistralDecoderLayer):
    def __init__(self, config: LinearizedMistralConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.mixer(layer_idx) is not None:
            self.self_attn = LinearizedMistralAttention(config, layer_idx)


class LinearizedMistralPreTrainedModel(MixerModelMixin, MistralPreTrainedModel):
    config: LinearizedMistralConfig
    config_class = LinearizedMistralConfig
    auto_classes = {
        "AutoModel": "LinearizedMistralModel",
        "AutoModelForCausalLM": "LinearizedMistralForCausalLM",
        "AutoModelForSequenceClassification": "LinearizedMistralForSequenceClassification",
        "AutoModelForTokenClassification": "LinearizedMistralForTokenClassification",
        "AutoModelForQuestionAnswering": "LinearizedMistralForQuestionAnswering",
    }
    _no_split_modules = ["LinearizedMistralDecoderLayer"]
    _can_record_outputs = {"hidden_states": LinearizedMistralDecoderLayer, "attentions": MistralAttention}


class LinearizedMistralModel(RotaryModel, LinearizedMistralPreTrainedModel, MistralModel):
    layer_class = LinearizedMistralDecoderLayer


class LinearizedMistralForCausalLM(LinearizedMistralPreTrainedModel, MistralForCausalLM):
    def __init__(self, config: LinearizedMistralConfig):
        super().__init__(config)
        self.model = LinearizedMistralModel(config)
        self.post_init()


# The stock heads take their base model from AutoModel.
AutoModel.register(LinearizedMistralConfig, LinearizedMistralModel, exist_ok=True)


class LinearizedMistralForSequenceClassification(LinearizedMistralPreTrainedModel, MistralForSequenceClassification):
    pass


class LinearizedMistralForTokenClassification(LinearizedMistralPreTrainedModel, MistralForTokenClassification):
    pass


class LinearizedMistralForQuestionAnswering(LinearizedMistralPreTrainedModel, MistralForQuestionAnswering):
    pass
