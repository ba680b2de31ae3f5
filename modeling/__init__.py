"""Converted models. Everything here but this file ships inside every converted repository."""

import sys
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .attention_cosine import CosineAttention, CosineAttentionConfig
from .attention_gain_cell import GainCellAttention, GainCellAttentionConfig
from .attention_landmark import LandmarkAttention, LandmarkAttentionConfig
from .attention_linear import LinearAttention, LinearAttentionConfig
from .attention_salient import SalientAttention, SalientAttentionConfig
from .modeling_bert import (
    LinearizedBertConfig,
    LinearizedBertForMaskedLM,
    LinearizedBertForQuestionAnswering,
    LinearizedBertForSequenceClassification,
    LinearizedBertForTokenClassification,
    LinearizedBertModel,
)
from .modeling_gpt2 import (
    LinearizedGPT2Config,
    LinearizedGPT2ForCausalLM,
    LinearizedGPT2ForQuestionAnswering,
    LinearizedGPT2ForSequenceClassification,
    LinearizedGPT2ForTokenClassification,
    LinearizedGPT2Model,
)
from .modeling_gptj import (
    LinearizedGPTJConfig,
    LinearizedGPTJForCausalLM,
    LinearizedGPTJForQuestionAnswering,
    LinearizedGPTJForSequenceClassification,
    LinearizedGPTJModel,
)
from .modeling_llama import (
    LinearizedLlamaConfig,
    LinearizedLlamaForCausalLM,
    LinearizedLlamaForQuestionAnswering,
    LinearizedLlamaForSequenceClassification,
    LinearizedLlamaForTokenClassification,
    LinearizedLlamaModel,
)
from .modeling_mistral import (
    LinearizedMistralConfig,
    LinearizedMistralForCausalLM,
    LinearizedMistralForQuestionAnswering,
    LinearizedMistralForSequenceClassification,
    LinearizedMistralForTokenClassification,
    LinearizedMistralModel,
)
from .op_cosine import CosineState, cosine_attention
from .op_gain_cell import GainCell, GainCellNoise, GainCellState, gain_cell_attention
from .op_hybrid_linear import FeatureMapWeights, HybridLinearState, hybrid_linear_attention
from .op_landmark import LandmarkBlocks, landmark_attention, landmark_retrieval_attention
from .op_salient import SalientState, salient_attention
from .peft_targets import PREFIX
from .registry import ATTENTIONS


@dataclass(frozen=True)
class Backbone:
    """The student of a stock `model_type`: its config, and the classes of its file.

    default is the student of a checkpoint whose class has none of its own. lora_targets are the names of its
    attention's projections, which stage 2 adapts where nothing else is asked for. encoder: it sees a text both ways,
    and generates none.
    """

    config: type[PreTrainedConfig]
    default: Any
    lora_targets: tuple[str, ...]
    encoder: bool = False

    @property
    def models(self) -> dict[Any, type[PreTrainedModel]]:
        """The class that each Auto class loads."""
        home, names = sys.modules[self.default.__module__], self.default.auto_classes
        return {getattr(transformers, auto): getattr(home, name) for auto, name in names.items()}

    def auto_class(self, architectures: list[str] | None) -> Any:
        """The Auto class of a checkpoint, stock or converted, from its config's `architectures`."""
        names = [f"Linearized{name.removeprefix('Linearized')}" for name in architectures or ()]
        names = [SAME_STUDENT.get(name, name) for name in names]
        known = {model.__name__: auto_class for auto_class, model in self.models.items()}
        return next((known[name] for name in names if name in known), known[self.default.__name__])

    def model(self, architectures: list[str] | None) -> type[PreTrainedModel]:
        """The student's class of a checkpoint, stock or converted."""
        return self.models[self.auto_class(architectures)]


SAME_STUDENT = {"LinearizedBertForPreTraining": "LinearizedBertForMaskedLM"}
"""A stock class with two heads -> the student that has one of them."""
ROTARY_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
BACKBONES = {
    "llama": Backbone(LinearizedLlamaConfig, LinearizedLlamaForCausalLM, ROTARY_TARGETS),
    "mistral": Backbone(LinearizedMistralConfig, LinearizedMistralForCausalLM, ROTARY_TARGETS),
    "gpt2": Backbone(LinearizedGPT2Config, LinearizedGPT2ForCausalLM, ("c_attn", "c_proj")),
    "gptj": Backbone(LinearizedGPTJConfig, LinearizedGPTJForCausalLM, ("q_proj", "k_proj", "v_proj", "out_proj")),
    "bert": Backbone(LinearizedBertConfig, LinearizedBertModel, ("query", "key", "value"), encoder=True),
}


def backbone_of(config: PreTrainedConfig) -> Backbone:
    """The backbone of a teacher's or a student's config.

    Raises:
        KeyError: there is none.
    """
    return BACKBONES[config.model_type.removeprefix(PREFIX)]


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a teacher's or a student's config is that of an encoder; False where there is no backbone for it."""
    backbone = BACKBONES.get(config.model_type.removeprefix(PREFIX))
    return backbone is not None and backbone.encoder


def register() -> None:
    """Tell the Auto classes about the students, and students to take their code along when saved."""
    for backbone in BACKBONES.values():
        AutoConfig.register(backbone.config.model_type, backbone.config, exist_ok=True)
        backbone.config.register_for_auto_class()
        for auto_class, model_class in backbone.models.items():
            auto_class.register(backbone.config, model_class, exist_ok=True)
            model_class.register_for_auto_class(auto_class.__name__)


register()

__all__ = [
    "ATTENTIONS",
    "BACKBONES",
    "PREFIX",
    "CosineAttention",
    "CosineAttentionConfig",
    "CosineState",
    "FeatureMapWeights",
    "GainCell",
    "GainCellAttention",
    "GainCellAttentionConfig",
    "GainCellNoise",
    "GainCellState",
    "HybridLinearState",
    "LandmarkAttention",
    "LandmarkAttentionConfig",
    "LandmarkBlocks",
    "LinearAttention",
    "LinearAttentionConfig",
    "LinearizedBertConfig",
    "LinearizedBertForMaskedLM",
    "LinearizedBertForQuestionAnswering",
    "LinearizedBertForSequenceClassification",
    "LinearizedBertForTokenClassification",
    "LinearizedBertModel",
    "LinearizedGPT2Config",
    "LinearizedGPT2ForCausalLM",
    "LinearizedGPT2ForQuestionAnswering",
    "LinearizedGPT2ForSequenceClassification",
    "LinearizedGPT2ForTokenClassification",
    "LinearizedGPT2Model",
    "LinearizedGPTJConfig",
    "LinearizedGPTJForCausalLM",
    "LinearizedGPTJForQuestionAnswering",
    "LinearizedGPTJForSequenceClassification",
    "LinearizedGPTJModel",
    "LinearizedLlamaConfig",
    "LinearizedLlamaForCausalLM",
    "LinearizedLlamaForQuestionAnswering",
    "LinearizedLlamaForSequenceClassification",
    "LinearizedLlamaForTokenClassification",
    "LinearizedLlamaModel",
    "LinearizedMistralConfig",
    "LinearizedMistralForCausalLM",
    "LinearizedMistralForQuestionAnswering",
    "LinearizedMistralForSequenceClassification",
    "LinearizedMistralForTokenClassification",
    "LinearizedMistralModel",
    "backbone_of",
    "SalientAttention",
    "SalientAttentionConfig",
    "SalientState",
    "cosine_attention",
    "salient_attention",
    "gain_cell_attention",
    "hybrid_linear_attention",
    "is_encoder",
    "landmark_attention",
    "landmark_retrieval_attention",
]
