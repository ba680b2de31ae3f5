"""Tiny random models, made on the spot."""

import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "linearize":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
"""Goes before a script that must run where linearize is not installed."""

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


TINY_GPT2 = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


TINY_GPTJ = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 96,
    "rotary_dim": 6,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


TINY_BERT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make_teacher(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random Llama whose attention is sharp enough for the branches to matter."""
    torch.manual_seed(seed)
    return sharpened(LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})))


def make_mistral(seed: int = 0, **changes) -> MistralForCausalLM:
    """A random Mistral alike, with a sliding window that the tests' texts outgrow."""
    torch.manual_seed(seed)
    return sharpened(MistralForCausalLM(MistralConfig(**{**TINY, "sliding_window": 7, **changes})))


def make_gpt2(seed: int = 0, **changes) -> GPT2LMHeadModel:
    """A random GPT-2 alike, with biases that matter."""
    torch.manual_seed(seed)
    return with_biases(sharpened(GPT2LMHeadModel(GPT2Config(**{**TINY_GPT2, **changes}))))


def make_gptj(seed: int = 0, **changes) -> GPTJForCausalLM:
    """A random GPT-J alike, a part of each head rotated."""
    torch.manual_seed(seed)
    return with_biases(sharpened(GPTJForCausalLM(GPTJConfig(**{**TINY_GPTJ, **changes}))))


def make_bert(seed: int = 0, kind: type[PreTrainedModel] = BertModel, **changes) -> PreTrainedModel:
    """A random BERT with any of its heads, alike."""
    torch.manual_seed(seed)
    return with_biases(sharpened(kind(BertConfig(**{**TINY_BERT, **changes}))))


def with_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
    return model


def sharpened(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def make_student(teacher: PreTrainedModel, mixers: dict | None = None, mixer_types: list[str] | None = None):
    """The student of a teacher in memory, with its weights."""
    from linearize.modeling import backbone_of

    backbone = backbone_of(teacher.config)
    fields = teacher.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        fields.pop(name, None)
    config = backbone.config(**fields, mixers=mixers, mixer_types=mixer_types)
    student = backbone.model([type(teacher).__name__])(config).eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


def perturb(model, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
