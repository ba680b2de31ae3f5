"""Cosine attention whose directions are the projections before position, and whose memory forgets, in whole models.

The tests taken from `test_gates.py` run on this file's models: decoding, padding, beams, caches and packed texts.
"""

import pytest
import torch
from test_gates import (  # noqa: F401 # tests and a fixture that this file shares
    ROTARY,
    close,
    ids,
    seen_by,
    test_a_left_padded_batch_with_beams_equals_single_rows,
    test_packed_texts_are_as_if_alone,
    test_prefill_and_decode_equal_the_full_forward,
    test_reorder_reset_and_repeat_go_with_every_field,
)
from tiny_models import TINY, make_bert, make_gpt2, make_student, make_teacher, perturb
from transformers import AutoModelForCausalLM, DynamicCache

import linearize.modeling.attention_cosine as attention_cosine
from linearize.modeling import ATTENTIONS, CosineAttentionConfig, cosine_attention, hybrid_linear_attention
from linearize.modeling.attention_cosine import reads
from linearize.modeling.cache_layers import CosineStateLayer
from linearize.stages.calibration import calibrate

GATED = {"type": "cosine", "window": 4, "sinks": 2, "directions": "projections", "gate_bias": 0.5}
SETTINGS = {
    "none": {**GATED, "gate": "none"},
    "head": {**GATED, "gate": "head"},
    "token": {**GATED, "gate": "token"},
    "key": {**GATED, "gate": "key"},
    "rotated": {**GATED, "gate": "token", "directions": "rotated"},
    "key side": {**GATED, "gate": "key", "scale_side": "key"},
    "softmax map": {**GATED, "gate": "token", "feature_map": "softmax", "feature_dim": 5},
    "sinks alone": {**GATED, "gate": "token", "window": 0},
}


@pytest.fixture(params=SETTINGS)
def model(request):
    """In float64: choices do not hang on how logits are summed."""
    student = make_student(make_teacher(), {"cosine": SETTINGS[request.param]})
    perturb(student)
    return student.double()


def given_to(attention, seed=0):
    """Tensors of every name that its mixer reads, of 2 rows of 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    widths = {"query": (4, 16), "key": (2, 16), "value": (2, 16), "unrotated_query": (4, 16), "unrotated_key": (2, 16)}
    given = {name: torch.randn(2, heads, 12, width, generator=generator) for name, (heads, width) in widths.items()}
    given["layer_input"] = torch.randn(2, 1, 12, 32, generator=generator)
    return {name: x for name, x in given.items() if name in ("query", "key", "value", *attention.reads)}


@torch.no_grad()
@pytest.mark.parametrize("backbone", ROTARY)
@pytest.mark.parametrize("name", ["key", "key side", "rotated"])
def test_the_mixer_is_the_ops_on_what_it_is_given(name, backbone, ids):  # noqa: F811
    student = make_student(ROTARY[backbone](), {"cosine": SETTINGS[name]})
    perturb(student)
    attention, (query, key, value, *_), given = seen_by(student, ids, use_cache=False)
    mixer = attention.mixer
    read = given["layer_input" if name == "rotated" else "unrotated_key"]
    heads = 4 if name == "key side" else key.shape[1]
    weight = mixer.gate.weight.view(read.shape[1], -1, read.shape[3])
    assert mixer.gate.weight.shape[0] == heads
    level = torch.einsum("bgtd,grd->bgrt", read, weight).flatten(1, 2) + mixer.gate.bias[:, None]
    rotated = name == "rotated"
    directions = (query, key) if rotated else (given["unrotated_query"], given["unrotated_key"])
    options = {"window": 4, "sinks": 2, "backend": "reference"}
    far, _ = cosine_attention(
        *directions, value, exponent=mixer.scales.exponent(), gain=mixer.scales.gain, log_decay=level.sigmoid().log(),
        scale_side=mixer.scale_side, **options,
    )  # fmt: skip
    near, _ = hybrid_linear_attention(query, key, value, None, None, scaling=attention.scaling, **options)
    output = attention.mix(query, key, value, **{name: given[name] for name in attention.reads})
    expected = mixer.scales.window_weight[:, None, None] * near + far
    assert (output - expected).abs().max() <= 1e-5 and far.abs().max() > 1e-3


@torch.no_grad()
def test_directions_before_position_do_not_see_it():
    """The cosine branch alone gives the same wherever a text starts; rotated directions do not."""
    ids = torch.randint(3, TINY["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(1))  # noqa: F811
    place = torch.arange(20)[None]
    for directions, moved in (("projections", False), ("rotated", True)):
        # The cosine of rotated vectors depends on their distance alone; with a map it depends on their places.
        settings = {"type": "cosine", "directions": directions, "feature_map": "softmax"}
        student = make_student(make_teacher(), {"cosine": settings})
        perturb(student)
        student.double().set_arm("linear")
        logits = [student(ids, position_ids=place + start, use_cache=False).logits for start in (0, 100)]
        assert close(*logits) is not moved


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_may_hold_nan_and_reaches_no_gradient(name):
    student = make_student(make_teacher(), {"cosine": SETTINGS[name]})
    perturb(student)
    attention = student.mixer_attentions()[0]
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3], mask[1, 5:8] = False, False
    given = {n: x.masked_fill(~mask[:, None, :, None], torch.nan) for n, x in given_to(attention).items()}
    attention.mixer(**given, padding_mask=mask).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in attention.mixer.parameters())
    assert name == "none" or all(p.grad.abs().max() > 0 for p in attention.mixer.gate.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
def test_a_cache_goes_on_after_padding_and_calls_without_tokens(name):
    student = make_student(make_teacher(), {"cosine": SETTINGS[name]})
    perturb(student)
    attention = student.mixer_attentions()[0]
    given = given_to(attention)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3], mask[1, 5:9], mask[0, 6:8] = False, False, False
    given = {n: x.masked_fill(~mask[:, None, :, None], torch.nan) for n, x in given.items()}
    whole, layer = attention.mixer(**given, padding_mask=mask), CosineStateLayer()
    parts = []
    for piece in (slice(0, 2), slice(2, 7), slice(7, 7), slice(7, 8), slice(8, 12)):
        part = {n: x[:, :, piece] for n, x in given.items()}
        parts.append(attention.mixer(**part, padding_mask=mask[:, piece], cache_layer=layer))
    assert (torch.cat(parts, 2) - whole).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_figure_of_state_bytes_is_the_real_one(name, dtype, ids):  # noqa: F811
    student = make_student(make_teacher(), {"cosine": SETTINGS[name]}).to(dtype)
    cache = DynamicCache(config=student.config)
    student(ids[:1], past_key_values=cache)
    layer, settings = cache.layers[0], student.config.mixer(0)
    assert layer.nbytes() == ATTENTIONS["cosine"].state_bytes(settings, 4, 2, 16, 26, dtype.itemsize)
    assert (layer.state.window_direction is None) == (name == "rotated")
    assert (layer.state.mass is None) == (name in ("none", "key side"))
    assert layer._layer_type == "linearize_cosine_2"


def test_parameters_start_where_settings_say_and_stay_float32(tmp_path):
    student = make_student(make_teacher(), {"cosine": {**SETTINGS["token"], "gate_bias": 6.0}})
    mixer = student.mixer_attentions()[0].mixer
    assert (mixer.gate.weight == 0).all() and (mixer.gate.bias == 6).all() and mixer.gate.weight.shape == (2, 32)
    groups = {name: type(mixer).parameter_group(name) for name, _ in mixer.named_parameters()}
    assert groups["gate.weight"] == "gate" and groups["gate.bias"] == "gate_bias"
    assert groups["scales.gain"] == "scalers" and groups["scales.window_weight"] == "window"
    perturb(student)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 40)[None]  # noqa: F811
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert loaded.config.mixers == student.config.mixers
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for ours, theirs in zip(student.mixer_attentions(), half.mixer_attentions(), strict=True):
        for name, parameter in ours.mixer.gate.named_parameters():
            assert torch.equal(theirs.mixer.gate.get_parameter(name), parameter)
    assert torch.isfinite(half(ids).logits).all()


def test_the_default_is_that_of_contract_1():
    """No new parameter, nothing read, nothing kept: published presets are what they were."""
    student = make_student(make_teacher(), {"cosine": {"type": "cosine"}})
    attention = student.mixer_attentions()[0]
    assert attention.reads == () and attention.mixer.gate is None
    assert set(dict(attention.mixer.named_parameters())) == {
        f"scales.{x}" for x in ("exponent_logit", "gain", "window_weight")
    }
    settings = student.config.mixers["cosine"]
    assert (settings["directions"], settings["gate"]) == ("rotated", "none")


@torch.no_grad()
@pytest.mark.parametrize("name", ["none", "token", "key side", "softmax map"])
def test_the_calibration_reads_what_the_mixer_does(name):
    """Its error after the fit is that of the layer's output; the closed form for the query's side counts the mass."""
    student = make_student(make_teacher(), {"cosine": SETTINGS[name]}).double()
    attention = student.mixer_attentions()[0]
    given = {n: x.double() for n, x in given_to(attention).items()}
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3], mask[1, 5:8] = False, False
    scales, mixer = attention.mixer.scales, attention.mixer
    exponents = torch.tensor([[0.1, 0.3, 0.6, 0.9]], dtype=torch.float64)
    scales.assign(exponents[0], torch.full((4,), 0.7), torch.ones(4))
    context = {n: given.pop(n) for n in attention.reads}
    near, terms = mixer.calibration_terms(**given, padding_mask=mask, causal=True, exponents=exponents, **context)
    output = mixer(**given, padding_mask=mask, **context)
    assert (near + scales.gain.double()[:, None, None] * next(terms) - output).abs().max() <= 1e-6
    share = mixer.linear_share(**given, padding_mask=mask, **context)
    assert (share[:, :, 9:] > 0).all() and (share <= 1).all()


def test_a_calibrated_student_is_nearer_to_its_teacher():
    """With a gate and directions before position, through the observers."""
    student = make_student(make_teacher(), {"cosine": SETTINGS["token"]})
    rows = [{"input_ids": x} for x in torch.randint(3, 97, (4, 30), generator=torch.Generator().manual_seed(2))]
    report = calibrate(student, rows, 4, batch_size=2)
    assert all(report.after[i] < report.before[i] for i in report.before) and len(report.before) == 3


def test_gpt2_has_no_rotation_and_keeps_one_kind_of_key(ids):  # noqa: F811
    student = make_student(make_gpt2(), {"cosine": SETTINGS["key"]})
    settings = student.config.mixer(0)
    assert settings.directions == "rotated" and settings.gate == "key" and reads(settings) == ("unrotated_key",)
    cache = DynamicCache(config=student.config)
    student(ids[:1], past_key_values=cache)
    assert cache.layers[0].state.window_direction is None and cache.layers[0].state.mass.shape == (1, 4)


@pytest.mark.parametrize("gate", ["head", "token", "key"])
def test_an_encoder_has_no_gate(gate):
    with pytest.raises(ValueError, match=f"gate is '{gate}', and an encoder"):
        make_student(make_bert(), {"cosine": {"type": "cosine", "gate": gate}})


def test_an_encoder_resolves_defaults_to_none(monkeypatch):
    monkeypatch.setattr(attention_cosine, "DEFAULT_DIRECTIONS", "projections")
    monkeypatch.setattr(attention_cosine, "DEFAULT_GATE", "token")
    for settings in ({}, {"gate": "none", "directions": "projections"}):
        student = make_student(make_bert(), {"cosine": {"type": "cosine", **settings}})
        saved = student.config.mixers["cosine"]
        assert (saved["directions"], saved["gate"]) == ("rotated", "none")
        student(torch.arange(3, 20)[None])
    decoder = make_student(make_teacher(), {"cosine": {"type": "cosine"}}).config.mixers["cosine"]
    assert (decoder["directions"], decoder["gate"]) == ("projections", "token")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gate": "tokens"}, "gate is 'tokens': choose one of none, head, token, key"),
        ({"directions": "raw"}, "directions is 'raw': choose one of projections, rotated"),
        ({"gate_bias": float("inf")}, "gate_bias is inf"),
    ],
)
def test_bad_settings_give_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        CosineAttentionConfig(**settings)


def test_a_mixer_without_what_it_reads_says_so():
    student = make_student(make_teacher(), {"cosine": SETTINGS["token"]})
    tensors = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match="reads unrotated_query, unrotated_key, layer_input, and was given nothing"):
        student.mixer_attentions()[0].mixer(*tensors)
