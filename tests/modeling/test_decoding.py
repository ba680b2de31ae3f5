"""Captured decoding by its CPU path, which runs the same steps without a graph: equal to ordinary decoding."""

import copy
import gc
import weakref

import pytest
import torch
from tiny_models import TINY, make_student, make_teacher, perturb
from transformers import DynamicCache

from linearize.modeling.decoding import DecodingSession

MIXERS = {
    "hybrid": {"linear": {"type": "linear", "window": 5, "sinks": 2}},
    "pure-linear": {"linear": {"type": "linear", "window": 0, "sinks": 0, "feature_map": "exp"}},
    "published": {
        "linear": {
            "type": "linear",
            "window": 3,
            "sinks": 0,
            "window_reference": "max",
            "window_shift": None,
            "window_weight_form": "sigmoid",
            "window_weight": 0.1,
        }
    },
    "shared-key-map": {"linear": {"type": "linear", "window": 5, "share_key_map": True, "feature_map": "relu"}},
    "gated": {
        "linear": {"type": "linear", "window": 5, "map_input": "projections", "gate": "token", "gate_bias": 0.5}
    },
    "salient": {"salient": {"type": "salient", "window": 6, "sinks": 2, "kept_tokens": 3}},
    "salient-window-alone": {"salient": {"type": "salient", "window": 5, "sinks": 0, "kept_tokens": 0}},
    "linear-and-salient": {
        "linear": {"type": "linear", "window": 5, "sinks": 2},
        "salient": {"type": "salient", "window": 4, "sinks": 1, "kept_tokens": 4, "age_penalty": 9.0},
    },
}
TYPES = {"linear-and-salient": ["salient", "linear", "salient"]}


def make_model(name):
    student = make_student(make_teacher(), MIXERS[name], TYPES.get(name))
    perturb(student)
    return student


@pytest.fixture(params=["hybrid", "salient", "linear-and-salient"])
def student(request):
    """In float32."""
    return make_model(request.param)


@pytest.fixture(params=MIXERS)
def model(request):
    """In float64: a token decides the same way however its logits are summed."""
    return make_model(request.param).double()


@pytest.fixture
def ids():
    return torch.randint(3, TINY["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def steps(monkeypatch):
    """The batch sizes of every step that a session takes."""
    seen = []
    step = DecodingSession.step

    def counted(self, *args):
        seen.append(self.batch_size)
        return step(self, *args)

    monkeypatch.setattr(DecodingSession, "step", counted)
    return seen


def generate_both(model, ids, **options):
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        options = {"max_new_tokens": 9, "do_sample": False, **options}
        if not captured:
            results.append(model.generate(ids, **options))
            continue
        with model.captured_decoding():
            results.append(model.generate(ids, **options))
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5},
        {"num_beams": 4, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "min_new_tokens": 4},
    ],
    ids=["greedy", "sampling", "beams", "processors"],
)
def test_generate_is_the_same(model, ids, options, steps):
    ordinary, captured = generate_both(model, ids, **options)
    assert torch.equal(captured, ordinary)
    rows = 2 * options.get("num_beams", options.get("num_return_sequences", 1))
    assert len(steps) >= 4 and set(steps) == {rows}


def test_left_padding_and_a_prompt_of_one_token(model, ids, steps):
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    ordinary, captured = generate_both(model, ids.masked_fill(mask == 0, 0), attention_mask=mask)
    assert torch.equal(captured, ordinary) and steps
    ordinary, captured = generate_both(model, ids[:, :1])
    assert torch.equal(captured, ordinary)


def test_logits_are_the_same_bits(student, ids):
    """In float32, with `output_logits`, whose tensors must outlive the next step."""
    options = {"output_logits": True, "return_dict_in_generate": True}
    ordinary, captured = generate_both(student, ids, **options)
    assert all(torch.equal(a, b) for a, b in zip(ordinary.logits, captured.logits, strict=True))


def test_calls_of_every_kind_in_one_block(student, ids, steps):
    """Batch sizes that change, a cache carried on, several tokens at once in between, two caches in turn."""
    student.double()
    expected = student.generate(ids, max_new_tokens=8, do_sample=False)
    with student.captured_decoding(), torch.no_grad():
        assert torch.equal(student.generate(ids, max_new_tokens=8, do_sample=False), expected)
        assert torch.equal(student.generate(ids[:1], max_new_tokens=8, do_sample=False), expected[:1])
        first, second = DynamicCache(config=student.config), DynamicCache(config=student.config)
        forward = student.__dict__["forward"].__wrapped__
        held = []
        for cache in (first, second):
            student(ids, past_key_values=cache, use_cache=True)
            held.append(copy.deepcopy(cache))
        for cuts in ([1, 1, 3, 1], [2, 1]):
            start = 0
            for tokens in cuts:
                part = ids[:, start : start + tokens]
                for cache, ordinary in zip((first, second), held, strict=True):
                    found = student(part, past_key_values=cache, use_cache=True)
                    assert torch.equal(found.logits, forward(part, past_key_values=ordinary, use_cache=True).logits)
                start += tokens
        assert first.get_seq_length() == held[0].get_seq_length() == 32
    assert "forward" not in student.__dict__
    for layer, ordinary in zip(first.layers, held[0].layers, strict=True):  # the states come back when the block ends
        assert layer.holder is None
        assert all(a is None or torch.equal(a, b) for a, b in zip(layer.state, ordinary.state, strict=True))
    assert set(steps) == {1, 2}


def test_copies_and_resets_take_the_state_back(student, ids):
    with student.captured_decoding(), torch.no_grad():
        cache = DynamicCache(config=student.config)
        student(ids, past_key_values=cache, use_cache=True)
        student(ids[:, :1], past_key_values=cache, use_cache=True)
        assert cache.layers[0].holder is not None
        twin = copy.deepcopy(cache)
        again = [student(ids[:, 1:2], past_key_values=c, use_cache=True).logits for c in (cache, twin)]
        assert torch.equal(*again)
        cache.batch_repeat_interleave(2)
        wide = student(ids[:, 2:3].repeat_interleave(2, 0), past_key_values=cache, use_cache=True).logits
        assert torch.equal(wide[::2], wide[1::2])
        cache.reset()
        assert cache.get_seq_length() == 0
        fresh = student(ids, past_key_values=cache, use_cache=True).logits
        assert torch.equal(fresh, student(ids).logits)


def test_a_dropped_cache_is_not_kept(student, ids):
    with student.captured_decoding(), torch.no_grad():
        cache = DynamicCache(config=student.config)
        student(ids, past_key_values=cache, use_cache=True)
        student(ids[:, :1], past_key_values=cache, use_cache=True)
        layer = weakref.ref(cache.layers[0])
        del cache
        gc.collect()
        assert layer() is None


def test_training_calls_pass_through(student, ids):
    with student.captured_decoding():
        student(ids, labels=ids).loss.backward()
        assert student.get_input_embeddings().weight.grad is not None


@torch.no_grad()
def test_a_session_by_itself(model, ids):
    """From nothing, token by token, rows of which one pauses; then onwards in an ordinary cache."""
    full = model(ids).logits
    session = DecodingSession(model, 2)
    for i in range(12):
        assert (session.step(ids[:, i]) - full[:, i]).abs().max() <= 1e-10
    session.step(ids[:, 12], torch.tensor([[True], [False]]))
    assert session.count.tolist() == [13, 12]
    logits = session.step(torch.stack([ids[0, 13], ids[1, 12]]))
    assert (logits - torch.stack([full[0, 13], full[1, 12]])).abs().max() <= 1e-10
    cache, position = session.to_cache(), session.count[:, None].clone()
    part = torch.stack([ids[0, 14:15], ids[1, 13:14]])
    ordinary = model(part, past_key_values=cache, position_ids=position, use_cache=True).logits[:, -1]
    assert (ordinary - session.step(part)).abs().max() <= 1e-10


@torch.no_grad()
def test_seek_stands_for_a_context_of_any_length(student):
    session = DecodingSession(student, 3)
    session.seek(32768, fill=0)
    logits = [session.step(torch.tensor([5, 6, 7])).clone() for _ in range(2)]
    assert logits[0].shape == (3, TINY["vocab_size"]) and all(x.isfinite().all() for x in logits)
    assert session.count.tolist() == [32770] * 3
    session.seek(32768, fill=0)
    assert torch.equal(session.step(torch.tensor([5, 6, 7])), logits[0])
    one_row = sum(x[:1].nbytes for layer in session.to_cache().layers for x in layer.state if x is not None)
    assert session.nbytes() < 3 * 1.5 * one_row


def test_what_cannot_be_captured_is_named(teacher, student, ids):
    mixed = make_student(teacher, MIXERS["hybrid"], ["linear", "softmax", "linear"])
    with pytest.raises(ValueError, match="1 of the model's 3 layers are softmax"), mixed.captured_decoding():
        pass
    assert "forward" not in mixed.__dict__
    with (
        pytest.raises(ValueError, match="teacher arm"),
        student.use_arm("teacher"),
        student.captured_decoding(),
    ):
        pass
    with pytest.raises(ValueError, match="has no static cache"):
        student.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_arms_change_within_a_block(student, ids):
    student.double()
    expected = {}
    for arm in reversed(student.mixer_attentions()[0].mixer.arms):
        with student.use_arm(arm):
            expected[arm] = student.generate(ids, max_new_tokens=6, do_sample=False)
    with student.captured_decoding():
        for arm, tokens in expected.items():
            with student.use_arm(arm):
                assert torch.equal(student.generate(ids, max_new_tokens=6, do_sample=False), tokens)
