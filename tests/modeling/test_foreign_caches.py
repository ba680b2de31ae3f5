"""Caches that a converted model cannot use are refused in a sentence; a hybrid's attentions lie in their places."""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from tiny_models import make_bert, make_student, make_teacher
from tiny_students import HYBRID, MAKERS, MIXERS, student_of, token_ids
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import EncoderDecoderCache

from linearize.modeling.cache_names import named


def filled(*config) -> DynamicCache:
    cache = DynamicCache(*config)
    for layer in range(3):
        cache.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), layer)
    return cache


@pytest.fixture
def ids():
    return token_ids(9)


@pytest.mark.parametrize("mechanism", MIXERS)
def test_foreign_caches_are_refused(mechanism, ids):
    student, keys = student_of("llama", mechanism), torch.zeros(2, 2, 3, 16)
    caches = {
        "the cache is a tuple, which": ((keys, keys),) * 3,
        "the cache is a list, which": [(keys, keys)] * 3,
        "the cache is a EncoderDecoderCache, which": EncoderDecoderCache(DynamicCache(), DynamicCache()),
        "layer 0 needs a cache layer linearize_": DynamicCache(),
        "as prefix tuning does, goes with softmax layers alone": filled(),
    }
    for sentence, cache in caches.items():
        with pytest.raises(ValueError, match=sentence):
            student(ids, **named(cache))
    static = StaticCache(config=make_teacher().config, max_cache_len=16)
    with pytest.raises(ValueError, match="layer 0 needs a cache layer linearize_"):
        student(ids, **named(static))


@pytest.mark.parametrize("types", [HYBRID, ["softmax", "student", "softmax"]])
@pytest.mark.parametrize("backbone", MAKERS)
def test_a_static_cache_by_hand_is_refused(backbone, types):
    config = student_of(backbone, types=types).config
    with pytest.raises(ValueError, match="a converted model has no static cache"):
        StaticCache(config=config, max_cache_len=16)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft's own
@pytest.mark.parametrize("backbone", MAKERS)
@pytest.mark.parametrize("mechanism", MIXERS)
def test_prefix_tuning_is_refused(mechanism, backbone, ids):
    prefixed = get_peft_model(
        student_of(backbone, mechanism),
        PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=3, num_attention_heads=2, token_dim=32
        ),
    )
    with pytest.raises(ValueError, match="as prefix tuning does, goes with softmax layers alone"):
        prefixed(ids)


def test_the_cache_of_a_converted_layer_in_the_teacher_arm_is_refused(ids):
    student = student_of("llama")
    student.set_arm("teacher")
    with pytest.raises(ValueError, match="to generate in the teacher arm, pass"):
        student(ids, **named(DynamicCache(config=student.config)))
    assert student(ids, use_cache=True).logits.shape[1] == 9
    assert isinstance(student(ids, **named(filled())).logits, torch.Tensor)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("backbone", MAKERS)
@torch.no_grad()
def test_attentions_have_an_entry_for_every_layer(backbone, return_dict, ids):
    student = student_of(backbone, types=["softmax", "student", "softmax"])
    student.set_attn_implementation("eager")
    output = student(ids, output_attentions=True, use_cache=False, return_dict=return_dict)
    attentions = output.attentions if return_dict else output[-1]
    assert [weights is None for weights in attentions] == [False, True, False]
    heads = student.config.num_attention_heads
    assert all(attentions[i].shape == (2, heads, 9, 9) for i in (0, 2))
    assert not torch.equal(attentions[0], attentions[2])
    for model in (student.base_model, student_of(backbone, "landmark"), make_student(MAKERS[backbone]())):
        model.set_attn_implementation("eager")
        assert len(model(ids, output_attentions=True).attentions) == 3
    assert student(ids).attentions is None


@torch.no_grad()
def test_attentions_of_an_encoder_have_an_entry_for_every_layer(ids):
    student = make_student(make_bert(), {"student": MIXERS["cosine"]}, HYBRID)
    student.set_attn_implementation("eager")
    for options in ({}, {"return_dict": False}):
        output = student(ids, output_attentions=True, **options)
        attentions = output[-1] if options else output.attentions
        assert [weights is None for weights in attentions] == [True, False, True]
    assert attentions[1].shape == (2, 4, 9, 9)


def test_an_encoder_refuses_a_cache_by_either_name(ids):
    student = make_student(make_bert(), {"student": MIXERS["cosine"]}, HYBRID)
    for name in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match="has no cache"):
            student(ids, **{name: Cache(layers=[])})
