"""One-token steps of salient-token attention, token by token against the definition in float64: the PyTorch steps in
float64, the kernel in Triton's interpreter in float32."""

import importlib

import pytest
import torch
from tiny_models import make_student, make_teacher

import linearize.kernels.salient.decode as decode
import linearize.modeling.op_salient_decode as in_place
from linearize.kernels.salient import reference
from linearize.kernels.triton_support import interpreting
from linearize.modeling import SalientState, salient_attention
from linearize.modeling.decoding import DecodingSession
from linearize.modeling.op_salient_decode import new_buffers, read_buffers, salient_step_

needs_interpreter = pytest.mark.skipif(not interpreting(), reason="a GPU is there: tests/gpu has these")

STEPS = 27
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}  # sums of about 60 terms
CASES = {
    # heads, groups, D, window, sinks, kept
    "grouped": (4, 2, 8, 9, 2, 5),
    "three-heads-odd-dim": (3, 1, 12, 8, 1, 4),
    "no-sinks": (2, 1, 8, 5, 0, 3),
    "none-kept": (2, 1, 8, 6, 2, 0),
    "window-alone": (2, 1, 8, 6, 0, 0),
    "window-of-one": (2, 1, 8, 1, 1, 6),
    "window-of-two-more-sinks": (2, 1, 8, 2, 5, 3),
    "several-tiles": (2, 1, 8, 17, 3, 20),
    "never-full": (2, 1, 8, 30, 3, 4),
    "store-never-full": (2, 1, 8, 3, 1, 40),
}


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    monkeypatch.setattr(decode, "LONGEST_TILE", 16)
    monkeypatch.setattr(decode, "MASS_TILE", 16 * 16)
    decode._constants.cache_clear()
    yield draw_case(request.param)
    decode._constants.cache_clear()


def draw_case(name, batch=2):
    heads, groups, dim, window, sinks, kept = CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, count, STEPS, dim, generator=generator) for count in (heads, groups, groups)]
    inputs[0] *= 2
    settings = {"window": window, "sinks": sinks, "kept": kept, "age_penalty": 20.0, "scaling": None}
    mask = torch.ones(batch, STEPS, dtype=torch.bool)
    mask[0, [0, 5, 17]] = False
    return inputs, settings, mask


def empty_state(inputs, settings):
    """The definition's own empty state."""
    nothing = torch.zeros(inputs[0].shape[0], 1, dtype=torch.bool)
    call = {**settings, "attention_mask": nothing, "return_state": True}
    return SalientState(*reference(*(x[:, :, :1] for x in inputs), **call)[1])


def token(inputs, mask, i):
    """Token i, NaN in padded rows."""
    return [x[:, :, i : i + 1].masked_fill(~mask[:, i, None, None, None], torch.nan) for x in inputs]


def by_rank(state):
    """The kept tokens in the order of their ranks, which is no part of the contract; 0 where a slot is empty."""
    order = state.kept_rank.sort(dim=-1, descending=True)
    key, value = (x.gather(2, order.indices[..., None].expand_as(x)) for x in (state.kept_key, state.kept_value))
    return state._replace(kept_rank=order.values.nan_to_num(neginf=-99.0), kept_key=key, kept_value=value)


def check_steps(case, dtype, step, state_of):
    """Outputs, and states after every token, of `step(token, mask)`."""
    inputs, settings, mask = case
    expected, past = [x.double() for x in inputs], None
    for i in range(STEPS):
        real = mask[:, i : i + 1]
        part = [x[:, :, i : i + 1] for x in expected]
        output, past = reference(*part, **settings, attention_mask=real, initial_state=past, return_state=True)
        found = step(token([x.to(dtype) for x in inputs], mask, i), real)
        assert found.dtype == dtype and (found - output).abs().max() <= TOLERANCE[dtype] * 4, i
        assert not found[~mask[:, i]].any()
        for name, a, b in zip(SalientState._fields, by_rank(state_of()), by_rank(SalientState(*past)), strict=True):
            assert a.shape == b.shape, (i, name)
            assert a.numel() == 0 or (a - b).abs().max() <= TOLERANCE[dtype] * (1 + b.abs().max()), (i, name)


def check_in_place(case, dtype, backend):
    inputs, settings, _ = case
    state = empty_state([x.to(dtype) for x in inputs], settings)
    buffers, count = new_buffers(SalientState(*(x[:1] for x in state)), 2), torch.zeros(2, dtype=torch.int64)

    def step(part, real):
        output = salient_step_(*part, **settings, attention_mask=real, buffers=buffers, count=count, backend=backend)
        count.add_(real[:, 0])
        return output

    check_steps(case, dtype, step, lambda: read_buffers(buffers, count))


def test_steps_in_pytorch_equal_the_definition(case):
    check_in_place(case, torch.float64, "chunked")


@needs_interpreter
def test_steps_of_the_kernel_equal_the_definition(case, monkeypatch):
    monkeypatch.setattr(in_place, "salient_attention", None)  # the kernel's steps do not call it
    check_in_place(case, torch.float32, "triton")


@needs_interpreter
@pytest.mark.parametrize("case", ["three-heads-odd-dim", "none-kept"], indirect=True)
def test_the_op_takes_one_token_by_the_kernel(case, monkeypatch):
    """The public op, from a state to a new one; the old one stays as it is."""
    inputs, settings, _ = case
    states = [empty_state(inputs, settings)]
    fused = importlib.import_module("linearize.kernels.salient.fused")
    monkeypatch.setattr(fused, "make_rows", None)  # by which every other call begins

    def step(part, real):
        before = [x.clone() for x in states[-1]]
        call = {**settings, "attention_mask": real.long(), "initial_state": states[-1], "return_state": True}
        output, state = salient_attention(*part, **call, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(before, states[-1], strict=True))
        states.append(state)
        return output

    check_steps(case, torch.float32, step, lambda: states[-1])


@needs_interpreter
def test_one_token_with_gradients_has_them():
    inputs, settings, _ = draw_case("grouped")
    settings |= {"return_state": True, "backend": "triton"}
    _, state = salient_attention(*(x[:, :, :20] for x in inputs), **settings)
    last = [x[:, :, 20:21].clone().requires_grad_() for x in inputs]
    output, _ = salient_attention(*last, **settings, initial_state=state)
    with torch.no_grad():
        fast, _ = salient_attention(*last, **settings, initial_state=state)
    assert (output - fast).abs().max() <= 1e-5 and not fast.requires_grad
    assert all(x.any() for x in torch.autograd.grad(output.square().sum(), last))
    value = state.window_value.clone().requires_grad_()
    output, _ = salient_attention(
        *(x.detach() for x in last), **settings, initial_state=state._replace(window_value=value)
    )
    assert torch.autograd.grad(output.square().sum(), value)[0].any()


@needs_interpreter
def test_strided_inputs_a_scaling_and_no_mask():
    """Query, key and value as views of one projection, heads inside: what a model passes."""
    inputs, settings, _ = draw_case("grouped")
    settings["scaling"] = 0.6
    inputs = [x[:1, :, :16] for x in inputs]
    expected, _ = reference(*(x.double() for x in inputs), **settings)
    buffers, count = new_buffers(empty_state(inputs, settings), 1), torch.zeros(1, dtype=torch.int64)
    joined = torch.cat([x.transpose(1, 2).flatten(2) for x in inputs], -1)
    for i in range(16):
        parts = [x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in joined[:, i : i + 1].split([32, 16, 16], -1)]
        output = salient_step_(*parts, **settings, attention_mask=None, buffers=buffers, count=count, backend="triton")
        assert (output - expected[:, :, i : i + 1]).abs().max() <= 1e-4
        count += 1


@needs_interpreter
def test_the_longest_window_and_store():
    """2048 and 1024 keys of random content, one step."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, count, 1, 16, generator=generator) for count in (2, 1, 1)]
    settings = {"window": 2048, "sinks": 4, "kept": 1024, "age_penalty": 0.6, "scaling": None}
    state = empty_state(inputs, settings)._replace(count=torch.tensor([7000]))
    state = SalientState(*(x.normal_(generator=generator) if x.is_floating_point() else x for x in state))
    state.window_mass.abs_().add_(1.0)  # the log of a small one has few digits
    output, after = decode.decode_step(*inputs, **settings, attention_mask=None, state=state)
    wide = SalientState(*(x.double() if x.is_floating_point() else x for x in state))
    expected, last = reference(*(x.double() for x in inputs), **settings, initial_state=wide, return_state=True)
    assert (output - expected).abs().max() <= 2e-5
    for name, a, b in zip(SalientState._fields, by_rank(after), by_rank(SalientState(*last)), strict=True):
        assert (a - b).abs().max() <= 2e-5, name


def test_equal_ranks_fill_the_store_once():
    """Keys of zeros receive the same masses; who is kept is then arbitrary, but it is K = 4 different tokens."""
    inputs, settings, _ = draw_case("three-heads-odd-dim", batch=1)
    inputs[1] *= 0
    settings["age_penalty"] = 0.0
    for backend in ("chunked", "triton") if interpreting() else ("chunked",):
        buffers, count = new_buffers(empty_state(inputs, settings), 1), torch.zeros(1, dtype=torch.int64)
        for i in range(STEPS):
            part = [x[:, :, i : i + 1] for x in inputs]
            salient_step_(*part, **settings, attention_mask=None, buffers=buffers, count=count, backend=backend)
            count += 1
        assert len(buffers.kept_value[0, 0].unique(dim=0)) == 4, backend


def test_a_state_of_other_settings_is_refused():
    inputs, settings, _ = draw_case("grouped")
    state = empty_state(inputs, settings)
    other = empty_state(inputs, settings | {"kept": 4})
    with pytest.raises(ValueError, match=r"window, sinks and kept \(9, 2, 4\), not \(9, 2, 5\)"):
        new_buffers(state, 1).load_(other)


@needs_interpreter
def test_unsupported_calls_give_a_reason():
    inputs, _, _ = draw_case("grouped")
    assert decode.decode_unsupported(*inputs, sinks=128, kept=1024) is None
    assert "float64" in decode.decode_unsupported(*(x.double() for x in inputs), sinks=4, kept=4)
    assert "at most 128" in decode.decode_unsupported(*[torch.zeros(1, 1, 1, 129)] * 3, sinks=4, kept=4)
    assert "1024 kept" in decode.decode_unsupported(*inputs, sinks=4, kept=1025)


@needs_interpreter
def test_a_model_decodes_by_the_kernel(monkeypatch):
    """A session's steps reach the kernel through the run-time backend, and give what the chunked path gives."""
    teacher = make_teacher(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    student = make_student(teacher, {"salient": {"type": "salient", "window": 3, "sinks": 1, "kept_tokens": 2}})
    tokens, logits = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3)), {}
    for backend in ("chunked", "triton"):
        student.set_op_backend(backend)
        session = DecodingSession(student, 2)
        logits[backend] = torch.stack([session.step(tokens[:, i]).clone() for i in range(9)])
        if backend == "chunked":
            monkeypatch.setattr(in_place, "salient_attention", None)
    assert not torch.equal(logits["triton"], logits["chunked"])
    assert (logits["triton"] - logits["chunked"]).abs().max() <= 1e-5 * logits["chunked"].abs().max()
