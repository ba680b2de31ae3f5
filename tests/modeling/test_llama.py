"""The Llama student: equal to its teacher where it must be, and the same by every way of feeding it."""

import pytest
import torch
from tiny_models import TINY, make_student, make_teacher, perturb
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

SMALL_CELL = {"tile": 4, "leak": 0.01, "score_saturation": 4.0, "output_saturation": 4.0}
MODELS = {
    "hybrid": ({"linear": {"type": "linear", "window": 5, "sinks": 2}}, None),
    "published": (
        {
            "linear": {
                "type": "linear",
                "window": 5,
                "sinks": 0,
                "window_reference": "max",
                "window_shift": None,
                "window_weight_form": "sigmoid",
                "window_weight": 0.1,
                "magnitude": False,
            }
        },
        None,
    ),
    "pure-linear": ({"linear": {"type": "linear", "window": 0, "sinks": 0, "feature_map": "exp"}}, None),
    "sinks-only": ({"linear": {"type": "linear", "window": 0, "sinks": 3, "feature_map": "elu"}}, None),
    "shared-key-map": (
        {"linear": {"type": "linear", "window": 5, "share_key_map": True, "feature_map": "relu"}},
        None,
    ),
    "softmax-layer-between": (
        {"linear": {"type": "linear", "window": 5, "sinks": 2}},
        ["linear", "softmax", "linear"],
    ),
    "softmax-layers-around": ({"linear": {"type": "linear", "window": 5}}, ["softmax", "linear", "softmax"]),
    "two-windows": (
        {"near": {"type": "linear", "window": 3}, "far": {"type": "linear", "window": 9, "bias": True}},
        ["near", "far", "near"],
    ),
    "gain-cell": ({"gain_cell": {"type": "gain_cell", "window": 12, "cell": SMALL_CELL}}, None),
    "gain-cell-mixed": (
        {
            "gain_cell": {"type": "gain_cell", "window": 8, "cell": SMALL_CELL},
            "linear": {"type": "linear", "window": 5, "sinks": 2},
        },
        ["gain_cell", "softmax", "linear"],
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    student = make_student(make_teacher(), *MODELS[request.param])
    perturb(student)
    return student.double() if "gain-cell" in request.param else student  # levels turn rounding into whole steps


@pytest.fixture
def ids():
    return torch.randint(3, TINY["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(3))


def close(left, right):
    return (left - right).abs().max() <= 1e-5


@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(model, ids):
    full = model(ids).logits
    for cuts in ([7, 1, 12, 1, 2], [1] * 23, [22, 1]):
        cache, outputs, start = DynamicCache(config=model.config), [], 0
        for tokens in cuts:
            outputs.append(model(ids[:, start : start + tokens], past_key_values=cache, use_cache=True).logits)
            start += tokens
        assert close(torch.cat(outputs, 1), full)
        assert cache.get_seq_length() == 23


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(model, ids, side):
    full = model(ids).logits
    gap = torch.zeros(2, 4, dtype=torch.long)
    padded = torch.cat([gap, ids] if side == "left" else [ids, gap], 1)
    mask = torch.cat([gap, torch.ones_like(ids)] if side == "left" else [torch.ones_like(ids), gap], 1)
    real = slice(4, None) if side == "left" else slice(0, -4)
    assert close(model(padded, attention_mask=mask).logits[:, real], full)


@torch.no_grad()
def test_padding_may_hold_nan_before_the_mixer(model, ids):
    """NaN hidden states at padded places reach the attention of a mixer layer and stay there."""
    if "softmax" in model.config.mixer_types:
        model = make_student(make_teacher(), *MODELS["hybrid"])
    attention = model.mixer_attentions()[0]
    query, key, value = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    expected = attention.mixer(query[:1, :, 3:], key[:1, :, 3:], value[:1, :, 3:])
    gap = ~mask[:, None, :, None]
    output = attention.mixer(*(x.masked_fill(gap, torch.nan) for x in (query, key, value)), padding_mask=mask)
    assert close(output[:1, :, 3:], expected) and (output[0, :, :3] == 0).all()


@torch.no_grad()
def test_left_padded_batch_token_by_token(model, ids):
    full = model(ids).logits
    lengths = (23, 17)
    mask = torch.stack([torch.arange(23) >= 23 - n for n in lengths]).long()
    pad = [torch.zeros(23 - n, dtype=torch.long) for n in lengths]
    batch = torch.stack([torch.cat([gap, row[:n]]) for gap, row, n in zip(pad, ids, lengths, strict=True)])
    cache = DynamicCache(config=model.config)
    steps = [
        model(batch[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache, use_cache=True).logits
        for i in range(23)
    ]
    logits = torch.cat(steps, 1)
    for row, n in enumerate(lengths):
        assert close(logits[row, 23 - n :], full[row, :n])


@torch.no_grad()
def test_reset_and_a_second_prompt_on_the_same_cache(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids.flip(1), past_key_values=cache, use_cache=True)
    cache.reset()
    assert close(model(ids, past_key_values=cache, use_cache=True).logits, model(ids).logits)
    follow = ids[:, :6]
    again = model(follow, past_key_values=cache, use_cache=True).logits
    assert close(again, model(torch.cat([ids, follow], 1)).logits[:, 23:])


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "sampling"],
)
def test_generation_with_and_without_cache(model, ids, options):
    model.double()
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(ids, max_new_tokens=9, use_cache=use_cache, **{"do_sample": False, **options}))
    assert torch.equal(*results)


@torch.no_grad()
def test_left_padded_generation_equals_single(model, ids):
    model.double()
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[1, :6], mask[1, :6] = 0, 0
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)
    alone = model.generate(ids[1:, 6:], max_new_tokens=8, do_sample=False)
    assert torch.equal(together[1, 23:], alone[0, 17:])


@torch.no_grad()
def test_chunked_prefill_in_generate(model, ids):
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, prefill_chunk_size=7, eos_token_id=2, pad_token_id=0)
    assert torch.equal(model.generate(ids, generation_config=config), plain)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits(model, ids):
    assert close(model(ids).logits[:, :11], model(ids[:, :11]).logits)


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
def test_teacher_arm_generates_like_the_teacher(teacher, student, ids):
    with student.use_arm("teacher"):
        ours = student.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=DynamicCache())
    assert torch.equal(ours, teacher.generate(ids, max_new_tokens=8, do_sample=False))
    assert {attention.arm for attention in student.mixer_attentions()} == {"mixed"}


@torch.no_grad()
def test_mechanism_stays_float32(tmp_path, ids):
    """From a stock bf16 checkpoint, where every key of the mechanism is missing, and from a saved student."""
    import linearize

    teacher = make_teacher().to(torch.bfloat16)
    teacher.save_pretrained(tmp_path / "teacher")
    student = linearize.convert(tmp_path / "teacher", {"type": "linear", "window": 5})
    perturb(student)
    student.save_pretrained(tmp_path / "student")
    loaded = linearize.load_student(tmp_path / "student", dtype=torch.bfloat16)
    for model in (student, loaded):
        kinds = {(".mixer." in name, parameter.dtype) for name, parameter in model.named_parameters()}
        assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert torch.equal(loaded(ids).logits, student(ids).logits)


def test_gradient_checkpointing_gives_equal_gradients(student, ids):
    from linearize.finetuning import gradient_checkpointing

    gradients = []
    for checkpointing in (False, True):
        student.zero_grad()
        student.train()
        with gradient_checkpointing(student, checkpointing):
            student(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(".mixer." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@torch.no_grad()
def test_observer_sees_what_both_attentions_are_given(student, teacher, ids):
    seen = []
    for attention in student.mixer_attentions():
        attention.observer = lambda *args: seen.append(args)
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


def test_a_wrong_cache_is_named(student, ids):
    with pytest.raises(ValueError, match="DynamicCache\\(config=model.config\\)"):
        student(ids, past_key_values=DynamicCache(), use_cache=True)


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
