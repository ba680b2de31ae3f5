"""Contract 2 of the op: a memory that forgets, and maps that read other tensors than the scores do."""

import itertools

import pytest
import torch
from test_hybrid_linear import (
    DIM,
    GROUPS,
    HEADS,
    LENGTH,
    SPANS,
    assert_states_equal,
    make_inputs,
    make_mask,
    poison,
    short_chunks,  # noqa: F401 # used by every test
)

import linearize.modeling.op_hybrid_linear as op
import linearize.modeling.op_hybrid_linear_chunked as chunked
from linearize.modeling import FeatureMapWeights, HybridLinearState, hybrid_linear_attention
from linearize.modeling.op_hybrid_linear_decay import chunk_decay
from linearize.modeling.op_hybrid_linear_decode import hybrid_linear_step_, new_buffers, read_buffers

BACKENDS = ["chunked", "reference"]
MAP_DIM = DIM + 2  # the maps may read something of another width


def make_call(seed=0, batch=2, key_heads=HEADS, as_weights=True, maps=True, length=LENGTH, dtype=torch.float64):
    """Inputs and options with decays of every size, 0 and the closing of a whole memory among them."""
    inputs, mix = make_inputs(seed, batch, key_heads, as_weights=as_weights, length=length, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    log_decay = -(3 * draw(batch, key_heads, length) - 4).exp()
    log_decay[..., 5], log_decay[..., 11] = 0.0, -60.0
    options = {**mix, "log_decay": log_decay}
    if maps and as_weights:
        options |= {"map_query": draw(batch, HEADS, length, MAP_DIM), "map_key": draw(batch, GROUPS, length, MAP_DIM)}
        for place in (3, 4):
            weight = draw(inputs[place].weight.shape[0], MAP_DIM, 6)
            inputs[place] = inputs[place]._replace(weight=weight, magnitude=0.3 * weight[..., 0])
    return inputs, options


def cut(options, span):
    """The options of a piece of a call."""
    return {name: x[:, :, span] if name in op.PER_TOKEN else x for name, x in options.items()}


def poison_options(options, mask):
    if mask is None:
        return options
    gap = ~mask[:, None]
    fill = {name: x.masked_fill(gap if x.dim() == 3 else gap[..., None], torch.nan) for name, x in options.items()
            if name in op.PER_TOKEN}  # fmt: skip
    return options | fill


def by_recurrence(inputs, options, window, sinks):
    """One row token by token, as the contract says it: forget, take the key that leaves the window, read."""
    query, key, value, phi_q, phi_k = inputs
    ratio, outputs = HEADS // GROUPS, []
    weight, shift, decay = (options[name] for name in ("window_weight", "window_shift", "log_decay"))
    kv = torch.zeros(HEADS, phi_q.shape[-1], value.shape[-1], dtype=query.dtype)
    normalizer = kv[..., 0].clone()
    wide = HEADS // phi_k.shape[1]
    for n in range(query.shape[2]):
        forget = decay[0, :, n].exp().repeat_interleave(wide)
        kv, normalizer = kv * forget[:, None, None], normalizer * forget[:, None]
        if n - window >= sinks:
            phi = phi_k[0, :, n - window].repeat_interleave(wide, 0)
            v = value[0, :, n - window].repeat_interleave(ratio, 0)
            kv, normalizer = kv + phi[..., None] * v[:, None], normalizer + phi
        q, f = query[0, :, n], phi_q[0, :, n]
        numerator, total = (f[..., None] * kv).sum(1), (f * normalizer).sum(-1)
        near = [j for j in range(n + 1) if n - j < window or j < sinks]
        if near:
            k, v = (x[0][:, near].repeat_interleave(ratio, 0) for x in (key, value))
            scores = (q[:, None] * k).sum(-1) * DIM**-0.5
            mass = (weight.log() + shift * scores.logsumexp(-1)).clamp(-30, 30).exp()
            numerator = numerator + mass[:, None] * (scores.softmax(-1)[..., None] * v).sum(1)
            total = total + mass
        outputs.append(numerator / total[:, None].clamp(min=1e-20))
    return torch.stack(outputs, 1)[None], kv, normalizer


@pytest.mark.parametrize("key_heads", [HEADS, GROUPS])
@pytest.mark.parametrize("span", [(0, 0), (5, 3), (0, 2), (8, 10)], ids=str)
def test_the_definition_is_the_recurrence(span, key_heads):
    inputs, options = make_call(batch=1, key_heads=key_heads, as_weights=False)
    call = {**options, "window": span[0], "sinks": span[1], "return_state": True}
    expected, kv, normalizer = by_recurrence(inputs, options, *span)
    for backend in BACKENDS:
        output, state = hybrid_linear_attention(*inputs, **call, backend=backend)
        assert (output - expected).abs().max() <= 1e-10
        per_head = HEADS // key_heads
        assert (state.kv[0].repeat_interleave(per_head, 0) - kv).abs().max() <= 1e-10
        assert (state.normalizer[0].repeat_interleave(per_head, 0) - normalizer).abs().max() <= 1e-10


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_chunked_equals_reference(span):
    cases = itertools.product([(True, True), (True, False), (False, False)], [HEADS, GROUPS], [None, "left", "all"])
    for (as_weights, maps), key_heads, padding in cases:
        inputs, options = make_call(key_heads=key_heads, as_weights=as_weights, maps=maps)
        mask = make_mask(padding)
        call = poison_options(options, mask) | {"window": span[0], "sinks": span[1]}
        call |= {"attention_mask": mask, "return_state": True}
        inputs = poison(inputs, mask)
        expected, expected_state = hybrid_linear_attention(*inputs, **call, backend="reference")
        output, state = hybrid_linear_attention(*inputs, **call, backend="chunked")
        assert (output - expected).abs().max() <= 1e-10, (as_weights, maps, key_heads, padding)
        assert_states_equal(state, expected_state, 1e-10)
        assert (state.window_map_key is not None) == maps


@pytest.mark.parametrize("key_heads", [HEADS, GROUPS])
def test_maps_read_their_own_tensors_in_both_directions(key_heads):
    """Features that come as tensors are what a map gives on the same tensors."""
    inputs, options = make_call(key_heads=key_heads)
    reads = {name: options.pop(name) for name in ("map_query", "map_key")}
    given = [chunked.apply_feature_map(reads[name], maps) for name, maps in zip(reads, inputs[3:], strict=True)]
    for causal, backend in itertools.product([True, False], BACKENDS):
        call = {**options, "window": 5, "sinks": 2, "causal": causal, "backend": backend}
        if not causal:
            call.pop("log_decay")
        expected, _ = hybrid_linear_attention(*inputs[:3], *given, **call)
        output, _ = hybrid_linear_attention(*inputs, **reads, **call)
        assert (output - expected).abs().max() <= 1e-12


def test_none_is_contract_1_and_decay_0_forgets_nothing():
    inputs, options = make_call(maps=False)
    options["log_decay"] = torch.zeros_like(options["log_decay"])
    call = {**options, "window": 5, "sinks": 2, "return_state": True}
    output, state = hybrid_linear_attention(*inputs, **call)
    plain, plain_state = hybrid_linear_attention(*inputs, **call | {"log_decay": None})
    assert (output - plain).abs().max() <= 1e-12
    assert_states_equal(state, plain_state, 1e-12)
    same, _ = hybrid_linear_attention(*inputs, **call, map_query=inputs[0], map_key=inputs[1])
    assert torch.equal(same, output)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [None, "between"])
@pytest.mark.parametrize("span", [(0, 0), (0, 3), (5, 0), (5, 3), (16, 2)], ids=str)
def test_any_cut_into_calls_gives_the_same(span, padding, backend):
    inputs, options = make_call(key_heads=GROUPS)
    call = {"window": span[0], "sinks": span[1], "return_state": True, "backend": backend}
    expected, expected_state = hybrid_linear_attention(*inputs, **options, **call)
    for lengths in ([1] * LENGTH, [2, 7, 20, 8], [36, 1]):
        state, outputs, start = None, [], 0
        for tokens in lengths:
            piece = slice(start, start + tokens)
            tensors, given, mask = [x[:, :, piece] for x in inputs[:3]], cut(options, piece), None
            if padding:  # a hole after the first token of every call
                order = torch.tensor([0, 0, *range(1, tokens)])
                mask = torch.ones(2, tokens + 1, dtype=torch.bool)
                mask[:, 1] = False
                tensors = poison([x[:, :, order] for x in tensors], mask)
                given = poison_options(cut(given, order), mask)
            output, state = hybrid_linear_attention(
                *tensors, *inputs[3:], **given, **call, initial_state=state, attention_mask=mask
            )
            outputs.append(output if mask is None else output[:, :, mask[0]])
            start += tokens
        assert (torch.cat(outputs, 2) - expected).abs().max() <= 1e-10
        assert_states_equal(state, expected_state, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_and_packed_rows_are_as_if_alone(backend):
    inputs, options = make_call()
    call = {"window": 5, "sinks": 2, "backend": backend}
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.3
    output, _ = hybrid_linear_attention(
        *poison(inputs, mask), **poison_options(options, mask), **call, attention_mask=mask
    )
    for b in range(2):
        row = [x[b : b + 1, :, mask[b]] for x in inputs[:3]]
        given = {name: x[b : b + 1, :, mask[b]] if name in op.PER_TOKEN else x for name, x in options.items()}
        alone, _ = hybrid_linear_attention(*row, *inputs[3:], **given, **call)
        assert (output[b : b + 1, :, mask[b]] - alone).abs().max() <= 1e-12
    inputs, options = make_call(batch=1)
    bounds = [0, 4, 4, 30, LENGTH]
    packed, _ = hybrid_linear_attention(*inputs, **options, **call, cu_seqlens=torch.tensor(bounds))
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        piece = slice(start, end)
        tensors = [x[:, :, piece] for x in inputs[:3]]
        alone, _ = hybrid_linear_attention(*tensors, *inputs[3:], **cut(options, piece), **call)
        assert start == end or (packed[:, :, piece] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_without_tokens_leaves_the_state(backend):
    inputs, options = make_call()
    call = {"window": 5, "sinks": 2, "return_state": True, "backend": backend}
    _, state = hybrid_linear_attention(*inputs, **options, **call)
    none = [x[:, :, :0] for x in inputs[:3]]
    output, after = hybrid_linear_attention(*none, *inputs[3:], **cut(options, slice(0)), **call, initial_state=state)
    assert output.shape[2] == 0
    assert_states_equal(after, state, 0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("span", [(0, 0), (5, 1)], ids=str)
@pytest.mark.parametrize(("key_heads", "as_weights"), [(HEADS, True), (GROUPS, True), (GROUPS, False)])
def test_gradients(key_heads, as_weights, span, padded):
    """Of every input, log_decay, map_query and map_key among them, and through a state that is handed on."""
    inputs, options = make_call(key_heads=key_heads, as_weights=as_weights)
    mask = make_mask("left") if padded else None
    inputs, options = poison(inputs, mask), poison_options(options, mask)
    leaves = [*inputs[:3], *(inputs[3:] if not as_weights else [])]
    leaves = [x.clone().requires_grad_() for x in leaves]
    weights = [[x.clone().requires_grad_() for x in maps[:3]] for maps in inputs[3:]] if as_weights else []
    held = {name: x.clone().requires_grad_() for name, x in options.items()}
    every = [*leaves, *itertools.chain(*weights), *held.values()]

    def call(backend, at):
        features = [FeatureMapWeights(*w, "softmax") for w in weights] or leaves[3:]
        state, outputs = None, []
        for piece in (slice(0, at), slice(at, LENGTH)):
            now = [x[:, :, piece] for x in leaves[:3]]
            phi = features if as_weights else [x[:, :, piece] for x in features]
            part = None if mask is None else mask[:, piece]
            output, state = hybrid_linear_attention(
                *now, *phi, **cut(held, piece), window=span[0], sinks=span[1], attention_mask=part,
                initial_state=state, return_state=True, backend=backend,
            )  # fmt: skip
            outputs.append(output)
        return torch.cat(outputs, 2), state

    generator = torch.Generator().manual_seed(9)

    def gradients(backend, at):
        output, state = call(backend, at)
        kept = [x for x in state if x is not None and x.requires_grad]
        directions = [torch.randn(x.shape, generator=generator.manual_seed(9), dtype=x.dtype) for x in (output, *kept)]
        total = sum((x * d).sum() for x, d in zip((output, *kept), directions, strict=True))
        return torch.autograd.grad(total, every, materialize_grads=True)  # no softmax, no gradient

    expected = gradients("reference", LENGTH)
    for at in (LENGTH, 30, 9):
        for a, b in zip(gradients("chunked", at), expected, strict=True):
            assert torch.isfinite(a).all() and (a - b).abs().max() <= 1e-10 * (1 + b.abs().max())
    decay = expected[[x is held["log_decay"] for x in every].index(True)]
    assert decay.abs().max() > 1e-6


def test_no_exponential_of_a_positive_number():
    """Long strong decays: every weight is between 0 and 1, and what a key weighs close by is exact in float32."""
    log_decay = torch.full((1, 1, 6, 8), -200.0)
    log_decay[..., -1, 3:] = -0.01
    weights = chunk_decay(log_decay)
    for x in weights:
        assert ((x >= 0) & (x <= 1)).all()
    assert (weights.pairs[0, 0, -1, 7, 3] - torch.tensor(-0.04).exp()).abs() <= 1e-4
    inputs, options = make_call(length=300, dtype=torch.float32)
    options["log_decay"] = options["log_decay"] * 20
    output, state = hybrid_linear_attention(*inputs, **options, window=5, sinks=2, return_state=True)
    double = [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]
    double[3:] = [FeatureMapWeights(*(y.double() for y in x[:3]), x.activation) for x in inputs[3:]]
    exact, _ = hybrid_linear_attention(
        *double, **{name: x.double() for name, x in options.items()}, window=5, sinks=2, backend="reference"
    )
    assert torch.isfinite(output).all() and (output - exact).abs().max() <= 2e-5 * exact.abs().max()
    assert all(torch.isfinite(x).all() for x in state if x is not None)


def test_linear_share_with_a_memory_that_forgets():
    inputs, options = make_call(batch=1)
    share = op.linear_share(*inputs, **options, window=5, sinks=2)
    assert (share[:, :, :5] == 0).all() and ((share >= 0) & (share <= 1)).all()
    n = 30
    far = torch.zeros(1, GROUPS, LENGTH, 1, dtype=torch.float64)
    far[:, :, 2 : n - 4] = 1
    output, _ = hybrid_linear_attention(inputs[0], inputs[1], far, *inputs[3:], **options, window=5, sinks=2)
    assert (output[:, :, n, 0] - share[:, :, n]).abs().max() <= 1e-12


def test_low_precision_keeps_the_dtype_of_map_keys():
    inputs, options = make_call(dtype=torch.float32)
    reads = {name: options.pop(name).bfloat16() for name in ("map_query", "map_key")}
    half = [x.bfloat16() for x in inputs[:3]]
    call = {**options, "window": 5, "return_state": True}
    expected, _ = hybrid_linear_attention(
        *(x.float() for x in half), *inputs[3:], **{k: x.float() for k, x in reads.items()}, **call
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = hybrid_linear_attention(*half, *inputs[3:], **reads, **call)
    assert state.window_map_key.dtype == torch.bfloat16 and state.kv.dtype == torch.float32
    assert (output.float() - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.parametrize("span", [(0, 0), (5, 2)], ids=str)
def test_steps_in_place_are_the_op(span):
    inputs, options = make_call(dtype=torch.float32, key_heads=GROUPS)
    weight, shift = options.pop("window_weight"), options.pop("window_shift")
    call = {"window": span[0], "sinks": span[1], "window_shift": shift}
    none = [x[:, :, :0] for x in inputs[:3]]
    state = hybrid_linear_attention(
        *none, *inputs[3:], **cut(options, slice(0)), **call, window_weight=weight, return_state=True
    )[1]
    buffers, count = new_buffers(state, 2), torch.zeros(2, dtype=torch.int64)
    expected, last = hybrid_linear_attention(
        *inputs, **options, **call, window_weight=weight, return_state=True, backend="reference"
    )
    for n in range(LENGTH):
        piece = slice(n, n + 1)
        output = hybrid_linear_step_(
            *(x[:, :, piece] for x in inputs[:3]), *inputs[3:], **cut(options, piece), **call,
            window_weight=weight.log(), log_weight=True, buffers=buffers, count=count,
        )  # fmt: skip
        count += 1
        assert (output - expected[:, :, piece]).abs().max() <= 1e-5 * expected.abs().max()
    assert_states_equal(read_buffers(buffers, count), last, 1e-4)
    buffers.reorder_(torch.tensor([1, 1]))
    for x in read_buffers(buffers, count):
        assert x is None or torch.equal(x[0], x[1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"map_query": None}, "both map_query and map_key"),
        ({"map_key": None}, "both map_query and map_key"),
        ({"map_key": torch.zeros(2, HEADS, LENGTH, MAP_DIM)}, "map_key is"),
        ({"causal": False}, "log_decay needs causal=True"),
        ({"log_decay": torch.zeros(2, GROUPS, LENGTH)}, "one for each key feature head"),
        ({"log_decay": torch.zeros(2, HEADS, LENGTH, 1)}, "one for each key feature head"),
        ({"log_decay": torch.zeros(2, HEADS, LENGTH - 1)}, "one for each key feature head"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_contradictions_are_refused(change, sentence):
    inputs, options = make_call()
    with pytest.raises(ValueError, match=sentence):
        hybrid_linear_attention(*inputs, **options | change)


def test_maps_without_weights_and_states_that_do_not_fit_are_refused():
    inputs, options = make_call(as_weights=False)
    reads = {"map_query": inputs[0], "map_key": inputs[1]}
    with pytest.raises(ValueError, match="give both features as maps"):
        hybrid_linear_attention(*inputs, **options, **reads)
    with pytest.raises(ValueError, match="log_decay needs features"):
        hybrid_linear_attention(*inputs[:3], None, None, log_decay=options["log_decay"])
    inputs, options = make_call()
    _, state = hybrid_linear_attention(*inputs, **options, return_state=True)
    without = {name: x for name, x in options.items() if not name.startswith("map_")}
    plain, _ = make_inputs()
    with pytest.raises(ValueError, match="holds keys of map_key"):
        hybrid_linear_attention(*plain, **without, initial_state=state)
    _, state = hybrid_linear_attention(*plain, **without, return_state=True)
    assert state.window_map_key is None
    with pytest.raises(ValueError, match="holds no keys of map_key"):
        hybrid_linear_attention(*inputs, **options, initial_state=state)


def test_the_state_ends_with_the_new_field():
    """The fields of contract 1 keep their places, which kernels and states of earlier calls rely on."""
    assert HybridLinearState._fields[-2:] == ("count", "window_map_key")
