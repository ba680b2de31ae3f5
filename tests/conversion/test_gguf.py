"""GGUF teachers: what the file says about the model is carried exactly, or the file is refused by name."""

import gguf
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from linearize.conversion.students import convert, load_config
from linearize.errors import UserError

LAYERS, HEADS, WIDTH, CONTEXT = 2, 2, 32, 128
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=3,
        eos_token_id=4,
        pad_token_id=5,
        **changes,
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    return model


def tensors_of(model):
    """The names and the layout that llama.cpp's converter writes."""
    for name, weight in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        if stem == "lm_head" and model.config.tie_word_embeddings:
            continue
        array = weight.numpy()
        for part, heads in ("q_proj", HEADS), ("k_proj", 1):
            if stem.endswith(part):
                array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if ".c_" in stem and array.ndim == 2:
            array = array.T
        if stem in OUTER:
            yield f"{OUTER[stem]}.{suffix}", array
        else:
            _, _, layer, part = stem.split(".", 3)
            yield f"blk.{layer}.{NAMES[part]}.{suffix}", array


def write(path, model, arch="llama", keys=None, tensors=None, without=()):
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name("pebble")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_vocab_size(40)
    if arch == "llama":
        writer.add_feed_forward_length(48)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_dimension_count(WIDTH // HEADS)
    else:
        writer.add_feed_forward_length(80)
        writer.add_layer_norm_eps(1e-5)
    for name, value in {"bos": 3, "eos": 4, "padding": 5}.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    for key, value in (keys or {}).items():
        kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds[type(value)](f"{arch}.{key}", value)
    for name, array in {**dict(tensors_of(model)), **(tensors or {})}.items():
        if name not in without:
            writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def factors(**changes):
    """`rope_freqs.weight` as the converter makes it of a Llama-3 config."""
    config = LlamaConfig(rope_parameters={"rope_theta": 10000.0, **LLAMA3, **changes}, head_dim=WIDTH // HEADS)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = ROPE_INIT_FUNCTIONS["llama3"](config)[0]
    plain = 10000.0 ** (-torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
    return (plain / scaled).numpy()


SCALINGS = {
    "none": (None, {}, {}),
    "stated to be none": (None, {"rope.scaling.type": "none", "rope.scaling.finetuned": False}, {}),
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "linear of old files": ({"rope_type": "linear", "factor": 2.0}, {"rope.scale_linear": 2.0}, {}),
    "yarn": (
        YARN,
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_ext_factor": 1.0,
        },
        {},
    ),
    "yarn with its own betas": (
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
        },
        {},
    ),
    "llama3": (LLAMA3, {}, {"rope_freqs.weight": factors()}),
    "llama3 of another band": (
        {**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 32.0, "original_max_position_embeddings": 64},
        {"rope.scaling.original_context_length": 64},
        {
            "rope_freqs.weight": factors(
                low_freq_factor=0.5, high_freq_factor=32.0, original_max_position_embeddings=64
            )
        },
    ),
    "factors of one": (None, {}, {"rope_freqs.weight": np.ones(WIDTH // HEADS // 2)}),
}


@pytest.mark.parametrize("case", SCALINGS)
@torch.no_grad()
def test_rotary_scaling_is_carried_exactly(tmp_path, case):
    rope, keys, tensors = SCALINGS[case]
    stock = llama(rope_parameters={"rope_theta": 10000.0, **(rope or {"rope_type": "default"})})
    path = write(tmp_path / "x.gguf", stock, keys=keys, tensors=tensors)
    student = convert(path, softmax_layers=range(LAYERS), dtype=torch.float32)
    read = dict(student.config.rope_parameters)
    assert read == {"rope_theta": 10000.0, **(rope or {"rope_type": "default"})}
    ids = torch.arange(100)[None] % 40
    assert torch.equal(student(ids).logits, stock(ids).logits)
    assert (student.config.bos_token_id, student.config.eos_token_id, student.config.pad_token_id) == (3, 4, 5)


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}, {"tied": True}],
)
@torch.no_grad()
def test_biases_and_a_tied_head_are_carried_exactly(tmp_path, changes):
    changes = {"tie_word_embeddings" if name == "tied" else name: value for name, value in changes.items()}
    stock = llama(**changes)
    student = convert(write(tmp_path / "x.gguf", stock), softmax_layers=range(LAYERS), dtype=torch.float32)
    ids = torch.arange(50)[None] % 40
    assert torch.equal(student(ids).logits, stock(ids).logits)


@torch.no_grad()
def test_gpt2_has_its_context_and_its_inner_width(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT, n_inner=80)
    stock = GPT2LMHeadModel(config).eval()
    for name, weight in stock.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    student = convert(write(tmp_path / "x.gguf", stock, "gpt2"), softmax_layers=range(LAYERS), dtype=torch.float32)
    ids = torch.arange(CONTEXT)[None] % 40
    assert student.config.n_positions == CONTEXT
    assert torch.equal(student(ids).logits, stock(ids).logits)


@pytest.mark.parametrize(
    ("keys", "tensors", "named"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, {}, "longrope"),
        ({"rope.scaling.type": "yarn"}, {}, "yarn"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.5},
            {},
            "rope.scaling.attn_factor",
        ),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 8.0},
            {},
            "yarn_beta_fast",
        ),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_freqs.weight": factors()},
            "rope_freqs.weight",
        ),
        ({}, {"rope_freqs.weight": np.linspace(1, 9, WIDTH // HEADS // 2)}, "rope_freqs.weight"),
        ({"attention.sliding_window": 64}, {}, "attention.sliding_window"),
        ({"attention.key_length": 8}, {}, "attention.key_length"),
        ({"expert_count": 8}, {}, "expert_count"),
        ({"logit_scale": 0.25}, {}, "logit_scale"),
        ({"something_new": "deep"}, {}, "something_new"),
        ({}, {"blk.1.attn_q_norm.weight": np.ones(16)}, "blk.1.attn_q_norm.weight"),
        ({}, {"blk.0.attn_q.bias": np.ones(WIDTH)}, "blk.0.attn_q.bias"),
        ({}, {"rope_factors_long.weight": np.ones(8)}, "rope_factors_long.weight"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(tmp_path, keys, tensors, named):
    path = write(tmp_path / "x.gguf", llama(), keys=keys, tensors=tensors)
    with pytest.raises(UserError, match="cannot be carried exactly") as refusal:
        load_config(path)
    assert named in str(refusal.value) and "x.gguf" in str(refusal.value)


def test_keys_that_say_what_is_true_anyway_are_taken(tmp_path):
    keys = {"attention.key_length": 16, "attention.value_length": 16, "expert_count": 0, "attention.causal": True}
    assert load_config(write(tmp_path / "x.gguf", llama(), keys=keys)).head_dim == 16


def test_a_file_without_a_tensor_is_refused(tmp_path):
    path = write(tmp_path / "x.gguf", llama(), without=["blk.1.ffn_up.weight"])
    with pytest.raises(UserError, match="lacks the tensor blk.1.ffn_up.weight"):
        load_config(path)


def test_an_architecture_that_llama_cpp_has_not_is_refused(tmp_path):
    stock = llama()
    with pytest.raises(UserError, match="its architecture is mistral"):
        load_config(write(tmp_path / "x.gguf", stock, "mistral"))
