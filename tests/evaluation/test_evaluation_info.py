"""State bytes from the config alone are the real cache's bytes; `info` describes a directory without its weights."""

import json

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from linearize.errors import UserError
from linearize.evaluation import info, state_bytes
from linearize.modeling import LinearizedLlamaConfig, LinearizedLlamaForCausalLM
from linearize.tables import format_bytes, format_number, ranges

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}


def make_student(mixer_types, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    mixers = {"near": {"type": "linear", "window": 16, **settings}, "far": {"type": "linear", "window": 0, "sinks": 0}}
    used = {name: mixers[name] for name in mixers if name in mixer_types}
    config = LinearizedLlamaConfig(**SHAPE, mixer_types=mixer_types, mixers=used, dtype=dtype)
    return LinearizedLlamaForCausalLM(config).to(dtype).eval()


def cache_bytes(model, tokens):
    """Run a prompt in pieces and add up what the cache holds."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(61, (1, tokens))
    with torch.no_grad():
        for piece in ids.split(4096, dim=1):
            model.model(piece, past_key_values=cache, use_cache=True)
    return sum(
        layer.nbytes() if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )


@pytest.mark.parametrize("settings", [{}, {"share_key_map": True, "feature_map": "relu", "feature_dim": 5}])
def test_bytes_are_the_real_caches_and_constant(settings):
    model = make_student(["near", "far", "near"], **settings)
    short, long = state_bytes(model.config, (1024, 16384))
    assert short.student == long.student == cache_bytes(model, 1024) == cache_bytes(model, 16384)
    assert long.teacher == 16 * short.teacher == 3 * 16384 * 2 * 2 * 8 * 4


def test_bytes_of_a_hybrid_in_bfloat16():
    model = make_student(["near", "softmax", "near"], dtype=torch.bfloat16)
    (figures,) = state_bytes(model.config, (1024,))
    assert figures.student == cache_bytes(model, 1024)


def test_info_of_a_directory(tmp_path):
    model = make_student(["near", "softmax", "far"])
    model.save_pretrained(tmp_path)
    (tmp_path / "linearize.json").write_text(json.dumps({"teacher": "someone/tiny"}))
    found = info(tmp_path)
    mixers = model.mixer_state_dict()
    assert found.mixer_parameters == sum(tensor.numel() for tensor in mixers.values())
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (found.teacher, found.layers, set(found.mechanisms)) == (
        "someone/tiny",
        ["near", "softmax", "far"],
        {"near", "far"},
    )
    assert found.mechanisms["near"]["window"] == 16
    assert sum(found.layer_state.values()) == found.state[0].student
    text = found.markdown()
    assert "window=16" in text and "1,024" in text and "32,768" in text and "the teacher's attention" in text
    assert json.loads(json.dumps(found.to_dict()))["state"][0]["tokens"] == 1024
    found.show()


def test_info_needs_no_weights(tmp_path):
    make_student(["near", "near", "far"]).config.save_pretrained(tmp_path)
    assert info(tmp_path).parameters is None


def test_info_refuses_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no converted model"):
        info(tmp_path)
    with pytest.raises(UserError, match="no directory"):
        info(tmp_path / "nowhere")
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no converted model"):
        info(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        info(tmp_path)


def test_info_names_a_broken_weight_file(tmp_path):
    make_student(["near", "near", "far"]).config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(UserError, match="model.safetensors"):
        info(tmp_path)


def test_formats():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert [format_bytes(n) for n in (12, 1536, 200 * 2**20, 5 * 2**40)] == ["12 B", "1.5 KiB", "200 MiB", "5120 GiB"]
    assert [format_number(x) for x in (None, 0.5, 23.456, 1234.5, 12345678.0)] == [
        "-",
        "0.500",
        "23.46",
        "1234",
        "1.235e+07",
    ]
