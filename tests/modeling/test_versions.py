"""What transformers' releases differ in: the name of a call's cache; and what no release may promise for students."""

import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import make_student, make_teacher
from tiny_students import MAKERS, MIXERS, student_of, token_ids
from transformers import DynamicCache

from linearize.modeling import BACKBONES
from linearize.modeling.cache_names import CACHE, NAMES, either_name, named
from linearize.modeling.configuration import NEWEST, OLDEST, check_transformers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ids():
    return token_ids(12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mechanism", MIXERS)
@pytest.mark.parametrize("backbone", MAKERS)
def test_the_cache_goes_by_both_names_and_nothing_warns(backbone, mechanism, name, ids, caplog):
    student = student_of(backbone, mechanism)
    whole = student(ids).logits
    for module in (student, student.base_model):
        cache, found = DynamicCache(config=student.config), []
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            for piece in (ids[:, :7], ids[:, 7:8], ids[:, 8:]):
                output = module(piece, use_cache=True, **{name: cache})
                found.append(output[0])
        assert output[CACHE] is cache and [layer.get_seq_length() for layer in cache.layers] == [12] * 3
        if module is student:
            torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_the_cache_by_its_name_here(name, ids):
    if name == "cache" != CACHE:
        pytest.skip("this transformers' generate knows one name")
    student = student_of("gptj")
    options = {"max_new_tokens": 4, "do_sample": False}
    cache = DynamicCache(config=student.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # theirs, of the old name
        found = student.generate(ids, **{name: cache}, **options)
    assert torch.equal(found, student.generate(ids, use_cache=False, **options))
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize("backbone", MAKERS)
def test_a_cache_under_each_name_is_refused(backbone, ids):
    student = student_of(backbone)
    for module in (student, student.base_model):
        caches = {name: DynamicCache(config=student.config) for name in NAMES}
        with pytest.raises(ValueError, match="under both names"):
            module(ids, **caches)


def test_either_name_leaves_other_forwards_and_itself_alone():
    def plain(self, x):
        return x

    def ours(self, x, past_key_values=None):
        return past_key_values

    assert either_name(plain) is plain
    wrapped = either_name(ours)
    assert either_name(wrapped) is wrapped
    assert wrapped(None, 1, cache=2) == wrapped(None, 1, past_key_values=2) == wrapped(None, 1, 2) == 2
    assert wrapped(None, 1, cache=None) is None and wrapped(None, 1, past_key_values=3, cache=None) == 3


def without_cache(module, args, kwargs):
    """As in a release of transformers that hands the cache over under a third name."""
    return args, {name: value for name, value in kwargs.items() if name not in NAMES}


@pytest.mark.parametrize("mechanism", MIXERS)
@pytest.mark.parametrize("backbone", MAKERS)
def test_a_layer_that_does_not_get_the_cache_is_loud(backbone, mechanism, ids):
    for layer in range(3):  # the hybrids' layer 1 is softmax attention
        student = student_of(backbone, mechanism)
        student.decoder_layers()[layer].register_forward_pre_hook(without_cache, with_kwargs=True)
        with pytest.raises(RuntimeError, match=f"layer {layer} holds 0 tokens"):
            student.generate(ids, max_new_tokens=2)
        with pytest.raises(RuntimeError, match=f"layer {layer} holds 0 tokens"):
            student(ids, return_dict=False, **named(DynamicCache(config=student.config)))
        student(ids, use_cache=False)


@pytest.mark.parametrize("backbone", MAKERS)
def test_the_teacher_arm_that_does_not_get_the_cache_is_loud(backbone, ids):
    student = student_of(backbone)
    student.set_arm("teacher")
    student(ids, **named(DynamicCache()))
    student.decoder_layers()[2].register_forward_pre_hook(without_cache, with_kwargs=True)
    with pytest.raises(RuntimeError, match="layer 2 holds 0 tokens"):
        student(ids, **named(DynamicCache()))
    with pytest.raises(RuntimeError, match="layer 2 holds 0 tokens"):
        student(ids, use_cache=True)


def test_captured_decoding_that_does_not_get_the_cache_is_loud(ids):
    student = make_student(make_teacher(), {"student": MIXERS["linear"]})
    with student.captured_decoding(), torch.no_grad():
        cache = student(ids, use_cache=True)[CACHE]
        student(ids[:, :1], use_cache=True, **named(cache))
        student.decoder_layers()[1].register_forward_pre_hook(without_cache, with_kwargs=True)
        with pytest.raises(RuntimeError, match="layer 1 holds 1 tokens"):
            student(ids[:, :1], use_cache=True, **named(cache))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # the name that 5.17 knows
@pytest.mark.parametrize("mechanism", ["linear", "landmark"])
def test_gradient_checkpointing_with_a_cache_is_loud(mechanism, ids):
    student = student_of("llama", mechanism).train()
    student.gradient_checkpointing_enable()
    student(ids)  # which makes no cache
    with pytest.raises(RuntimeError, match="gradient checkpointing gives layers no cache"):
        student(ids, **named(DynamicCache(config=student.config)))


def test_releases_outside_the_bounds():
    check_transformers("5.17.0")
    check_transformers("5.24.3.dev0")
    for old in ("4.57.1", "5.9.0", "5.16.9"):
        with pytest.raises(ImportError, match=f"needs transformers 5.17 to 5.24, and {old} is installed"):
            check_transformers(old)
    for new in ("5.25.0", "5.30.0.dev0", "6.0.0rc1"):
        with pytest.warns(UserWarning, match=f"tested with transformers 5.17 to 5.24, and {new} is installed"):
            check_transformers(new)


def test_the_bounds_are_those_of_the_package():
    bounds = f"transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
    assert f'"{bounds}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\ntransformers=={NEWEST[0]}.{NEWEST[1]}." in (ROOT / "constraints-latest.txt").read_text()


def test_the_latest_versions_are_tested_with_the_other_ones_of_every_day():
    pins = [set((ROOT / name).read_text().splitlines()) for name in ("constraints.txt", "constraints-latest.txt")]
    raised = {pin.split("==")[0] for pin in pins[0] ^ pins[1] if not pin.startswith("#")}
    assert raised <= {"transformers", "peft", "accelerate", "torch"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_class_promises_an_attention_backend_or_a_plan(backbone):
    entry = BACKBONES[backbone]
    for owner in (entry.config, entry.config()):
        assert owner.base_model_tp_plan is owner.base_model_pp_plan is owner.base_model_ep_plan is None
    for model in {*entry.models.values(), *(base for x in entry.models.values() for base in x.__mro__)}:
        if not model.__name__.startswith("Linearized") or not hasattr(model, "_tp_plan"):
            continue
        assert model._supports_attention_backend is False, model
        assert model._tp_plan is model._pp_plan is model._ep_plan is None, model


@pytest.mark.parametrize("backbone", MAKERS)
def test_no_model_promises_a_plan(backbone):
    student = student_of(backbone)
    assert not student.is_backend_compatible()
    assert not student.supports_tp_plan and not student.supports_pp_plan
