"""GainCellAttention in a model: its settings, its scalers, and the arms that it does not have."""

import pytest
import torch
from tiny_models import make_student, make_teacher, perturb
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from linearize.modeling import ATTENTIONS, GainCell, GainCellAttentionConfig, GainCellNoise

CELL = {"tile": 4, "leak": 0.01, "score_saturation": 4.0, "output_saturation": 4.0}


@pytest.fixture
def student():
    model = make_student(make_teacher(), {"gain_cell": {"type": "gain_cell", "window": 8, "cell": CELL}})
    perturb(model)
    with torch.no_grad():
        for attention in model.mixer_attentions():
            for scaler in attention.mixer.children():
                scaler.scale.abs_()  # a scale below 0 counts as 0
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_saved_settings_hold_the_whole_cell(student, ids, tmp_path):
    student.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.mixers["gain_cell"]["cell"] == GainCell.from_dict(CELL).to_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for name, p in loaded.named_parameters() if ".mixer." in name)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, student(ids).logits)


def test_scalers_start_in_the_ranges():
    teacher = make_teacher()
    for initialization, query, stored in (("unit", (0.25, 0.5), (0.225, 0.45)), ("published", (1, 0), (1, 0.45))):
        settings = {"type": "gain_cell", "window": 64, "initialization": initialization}
        mixer = make_student(teacher, {"gain_cell": settings}).mixer_attentions()[0].mixer
        for scaler, start in ((mixer.query_scaler, query), (mixer.key_scaler, stored), (mixer.value_scaler, stored)):
            assert (scaler.scale - start[0]).abs().max() < 1e-6 and (scaler.offset - start[1]).abs().max() < 1e-6
    assert mixer.query_scaler.scale.shape == (4,) and mixer.key_scaler.scale.shape == (2,)
    assert all("gain_cell" not in name for name, _ in mixer.named_parameters())


@torch.no_grad()
def test_the_linear_kind_is_the_linear_cell(student, ids):
    settings = {"type": "gain_cell", "window": 8, "cell": CELL}
    linear = make_student(make_teacher(), {"gain_cell": {**settings, "cell_kind": "linear"}})
    by_polynomial = {**CELL, "polynomial": [0.0, 19.3, 0.0, 0.0]}
    same = make_student(make_teacher(), {"gain_cell": {**settings, "cell": by_polynomial}})
    assert torch.equal(linear(ids).logits, same(ids).logits)
    assert not torch.equal(linear(ids).logits, student(ids).logits)


@torch.no_grad()
def test_state_size_is_constant(student, ids):
    cache = DynamicCache(config=student.config)
    sizes = []
    for _ in range(2):
        student(ids[:1], past_key_values=cache, use_cache=True)
        sizes.append(cache.layers[0].nbytes())
    predicted = ATTENTIONS["gain_cell"].state_bytes(student.config.mixer(0), 4, 2, 16, 23, 4)
    assert sizes == [predicted, predicted]


@torch.no_grad()
def test_noise_is_a_run_time_setting(student, ids):
    quiet = student(ids).logits
    for layer, attention in enumerate(student.mixer_attentions()):
        attention.mixer.noise = GainCellNoise(mismatch=0.2, seed=layer)
    noisy = student(ids).logits
    assert not torch.allclose(quiet, noisy) and torch.equal(noisy, student(ids).logits)
    assert "noise" not in str(student.config)


def test_every_scaler_learns(student, ids):
    student(ids, labels=ids).loss.backward()
    for name, parameter in student.named_parameters():
        if ".mixer." in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_arms_that_are_not_there_are_named(student, ids):
    assert student.arms() == ("mixed", "teacher")
    with pytest.raises(ValueError, match="no arm 'softmax': use one of mixed, teacher"):
        student.set_arm("softmax")


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"window": 100}, "multiple of the cell's tile"),
        ({"cell": {"tyle": 4}}, "unknown key tyle"),
        ({"cell": {"leak": -1.0}}, "time constant"),
        ({"cell_kind": "cubic"}, "nonlinear, linear"),
        ({"gradient": "none"}, "exact, linear"),
        ({"contract": 99}, "contract 99"),
    ],
)
def test_bad_settings_give_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        GainCellAttentionConfig(**settings)
    assert "\n" not in str(caught.value)
