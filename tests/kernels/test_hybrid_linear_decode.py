"""The decode kernel in Triton's interpreter: token by token against the definition in float64."""

from itertools import pairwise

import pytest
import torch
from tiny_models import make_student, make_teacher, perturb

import linearize.kernels.hybrid_linear.decode as decode
import linearize.modeling.op_hybrid_linear_decode as in_place
from linearize.kernels.hybrid_linear import reference
from linearize.kernels.triton_support import interpreting
from linearize.modeling import FeatureMapWeights, HybridLinearState
from linearize.modeling.decoding import DecodingSession
from linearize.modeling.op_hybrid_linear_decode import DecodeBuffers, new_buffers, read_buffers

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is there: tests/gpu has these")

STEPS = 9
CASES = {
    # heads, groups, key map heads, D, Dv, f, activation, given, window, sinks, reference, magnitude and bias
    "hybrid": (2, 1, 2, 16, 16, 16, "softmax", False, 3, 2, "logsumexp", True),
    "published": (2, 2, 2, 8, 8, 8, "exp", False, 4, 0, "max", False),
    "odd-dims": (2, 1, 2, 20, 12, 10, "softmax", False, 3, 1, "max", True),
    "shared-key-map": (4, 2, 2, 8, 8, 6, "relu", False, 4, 1, "logsumexp", True),
    "elu-sinks-only": (2, 1, 2, 8, 8, 5, "elu", False, 0, 3, "logsumexp", True),
    "linear-arm": (2, 1, 2, 8, 12, 4, "exp", False, 0, 0, "logsumexp", True),
    "given": (2, 1, 2, 8, 12, 7, "relu", True, 3, 2, "logsumexp", False),
    "given-shared": (2, 1, 1, 8, 8, 8, "relu", True, 3, 0, "max", False),
    "given-linear-arm": (2, 2, 2, 8, 8, 5, "relu", True, 0, 0, "max", False),
    "softmax-arm": (4, 2, 4, 8, 12, 0, None, False, 4, 2, "logsumexp", False),
    "softmax-arm-sinks": (2, 2, 2, 8, 8, 0, None, False, 0, 2, "logsumexp", False),
    "window-of-one": (2, 1, 2, 8, 8, 4, "softmax", False, 1, 1, "logsumexp", False),
}
SPLIT = ("odd-dims", "given", "softmax-arm", "linear-arm")  # value dimensions divided among programs


@pytest.fixture
def case(request, monkeypatch):
    monkeypatch.setattr(decode, "MIN_BLOCK_DV", 8 if request.param in SPLIT else 256)
    return draw_case(request.param)


def draw_case(name, batch=2, seed=0):
    heads, groups, key_heads, dim, value_dim, f, activation, given, window, sinks, level, extras = CASES[name]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    query, key = 1.5 * draw(batch, heads, STEPS, dim), 1.5 * draw(batch, groups, STEPS, dim)
    value = draw(batch, groups, STEPS, value_dim)
    features = [None, None]
    if given:
        features = [draw(batch, h, STEPS, f).abs() for h in (heads, key_heads)]
    elif activation is not None:
        features = [
            FeatureMapWeights(
                draw(h, dim, f), draw(h, f) if extras else None, 0.3 * draw(h, dim) if extras else None, activation
            )
            for h in (heads, key_heads)
        ]
    options = {
        "window_weight": draw(heads).abs() + 0.1,
        "window_shift": draw(heads) if extras else None,
        "window_reference": level,
        "window": window,
        "sinks": sinks,
        "scaling": None,
    }
    # Each call is one token with a mask of its own: row 0 is padding in two of them.
    mask = torch.ones(batch, STEPS, dtype=torch.bool)
    mask[0, [0, 5]] = False
    return [query, key, value], features, options, mask


def token(x, i):
    return x[:, :, i : i + 1] if isinstance(x, torch.Tensor) else x


def double(x):
    if isinstance(x, torch.Tensor):
        return x.double()
    return x if x is None else FeatureMapWeights(*(None if y is None else y.double() for y in x[:3]), x.activation)


def empty_state(inputs, features, options):
    """The definition's own empty state, in float32."""
    nothing = torch.zeros(inputs[0].shape[0], STEPS, dtype=torch.bool)
    _, state = reference(*inputs, *features, **options, attention_mask=nothing, return_state=True)
    return HybridLinearState(*state)


def expected_steps(inputs, features, options, mask):
    """The definition in float64, one call per token: outputs and states."""
    inputs, features = [double(x) for x in inputs], [double(x) for x in features]
    options = {**options, "window_weight": double(options["window_weight"])}
    options["window_shift"] = double(options["window_shift"])
    state, outputs, states = None, [], []
    for i in range(STEPS):
        output, state = reference(
            *(token(x, i) for x in (*inputs, *features)),
            **options,
            attention_mask=mask[:, i : i + 1],
            initial_state=state,
            return_state=True,
        )
        outputs.append(output)
        states.append(state)
    return outputs, states


def close(ours, expected, tolerance=2e-5):
    """float32 sums of a few dozen terms of size up to 10: relative to the largest element."""
    if ours is None or ours.numel() == 0:
        return (ours is None) == (expected is None)
    assert ours.shape == expected.shape
    return (ours.double() - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


def poison(x, mask, i):
    """NaN in the padded rows of token i."""
    x = token(x, i)
    return x.masked_fill(~mask[:, i][:, None, None, None], torch.nan) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_functional_steps_equal_the_definition(case):
    inputs, features, options, mask = case
    outputs, states = expected_steps(inputs, features, options, mask)
    state = empty_state(inputs, features, options)
    for i in range(STEPS):
        before = [None if x is None else x.clone() for x in state]
        call = [poison(x, mask, i) for x in (*inputs, *features)]
        output, new = decode.decode_step(*call, **options, attention_mask=mask[:, i : i + 1], state=state)
        assert close(output, outputs[i]), i
        assert (output[~mask[:, i]] == 0).all()
        for field, ours, expected in zip(HybridLinearState._fields, new, states[i], strict=True):
            assert close(ours, expected), (i, field)
        for a, b in zip(before, state, strict=True):
            assert a is None or torch.equal(a, b)
        state = new


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_in_place_steps_equal_the_definition(case):
    inputs, features, options, mask = case
    outputs, states = expected_steps(inputs, features, options, mask)
    held = new_buffers(empty_state(inputs, features, options), inputs[0].shape[0])
    count = torch.zeros(inputs[0].shape[0], dtype=torch.int64)
    log_weight = options["sinks"] == 2
    if log_weight:
        options = {**options, "window_weight": options["window_weight"].log()}
    for i in range(STEPS):
        call = [poison(x, mask, i) for x in (*inputs, *features)]
        output = decode.decode_step_(
            *call, **options, attention_mask=mask[:, i : i + 1], buffers=held, count=count, log_weight=log_weight
        )
        count += mask[:, i]
        assert close(output, outputs[i]), i
        for field, ours, expected in zip(HybridLinearState._fields, read_buffers(held, count), states[i], strict=True):
            assert close(ours, expected), (i, field)


def test_without_a_mask_and_with_strided_inputs():
    """Query, key and value as views of one projection, heads inside: what a model passes."""
    inputs, features, options, _ = draw_case("hybrid")
    ones = torch.ones(2, STEPS, dtype=torch.bool)
    outputs, _ = expected_steps(inputs, features, options, ones)
    state = empty_state(inputs, features, options)
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in inputs], -1)
    for i in range(STEPS):
        parts = fused[:, i : i + 1].split([32, 16, 16], -1)
        call = [x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in parts]
        output, state = decode.decode_step(*call, *features, **options, attention_mask=None, state=state)
        assert close(output, outputs[i]), i


def test_query_map_beside_given_key_features():
    """Either side may be a map: a signed query map with given key features, and the other way round."""
    for maps_query, activation in ((True, "softmax"), (True, "elu"), (False, "exp")):
        inputs, features, options, mask = draw_case("hybrid", batch=1)
        width = 2 * 7 if activation in ("softmax", "exp") else 7
        generator = torch.Generator().manual_seed(1)
        maps = FeatureMapWeights(torch.randn(2, 16, 7, generator=generator), None, None, activation)
        given = torch.rand(1, 2, STEPS, width, generator=generator)
        features = [maps, given] if maps_query else [given, maps]
        outputs, _ = expected_steps(inputs, features, options, mask)
        state = empty_state(inputs, features, options)
        for i in range(STEPS):
            call = [token(x, i) for x in (*inputs, *features)]
            output, state = decode.decode_step(*call, **options, attention_mask=mask[:, i : i + 1].long(), state=state)
            assert close(output, outputs[i]), (maps_query, activation, i)


@pytest.mark.parametrize("name", ["hybrid", "given", "linear-arm", "softmax-arm"])
def test_state_to_buffers_and_back(name):
    """At every count, so that every alignment of ring and longer ring occurs; values moved, never changed."""
    inputs, features, options, mask = draw_case(name)
    _, states = expected_steps(inputs, features, options, mask)
    states = [HybridLinearState(*state) for state in states]
    for state in states:
        held = new_buffers(state, inputs[0].shape[0])
        assert isinstance(held, DecodeBuffers) and held.normalizer.shape[0] == 2
        again = read_buffers(held.load_(state), state.count)
        assert all(a is None or torch.equal(a, b) for a, b in zip(state, again, strict=True))
    assert all(a.count.tolist() != b.count.tolist() for a, b in pairwise(states))


def test_unsupported_calls_give_a_reason():
    inputs, features, _, _ = draw_case("hybrid")
    assert decode.decode_unsupported(inputs[0], *features) is None
    assert "float64" in decode.decode_unsupported(inputs[0].double(), *features)
    assert "head dimensions up to 256" in decode.decode_unsupported(torch.zeros(1, 1, 1, 257), None, None)
    wide = FeatureMapWeights(torch.zeros(1, 8, 129), None, None, "softmax")
    assert "these are 258" in decode.decode_unsupported(torch.zeros(1, 1, 1, 8), wide, wide)


@pytest.mark.parametrize("memory", [{}, {"map_input": "projections", "gate": "token", "gate_bias": 1.0}], ids=str)
def test_a_model_decodes_by_the_kernel(memory, monkeypatch):
    """A session's steps reach the kernel through the run-time backend, and give what the chunked path gives."""
    teacher = make_teacher(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    options = {"type": "linear", "window": 2, "sinks": 1, "feature_dim": 8, **memory}
    student = make_student(teacher, {"linear": options})
    perturb(student)
    tokens, logits = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 4, 5, 6]]), {}
    for backend in ("chunked", "triton"):
        student.set_op_backend(backend)
        session = DecodingSession(student, 2)
        logits[backend] = torch.stack([session.step(tokens[:, i]).clone() for i in range(5)])
        if backend == "chunked":
            monkeypatch.setattr(in_place, "hybrid_linear_attention", None)  # the kernel's steps do not call it
    assert not torch.equal(logits["triton"], logits["chunked"])
    assert (logits["triton"] - logits["chunked"]).abs().max() <= 1e-5 * logits["chunked"].abs().max()
