"""The Llama student: every shape of a Llama, the settings, and what a mixer is given.

What every student owes is in test_students.py.
"""

import pytest
import torch
from tiny_models import TINY, make_student, make_teacher, perturb
from transformers import AutoModelForCausalLM, DynamicCache


@pytest.fixture
def ids():
    return torch.randint(3, TINY["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(3))


def close(left, right):
    return (left - right).abs().max() <= 1e-5


@torch.no_grad()
def test_padding_may_hold_nan_before_the_mixer(teacher):
    """NaN hidden states at padded places reach the attention of a mixer layer and stay there; test_gates.py has what
    a gate reads."""
    student = make_student(teacher, {"linear": {"type": "linear", "map_input": "rotated", "gate": "none"}})
    attention = student.mixer_attentions()[0]
    query, key, value = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    expected = attention.mixer(query[:1, :, 3:], key[:1, :, 3:], value[:1, :, 3:])
    gap = ~mask[:, None, :, None]
    output = attention.mixer(*(x.masked_fill(gap, torch.nan) for x in (query, key, value)), padding_mask=mask)
    assert close(output[:1, :, 3:], expected) and (output[0, :, :3] == 0).all()


@torch.no_grad()
def test_state_size_is_constant(ids):
    """Must show 6: the same bytes at 1k and at 16k tokens; and the registry's figure is the real one."""
    teacher = make_teacher(max_position_embeddings=32768, num_hidden_layers=1)
    student = make_student(teacher, {"linear": {"type": "linear", "window": 5, "sinks": 2}})
    sizes = []
    for tokens in (1024, 16384):
        cache = DynamicCache(config=student.config)
        student.model(torch.randint(3, 97, (1, tokens)), past_key_values=cache, use_cache=True)
        sizes.append(cache.layers[0].nbytes())
    from linearize.modeling import ATTENTIONS

    config = student.config
    predicted = ATTENTIONS["linear"].state_bytes(config.mixer(0), 4, 2, 16, 16384, 4)
    assert sizes == [predicted, predicted]


SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 24},
    "stock-head-dim": {"head_dim": None},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "yarn-rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_every_llama_shape_converts(shape, ids, tmp_path):
    """Through files, as users do: the teacher arm is the teacher bit for bit, and so is a long window, nearly."""
    import linearize

    teacher = make_teacher(**SHAPES[shape])
    teacher.save_pretrained(tmp_path / "teacher")
    student = linearize.convert(tmp_path / "teacher", {"type": "linear", "window": 32})
    expected = teacher(ids).logits
    with student.use_arm("teacher"):
        assert torch.equal(student(ids).logits, expected)
    assert close(student(ids).logits, expected)
    student = linearize.convert(tmp_path / "teacher", {"type": "linear", "window": 5})
    perturb(student)
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert not close(loaded(ids).logits, expected)


@torch.no_grad()
def test_observer_sees_what_both_attentions_are_given(student, teacher, ids):
    seen = []
    for attention in student.mixer_attentions():
        attention.observer = lambda *args, **context: seen.append(args)
    with student.use_arm("teacher"):
        student.model(ids, use_cache=False)
    assert [args[0].layer_idx for args in seen] == [0, 1, 2]
    attention, query, key, value, output, padding_mask = seen[0]
    assert query.shape == output.shape == (2, 4, 23, 16) and key.shape == value.shape == (2, 2, 23, 16)
    assert padding_mask is None
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert close(output, expected)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mixers": {"linear": {"type": "fourier"}}}, "unknown attention"),
        ({"mixers": {"linear": {"type": "linear", "windw": 3}}}, "windw"),
        ({"mixers": {"linear": {"type": "linear", "window": -1}}}, "window is -1"),
        ({"mixers": {"linear": {"type": "linear", "feature_dim": 0}}}, "feature_dim is 0"),
        ({"mixers": {"linear": {"type": "linear", "feature_dim": 99}}}, "wider than the head"),
        ({"mixers": {"linear": {"type": "linear", "contract": 99}}}, "contract 99"),
        ({"mixer_types": ["linear"]}, "names 1 layers"),
        ({"mixers": {"softmax": {"type": "linear"}}}, "keep their own attention"),
        ({"mixers": {"linear": {"type": "linear", "window_shift": float("nan")}}}, "window_shift is nan"),
        ({"mixer_types": ["linear", "liner", "linear"], "mixers": {"linear": {"type": "linear"}}}, "liner"),
        ({"num_key_value_heads": 3}, "do not divide"),
    ],
)
def test_bad_settings_give_a_sentence(fields, sentence):
    from linearize.modeling import LinearizedLlamaConfig

    with pytest.raises(ValueError, match=sentence):
        LinearizedLlamaConfig(**{**TINY, **fields})


def test_config_json_holds_every_setting(tmp_path):
    from linearize.modeling import LinearAttentionConfig, LinearizedLlamaConfig

    LinearizedLlamaConfig(**TINY).save_pretrained(tmp_path)
    loaded = LinearizedLlamaConfig.from_pretrained(tmp_path)
    assert set(loaded.mixers["linear"]) == set(LinearAttentionConfig.__dataclass_fields__)
    assert loaded.mixers["linear"]["feature_dim"] == TINY["head_dim"]
    assert "layer_types" not in loaded.to_diff_dict()


def test_kaiming_and_shared_maps_have_the_published_shapes():
    student = make_student(
        make_teacher(),
        {"linear": {"type": "linear", "initialization": "kaiming", "share_key_map": True, "feature_dim": 8}},
    )
    mixer = student.mixer_attentions()[0].mixer
    assert mixer.feature_map_q.weight.shape == (4, 16, 8) and mixer.feature_map_k.weight.shape == (2, 16, 8)
    bound = (6 / (16 * 8)) ** 0.5
    assert 0.9 * bound < mixer.feature_map_q.weight.abs().max() <= bound


def test_narrow_identity_keeps_whole_rotary_pairs():
    from linearize.modeling.feature_maps import identity_dimensions

    assert identity_dimensions(16, 16).tolist() == list(range(16))
    assert identity_dimensions(16, 6).tolist() == [5, 6, 7, 13, 14, 15]


def test_the_published_narrow_identity_keeps_the_first_dimensions():
    mixers = {"linear": {"type": "linear", "initialization": "identity_first", "feature_dim": 6}}
    student = make_student(make_teacher(), mixers)
    for maps in (student.mixer_attentions()[0].mixer.feature_map_q, student.mixer_attentions()[0].mixer.feature_map_k):
        assert torch.equal(maps.weight, torch.eye(16, 6).expand_as(maps.weight))
    with pytest.raises(ValueError, match="wider than the head dimension"):
        make_student(make_teacher(), {"linear": {**mixers["linear"], "feature_dim": 32}})
