"""Linear attention whose maps read the projections before position, and whose memory forgets, in whole models."""

import math

import pytest
import torch
from tiny_models import TINY, make_bert, make_gpt2, make_gptj, make_mistral, make_student, make_teacher, perturb
from transformers import AutoModelForCausalLM, DynamicCache

from linearize.modeling import ATTENTIONS, LinearAttentionConfig, hybrid_linear_attention
from linearize.modeling.attention_linear import reads
from linearize.modeling.decay_gate import GATES, DecayGate

SETTINGS = {
    gate: {"type": "linear", "window": 4, "sinks": 2, "map_input": "projections", "gate": gate, "gate_bias": 0.5}
    for gate in GATES
}
ROTARY = {"llama": make_teacher, "mistral": make_mistral, "gptj": make_gptj}


@pytest.fixture(params=GATES)
def model(request):
    """In float64: choices do not hang on how logits are summed."""
    student = make_student(make_teacher(), {"linear": SETTINGS[request.param]})
    perturb(student)
    return student.double()


@pytest.fixture
def ids():
    return torch.randint(3, TINY["vocab_size"], (3, 26), generator=torch.Generator().manual_seed(3))


def close(left, right):
    return (left - right).abs().max() <= 1e-8


def seen_by(student, ids, **kwargs):
    """What the first layer's mixer is called with."""
    calls = []
    attention = student.mixer_attentions()[0]
    hook = attention.mixer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    student(ids, **kwargs)
    hook.remove()
    return attention, *calls[0]


@torch.no_grad()
@pytest.mark.parametrize("backbone", ROTARY)
def test_maps_are_given_the_projections_and_gates_the_layers_input(backbone, ids):
    student = make_student(ROTARY[backbone](), {"linear": SETTINGS["token"]})
    perturb(student)
    entered = []
    attention = student.mixer_attentions()[0]
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    attention, (query, key, *_), given = seen_by(student, ids, use_cache=False)
    hook.remove()
    hidden = entered[0]
    assert torch.equal(given["layer_input"][:, 0], hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    for name, projection, rotated in (("query", attention.q_proj, query), ("key", attention.k_proj, key)):
        plain = projection(hidden).view(shape).transpose(1, 2)
        assert torch.equal(given[f"unrotated_{name}"], plain)
        assert torch.equal(plain[:, :, 0], rotated[:, :, 0]) and not torch.allclose(plain[:, :, 1], rotated[:, :, 1])


@torch.no_grad()
def test_the_mixer_is_the_op_on_what_it_is_given(ids):
    student = make_student(make_teacher(), {"linear": SETTINGS["key"]})
    perturb(student)
    attention, (query, key, value, *_), given = seen_by(student, ids, use_cache=False)
    mixer = attention.mixer
    weight, shift = mixer.window_mix(query)
    plain = given["unrotated_key"]
    gate = torch.einsum("bgtd,grd->bgrt", plain, mixer.gate.weight.view(2, 2, 16)).flatten(1, 2)
    expected, _ = hybrid_linear_attention(
        query, key, value, mixer.feature_map_q(query), mixer.feature_map_k(key), window=4, sinks=2,
        window_weight=weight, window_shift=shift, scaling=attention.scaling, map_query=given["unrotated_query"],
        map_key=plain, log_decay=(gate + mixer.gate.bias[:, None]).sigmoid().log(), backend="reference",
    )  # fmt: skip
    output = attention.mix(query, key, value, **{name: given[name] for name in attention.reads})
    assert (output - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_maps_before_position_do_not_see_it():
    """The linear branch alone gives the same wherever a text starts; rotated maps do not."""
    ids = torch.randint(3, TINY["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(1))
    place = torch.arange(20)[None]
    for map_input, moved in (("projections", False), ("rotated", True)):
        student = make_student(make_teacher(), {"linear": {"type": "linear", "map_input": map_input}})
        perturb(student)
        student.double().set_arm("linear")
        logits = [student(ids, position_ids=place + start, use_cache=False).logits for start in (0, 100)]
        assert close(*logits) is not moved


@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(model, ids):
    for arm in ("mixed", "linear", "softmax"):
        model.set_arm(arm)
        full = model(ids).logits
        for cuts in ([7, 1, 12, 1, 5], [1] * 26):
            cache, outputs, start = DynamicCache(config=model.config), [], 0
            for tokens in cuts:
                outputs.append(model(ids[:, start : start + tokens], past_key_values=cache).logits)
                start += tokens
            assert close(torch.cat(outputs, 1), full)


@torch.no_grad()
def test_a_left_padded_batch_with_beams_equals_single_rows(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :9] = 0, 0
    batch = ids * mask
    full = model(batch, attention_mask=mask).logits
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
        together = model.generate(batch, attention_mask=mask, **options)
        for row, gap in enumerate((0, 5, 9)):
            assert close(full[row, gap:], model(ids[row : row + 1, gap:]).logits[0])
            alone = model.generate(ids[row : row + 1, gap:], **options)
            assert torch.equal(together[row, 26:], alone[0, 26 - gap :])


@torch.no_grad()
def test_reorder_reset_and_repeat_go_with_every_field(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    follow = ids[:1, 20:].expand(3, -1)
    expected = model(torch.cat([ids[[2, 0, 0], :20], follow], 1)).logits[:, 20:]
    assert close(model(follow, past_key_values=cache).logits, expected)
    cache.reset()
    assert close(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_packed_texts_are_as_if_alone(model, ids):
    texts = [ids[0, :9], ids[1, :14], ids[2, :3]]
    packed = torch.cat(texts)[None]
    place = torch.cat([torch.arange(len(text)) for text in texts])[None]
    logits = model(packed, position_ids=place, use_cache=False).logits[0]
    assert close(logits, torch.cat([model(text[None]).logits[0] for text in texts]))
    rows = torch.zeros(2, 23, dtype=torch.long)
    rows[0, :], rows[1, 4:14] = torch.cat(texts[:2]), texts[0].repeat(2)[:10]
    mask = torch.ones_like(rows)
    mask[1, :4], mask[1, 14:] = 0, 0
    place = torch.zeros_like(rows)
    place[0] = torch.cat([torch.arange(9), torch.arange(14)])
    place[1, 4:14] = torch.arange(10)
    found = model(rows, attention_mask=mask, position_ids=place, use_cache=False).logits
    assert close(found[0, 9:], model(texts[1][None]).logits[0])
    assert close(found[1, 4:14], model(rows[1:, 4:14]).logits[0])


@pytest.mark.parametrize("gate", GATES)
def test_padding_may_hold_nan_and_reaches_no_gradient(gate):
    student = make_student(make_teacher(), {"linear": SETTINGS[gate]})
    perturb(student)
    attention = student.mixer_attentions()[0]
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(2, heads, 12, width, generator=generator)
        for name, heads, width in (
            ("query", 4, 16), ("key", 2, 16), ("value", 2, 16), ("unrotated_query", 4, 16), ("unrotated_key", 2, 16),
            ("layer_input", 1, 32),
        )
    }  # fmt: skip
    given = {name: x for name, x in given.items() if name in ("query", "key", "value", *attention.reads)}
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3], mask[1, 5:8] = False, False
    poisoned = {name: x.masked_fill(~mask[:, None, :, None], torch.nan) for name, x in given.items()}
    attention.mixer(**poisoned, padding_mask=mask).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in attention.mixer.parameters())
    assert gate == "none" or all(p.grad.abs().max() > 0 for p in attention.mixer.gate.parameters())


@torch.no_grad()
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("map_input", ["projections", "rotated"])
def test_the_figure_of_state_bytes_is_the_real_one(map_input, gate, ids):
    settings = {**SETTINGS[gate], "map_input": map_input, "share_key_map": gate == "head"}
    student = make_student(make_teacher(), {"linear": settings})
    cache = DynamicCache(config=student.config)
    student(ids[:1], past_key_values=cache)
    predicted = ATTENTIONS["linear"].state_bytes(student.config.mixer(0), 4, 2, 16, 26, 4)
    assert cache.layers[0].nbytes() == predicted
    assert (cache.layers[0].state.window_map_key is None) == (map_input == "rotated")
    assert cache.layers[0]._layer_type == "linearize_linear_3"


def test_parameters_start_where_settings_say_and_stay_float32(tmp_path):
    student = make_student(make_teacher(), {"linear": {**SETTINGS["token"], "gate_bias": 6.0}})
    gate = student.mixer_attentions()[0].mixer.gate
    assert (gate.weight == 0).all() and (gate.bias == 6).all() and gate.weight.shape == (4, 32)
    groups = {name: type(student.mixer_attentions()[0].mixer).parameter_group(name) for name, _ in
              student.mixer_attentions()[0].mixer.named_parameters()}  # fmt: skip
    assert groups["gate.weight"] == "gate" and groups["gate.bias"] == "gate_bias"
    level = DecayGate(3, None, 6.0)
    level.reset_parameters()
    kept = level(torch.zeros(2, 1, 5, 7))
    assert kept.shape == (2, 3, 5) and torch.allclose(kept, torch.tensor(-math.log1p(math.exp(-6.0))))
    perturb(student)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for ours, theirs in zip(student.mixer_attentions(), loaded.mixer_attentions(), strict=True):
        for name, parameter in ours.mixer.gate.named_parameters():
            assert torch.equal(theirs.mixer.gate.get_parameter(name), parameter)
    assert torch.isfinite(loaded(torch.arange(3, 40)[None]).logits).all()


def test_the_default_reads_before_position_and_forgets_by_the_token():
    settings = make_student(make_teacher(), {"linear": {"type": "linear"}}).config.mixers["linear"]
    assert (settings["map_input"], settings["gate"]) == ("projections", "token")


def test_published_settings_have_no_trace_of_it():
    """No new parameter, nothing read, nothing kept: published presets are what they were."""
    published = {"type": "linear", "map_input": "rotated", "gate": "none"}
    student = make_student(make_teacher(), {"linear": published})
    attention = student.mixer_attentions()[0]
    assert attention.reads == () and attention.mixer.gate is None
    assert not any("gate." in name for name in attention.mixer.state_dict())
    settings = student.config.mixers["linear"]
    assert (settings["map_input"], settings["gate"]) == ("rotated", "none")


def test_gpt2_has_no_rotation_and_keeps_one_kind_of_key(ids):
    student = make_student(make_gpt2(), {"linear": SETTINGS["key"]})
    settings = student.config.mixer(0)
    assert settings.map_input == "rotated" and settings.gate == "key" and reads(settings) == ("unrotated_key",)
    attention, (_, key, *_), given = seen_by(student, ids, use_cache=False)
    assert torch.equal(given["unrotated_key"], key)
    assert (attention.mixer.gate(key) == torch.nn.functional.logsigmoid(torch.tensor(0.5))).all()  # w from 0


@pytest.mark.parametrize("gate", ["head", "token", "key"])
def test_an_encoder_has_no_gate(gate):
    with pytest.raises(ValueError, match=f"gate is '{gate}', and an encoder"):
        make_student(make_bert(), {"linear": {"type": "linear", "gate": gate}})


def test_an_encoder_resolves_defaults_to_none(monkeypatch):
    import linearize.modeling.attention_linear as attention_linear

    monkeypatch.setattr(attention_linear, "DEFAULT_MAP_INPUT", "projections")
    monkeypatch.setattr(attention_linear, "DEFAULT_GATE", "token")
    for settings in ({}, {"gate": "none", "map_input": "projections"}):
        student = make_student(make_bert(), {"linear": {"type": "linear", **settings}})
        saved = student.config.mixers["linear"]
        assert (saved["map_input"], saved["gate"]) == ("rotated", "none")
        student(torch.arange(3, 20)[None])
    decoder = make_student(make_teacher(), {"linear": {"type": "linear"}}).config.mixers["linear"]
    assert (decoder["map_input"], decoder["gate"]) == ("projections", "token")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gate": "tokens"}, "gate is 'tokens': choose one of none, head, token, key"),
        ({"map_input": "raw"}, "map_input is 'raw': choose one of projections, rotated"),
        ({"gate_bias": float("inf")}, "gate_bias is inf"),
    ],
)
def test_bad_settings_give_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        LinearAttentionConfig(**settings)


def test_a_mixer_without_what_it_reads_says_so():
    student = make_student(make_teacher(), {"linear": SETTINGS["token"]})
    plain = make_student(make_teacher(), {"linear": {"type": "linear", "map_input": "rotated", "gate": "none"}})
    tensors = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match="reads unrotated_query, unrotated_key, layer_input, and was given nothing"):
        student.mixer_attentions()[0].mixer(*tensors)
    with pytest.raises(ValueError, match="alone, and was given unrotated_key"):
        plain.mixer_attentions()[0].mixer(*tensors, unrotated_key=tensors[1])
