"""Contract 2 of cosine attention: a memory that forgets, and the mass of what it holds."""

import importlib
import itertools

import pytest
import torch
from test_cosine import (
    DIM,
    GROUPS,
    HEADS,
    LENGTH,
    SIDES,
    VALUE_DIM,
    assert_states_equal,
    make_inputs,
    make_mask,
    poison,
    short_chunks,  # noqa: F401 # used by every test
)

import linearize.modeling.op_cosine_chunked as cosine_chunked
from linearize.modeling import CosineState, cosine_attention

BACKENDS = ["chunked", "reference"]
SPANS = [(0, 0), (5, 0), (5, 3), (0, 2), (64, 4), (8, 10)]


@pytest.fixture(autouse=True)
def short_masses(monkeypatch, short_chunks):  # noqa: F811
    """The mass runs in chunks and segments of its own."""
    monkeypatch.setattr(cosine_chunked, "CHUNK", 8)
    monkeypatch.setattr(cosine_chunked, "SEGMENT", 24)


def make_call(side, seed=0, batch=2, groups=GROUPS, length=LENGTH, dtype=torch.float64):
    """Inputs, and options with decays of every size, 0 and the closing of a whole memory among them."""
    inputs, mix = make_inputs(seed, batch, groups, dtype, length)
    heads = HEADS if side == "key" else groups
    generator = torch.Generator().manual_seed(seed + 1)
    log_decay = -(3 * torch.randn(batch, heads, length, generator=generator, dtype=torch.float64) - 4).exp().to(dtype)
    log_decay[..., 5], log_decay[..., 11:12] = 0.0, -60.0
    return inputs, {**mix, "scale_side": side, "log_decay": log_decay}


def cut(options, span):
    """The options of a piece of a call."""
    return options | {"log_decay": options["log_decay"][:, :, span]}


def poison_decay(options, mask):
    if mask is None:
        return options
    return options | {"log_decay": options["log_decay"].masked_fill(~mask[:, None], torch.nan)}


def by_recurrence(inputs, options, window, sinks):
    """One row token by token, as the contract says it: forget, take the key that leaves the window, read."""
    query, key, value = (x[0] for x in inputs)
    unit_query, unit_key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    rate, gain, decay = (options[name] for name in ("exponent", "gain", "log_decay"))
    groups, outputs = key.shape[0], []
    ratio = HEADS // groups
    kv, mass = torch.zeros(HEADS, DIM, VALUE_DIM, dtype=query.dtype), torch.zeros(HEADS, dtype=query.dtype)
    for n in range(query.shape[1]):
        forget = decay[0, :, n].exp().repeat_interleave(HEADS // decay.shape[1])
        kv, mass = kv * forget[:, None, None], mass * forget
        j = n - window
        if j >= sinks:
            k, v = (x[:, j].repeat_interleave(ratio, 0) for x in (unit_key, value))
            weight = (j + 1) ** -rate if options["scale_side"] == "key" else torch.ones_like(rate)
            kv, mass = kv + (weight[:, None] * k)[..., None] * v[:, None], mass + 1
        level = gain if options["scale_side"] == "key" else gain * mass.clamp(min=1) ** -rate
        outputs.append(level[:, None] * (unit_query[:, n, :, None] * kv).sum(1))
    return torch.stack(outputs, 1)[None], kv, mass


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_the_definition_is_the_recurrence(span, side):
    inputs, options = make_call(side, batch=1)
    expected, kv, mass = by_recurrence(inputs, options, *span)
    for backend in BACKENDS:
        output, state = cosine_attention(
            *inputs, **options, window=span[0], sinks=span[1], return_state=True, backend=backend
        )
        assert (output - expected).abs().max() <= 1e-10
        assert (state.kv[0].repeat_interleave(HEADS // state.kv.shape[1], 0) - kv).abs().max() <= 1e-10
        assert (state.mass is None) == (side == "key")
        if side == "query":
            assert state.mass.shape == (1, GROUPS)
            assert (state.mass[0].repeat_interleave(HEADS // GROUPS) - mass).abs().max() <= 1e-10


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_chunked_equals_reference(span, side):
    for groups, padding, gained in itertools.product([1, GROUPS, HEADS], [None, "left", "all"], [True, False]):
        inputs, options = make_call(side, groups=groups)
        mask = make_mask(padding)
        call = poison_decay(options, mask) | {"window": span[0], "sinks": span[1], "return_state": True}
        call |= {"attention_mask": mask, "gain": options["gain"] if gained else None}
        inputs = poison(inputs, mask)
        expected, expected_state = cosine_attention(*inputs, **call, backend="reference")
        output, state = cosine_attention(*inputs, **call, backend="chunked")
        assert (output - expected).abs().max() <= 1e-10, (groups, padding, gained)
        assert_states_equal(state, expected_state, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", SIDES)
def test_decay_0_forgets_nothing(side, backend):
    inputs, options = make_call(side)
    call = {"window": 5, "sinks": 2, "return_state": True, "backend": backend}
    zero = torch.zeros_like(options["log_decay"])
    output, state = cosine_attention(*inputs, **options | {"log_decay": zero}, **call)
    plain, plain_state = cosine_attention(*inputs, **options | {"log_decay": None}, **call)
    assert (output - plain).abs().max() <= 1e-12 and plain_state.mass is None
    assert_states_equal(state._replace(mass=None), plain_state, 1e-12)
    if side == "query":
        assert (state.mass == LENGTH - 5 - 2).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [None, "between"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("span", [(0, 0), (0, 3), (5, 0), (5, 3), (16, 2)], ids=str)
def test_any_cut_into_calls_gives_the_same(span, side, padding, backend):
    inputs, options = make_call(side)
    call = {"window": span[0], "sinks": span[1], "return_state": True, "backend": backend}
    expected, expected_state = cosine_attention(*inputs, **options, **call)
    for lengths in ([1] * LENGTH, [2, 7, 20, 8], [36, 1]):
        state, outputs, start = None, [], 0
        for tokens in lengths:
            piece = slice(start, start + tokens)
            tensors, given, mask = [x[:, :, piece] for x in inputs], cut(options, piece), None
            if padding:  # a hole after the first token of every call
                order = torch.tensor([0, 0, *range(1, tokens)])
                mask = torch.ones(2, tokens + 1, dtype=torch.bool)
                mask[:, 1] = False
                tensors = poison([x[:, :, order] for x in tensors], mask)
                given = poison_decay(cut(given, order), mask)
            output, state = cosine_attention(*tensors, **given, **call, initial_state=state, attention_mask=mask)
            outputs.append(output if mask is None else output[:, :, mask[0]])
            start += tokens
        assert (torch.cat(outputs, 2) - expected).abs().max() <= 1e-10
        assert_states_equal(state, expected_state, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", SIDES)
def test_padded_and_packed_rows_are_as_if_alone(side, backend):
    inputs, options = make_call(side)
    call = {"window": 5, "sinks": 2, "backend": backend}
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.3
    output, _ = cosine_attention(*poison(inputs, mask), **poison_decay(options, mask), **call, attention_mask=mask)
    for b in range(2):
        row = [x[b : b + 1, :, mask[b]] for x in inputs]
        given = options | {"log_decay": options["log_decay"][b : b + 1, :, mask[b]]}
        alone, _ = cosine_attention(*row, **given, **call)
        assert (output[b : b + 1, :, mask[b]] - alone).abs().max() <= 1e-12
    inputs, options = make_call(side, batch=1)
    bounds = [0, 4, 4, 30, LENGTH]
    packed, _ = cosine_attention(*inputs, **options, **call, cu_seqlens=torch.tensor(bounds))
    for start, end in itertools.pairwise(bounds):
        piece = slice(start, end)
        alone, _ = cosine_attention(*(x[:, :, piece] for x in inputs), **cut(options, piece), **call)
        assert start == end or (packed[:, :, piece] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", SIDES)
def test_calls_without_tokens_leave_the_state(side, backend):
    """Neither a call of no tokens nor a row that is all padding forgets anything."""
    inputs, options = make_call(side)
    call = {"window": 5, "sinks": 2, "return_state": True, "backend": backend}
    _, state = cosine_attention(*inputs, **options, **call)
    none = [x[:, :, :0] for x in inputs]
    for given in ({}, {"initial_state": state}):
        output, after = cosine_attention(*none, **cut(options, slice(0)), **call, **given)
        assert output.shape[2] == 0
        empty = CosineState._make(None if x is None else torch.zeros_like(x) for x in state)
        assert_states_equal(after, state if given else empty, 0)
    mask = make_mask("all")
    _, after = cosine_attention(
        *poison(inputs, mask), **poison_decay(options, mask), **call, initial_state=state, attention_mask=mask
    )
    first = [CosineState._make(None if x is None else x[:1] for x in given) for given in (after, state)]
    assert_states_equal(*first, 0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("span", [(0, 0), (5, 1)], ids=str)
def test_gradients(span, side, padded):
    """Of every input, log_decay among them, and through a state that is handed on, its mass included."""
    inputs, options = make_call(side)
    mask = make_mask("left") if padded else None
    inputs, options = poison(inputs, mask), poison_decay(options, mask)
    leaves = [x.clone().requires_grad_() for x in inputs]
    held = {name: options[name].clone().requires_grad_() for name in ("exponent", "gain", "log_decay")}
    every = [*leaves, *held.values()]

    def call(backend, at):
        state, outputs = None, []
        for piece in (slice(0, at), slice(at, LENGTH)):
            part = None if mask is None else mask[:, piece]
            output, state = cosine_attention(
                *(x[:, :, piece] for x in leaves), **cut(held, piece), scale_side=side, window=span[0], sinks=span[1],
                attention_mask=part, initial_state=state, return_state=True, backend=backend,
            )  # fmt: skip
            outputs.append(output)
        return torch.cat(outputs, 2), state

    def gradients(backend, at):
        output, state = call(backend, at)
        kept = [x for x in state if x is not None and x.numel() and x.requires_grad]
        assert side == "key" or kept[-1] is state.mass
        generator = torch.Generator().manual_seed(9)
        directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (output, *kept)]
        total = sum((x * d).sum() for x, d in zip((output, *kept), directions, strict=True))
        return torch.autograd.grad(total, every)

    expected = gradients("reference", LENGTH)
    for at in (LENGTH, 30, 9):
        for a, b in zip(gradients("chunked", at), expected, strict=True):
            assert torch.isfinite(a).all() and (a - b).abs().max() <= 1e-10 * (1 + b.abs().max())
    assert expected[-1].abs().max() > 1e-6


def test_strong_decays_stay_exact_in_float32():
    inputs, options = make_call("query", length=300, dtype=torch.float32)
    options["log_decay"] = options["log_decay"] * 20
    call = {"window": 5, "sinks": 2, "return_state": True}
    output, state = cosine_attention(*inputs, **options, **call)
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    exact, exact_state = cosine_attention(*(x.double() for x in inputs), **wide, **call, backend="reference")
    assert torch.isfinite(output).all() and (output - exact).abs().max() <= 2e-5 * exact.abs().max()
    assert state.mass.dtype == torch.float32 and (state.mass - exact_state.mass).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("side", "change", "sentence"),
    [
        ("query", {"causal": False}, "log_decay needs causal=True"),
        ("query", {"log_decay": torch.zeros(2, HEADS, LENGTH)}, "one for each head of the sums"),
        ("key", {"log_decay": torch.zeros(2, GROUPS, LENGTH)}, "one for each head of the sums"),
        ("query", {"log_decay": torch.zeros(2, GROUPS, LENGTH - 1)}, "one for each head of the sums"),
    ],
)
def test_contradictions_are_refused(side, change, sentence):
    inputs, options = make_call(side)
    with pytest.raises(ValueError, match=sentence):
        cosine_attention(*inputs, **options | change)


def test_a_state_goes_on_as_it_began():
    inputs, options = make_call("query")
    plain = options | {"log_decay": None}
    for first, second, held in ((options, plain, "the mass"), (plain, options, "no mass")):
        _, state = cosine_attention(*inputs, **first, return_state=True)
        with pytest.raises(ValueError, match=f"holds {held} of a memory that forgets"):
            cosine_attention(*inputs, **second, initial_state=state)


def test_the_kernels_say_that_they_do_not_forget(monkeypatch):
    fused = importlib.import_module("linearize.kernels.cosine.fused")  # the package has a function of that name
    monkeypatch.setattr(fused, "unavailable", lambda *tensors: None)
    inputs, options = make_call("query", dtype=torch.float32)
    assert "do not forget yet" in fused.unsupported(*inputs, **options)
    assert fused.unsupported(*inputs, **options | {"log_decay": None}) is None


def test_the_state_ends_with_the_new_field():
    """The fields of contract 1 keep their places, which kernels and states of earlier calls rely on."""
    assert CosineState._fields[-2:] == ("count", "mass")
