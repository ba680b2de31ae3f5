"""Turn pretrained softmax transformers into models with cheap attention.

Importing this package registers the converted models with the Auto classes; the pipeline loads on first use. The
command line registers them when a command starts (`linearize.cli.app.main`), so that its help is there at once.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

from linearize.errors import UserError


def _is_command_line() -> bool:
    """Whether this process is `linearize ...` or `python -m linearize ...`, whose help needs no models."""
    started = os.path.basename(sys.argv[0]) if sys.argv else ""
    if started == "-m":  # as long as Python looks for the module
        started = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv[:-1] else ""
    return started in ("linearize", "linearize.exe")


if TYPE_CHECKING or not _is_command_line():
    from linearize.modeling import (
        CosineAttention,
        CosineAttentionConfig,
        CosineState,
        FeatureMapWeights,
        GainCell,
        GainCellAttention,
        GainCellAttentionConfig,
        GainCellNoise,
        GainCellState,
        HybridLinearState,
        LandmarkAttention,
        LandmarkAttentionConfig,
        LandmarkBlocks,
        LinearAttention,
        LinearAttentionConfig,
        LinearizedBertConfig,
        LinearizedBertForMaskedLM,
        LinearizedBertForQuestionAnswering,
        LinearizedBertForSequenceClassification,
        LinearizedBertForTokenClassification,
        LinearizedBertModel,
        LinearizedGPT2Config,
        LinearizedGPT2ForCausalLM,
        LinearizedGPT2ForQuestionAnswering,
        LinearizedGPT2ForSequenceClassification,
        LinearizedGPT2ForTokenClassification,
        LinearizedGPT2Model,
        LinearizedGPTJConfig,
        LinearizedGPTJForCausalLM,
        LinearizedGPTJForQuestionAnswering,
        LinearizedGPTJForSequenceClassification,
        LinearizedGPTJModel,
        LinearizedLlamaConfig,
        LinearizedLlamaForCausalLM,
        LinearizedLlamaForQuestionAnswering,
        LinearizedLlamaForSequenceClassification,
        LinearizedLlamaForTokenClassification,
        LinearizedLlamaModel,
        LinearizedMistralConfig,
        LinearizedMistralForCausalLM,
        LinearizedMistralForQuestionAnswering,
        LinearizedMistralForSequenceClassification,
        LinearizedMistralForTokenClassification,
        LinearizedMistralModel,
        SalientAttention,
        SalientAttentionConfig,
        SalientState,
        cosine_attention,
        gain_cell_attention,
        hybrid_linear_attention,
        landmark_attention,
        landmark_retrieval_attention,
        salient_attention,
    )

if TYPE_CHECKING:
    from linearize.conversion.students import convert, load_student, load_tokenizer
    from linearize.evaluation import evaluate
    from linearize.hub.diff.difference import make_diff, recover
    from linearize.hub.repository import push
    from linearize.runs.engine import run
    from linearize.runs.glue import run_glue
    from linearize.stages.finetuning import finetune
    from linearize.stages.transfer import transfer_attention

__version__ = "0.1.0"

_PIPELINE = {
    "convert": "conversion.students",
    "load_student": "conversion.students",
    "load_tokenizer": "conversion.students",
    "transfer_attention": "stages.transfer",
    "finetune": "stages.finetuning",
    "evaluate": "evaluation",
    "push": "hub.repository",
    "run": "runs.engine",
    "run_glue": "runs.glue",
    "make_diff": "hub.diff.difference",
    "recover": "hub.diff.difference",
}


_RUNS = ("pretrain", "run_encoder", "run_gain_cell", "run_landmark")
"""What `run` was called, by the kind of run, before runs were lists of stages."""


def __getattr__(name: str):
    if name in _RUNS:
        name = "run"
    if name in __all__:
        return getattr(importlib.import_module(f"linearize.{_PIPELINE.get(name, 'modeling')}"), name)
    raise AttributeError(f"module 'linearize' has no attribute {name!r}")


__all__ = [
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
    "SalientAttention",
    "SalientAttentionConfig",
    "SalientState",
    "UserError",
    "convert",
    "cosine_attention",
    "evaluate",
    "finetune",
    "gain_cell_attention",
    "hybrid_linear_attention",
    "landmark_attention",
    "landmark_retrieval_attention",
    "load_student",
    "load_tokenizer",
    "make_diff",
    "push",
    "recover",
    "run",
    "run_glue",
    "salient_attention",
    "transfer_attention",
]
