"""Cosine attention: chunked against the definition in float64, the definition against formulas written out here."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import linearize.modeling.op_cosine as op
import linearize.modeling.op_hybrid_linear_chunked as chunked
from linearize.modeling import CosineState, cosine_attention

HEADS, GROUPS, LENGTH, DIM, VALUE_DIM = 4, 2, 37, 8, 5
SPANS = [(0, 0), (5, 0), (5, 3), (0, 2), (64, 4), (8, 10)]
SIDES = ["query", "key"]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Several chunks and segments at test lengths."""
    monkeypatch.setattr(chunked, "CHUNK", 8)
    monkeypatch.setattr(chunked, "SEGMENT", 24)


def make_inputs(seed=0, batch=2, groups=GROUPS, dtype=torch.float64, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key = draw(batch, HEADS, length, DIM), draw(batch, groups, length, DIM)
    value = draw(batch, groups, length, VALUE_DIM)
    mix = {"exponent": draw(HEADS).sigmoid(), "gain": draw(HEADS)}
    return [query, key, value], mix


def make_mask(kind: str | None, batch=2, length=LENGTH):
    if kind is None:
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, {"left": slice(0, 7), "right": slice(-7, None), "all": slice(None)}[kind]] = False
    return mask


def poison(tensors, mask):
    """NaN where padded: padding must be selected away, never multiplied by zero."""
    return tensors if mask is None else [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in tensors]


def allowed(causal, side, span):
    return causal or side == "query" or span == (0, 0)


def assert_states_equal(left, right, tolerance):
    for name, a, b in zip(CosineState._fields, left, right, strict=True):
        if a is None or b is None:
            assert a is b, name
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert a.numel() == 0 or (a - b).abs().max() <= tolerance, name


def forms(spans):
    """Every combination that the contract allows."""
    return [
        pytest.param(span, side, causal, id=f"window{span[0]}-sinks{span[1]}-{side}-{'causal' if causal else 'both'}")
        for span in spans
        for side in SIDES
        for causal in (True, False)
        if allowed(causal, side, span)
    ]


@pytest.mark.parametrize(("span", "side", "causal"), forms(SPANS))
def test_chunked_equals_reference(span, side, causal):
    for groups, padding, gained in itertools.product(
        [1, GROUPS, HEADS], [None, "left", "right", "all"], [True, False]
    ):
        inputs, mix = make_inputs(groups=groups)
        mask = make_mask(padding)
        inputs = poison(inputs, mask)
        call = {"exponent": mix["exponent"], "gain": mix["gain"] if gained else None, "scale_side": side}
        call |= {"window": span[0], "sinks": span[1], "causal": causal}
        call |= {"attention_mask": mask, "return_state": causal}
        expected, expected_state = cosine_attention(*inputs, **call, backend="reference")
        output, state = cosine_attention(*inputs, **call, backend="chunked")
        assert (output - expected).abs().max() <= 1e-10, (groups, padding, gained)
        if causal:
            assert_states_equal(state, expected_state, 1e-10)
        if mask is not None:
            assert (output[~mask[:, None, :].expand(-1, HEADS, -1)] == 0).all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(("span", "side", "causal"), forms([(0, 0), (5, 3)]))
def test_equals_the_sum_over_pairs(span, side, causal, backend):
    """The formula of the docstring, token by token, with its own count of what each query sees."""
    (query, key, value), mix = make_inputs(batch=1, length=21)
    output, _ = cosine_attention(
        query, key, value, **mix, causal=causal, scale_side=side, window=span[0], sinks=span[1], backend=backend
    )
    cosine = torch.nn.functional.cosine_similarity
    for h, n in itertools.product(range(HEADS), range(21)):
        g, s = h // (HEADS // GROUPS), mix["exponent"][h]
        seen = [j for j in range(21) if (j <= n or not causal) and j >= span[1] and abs(n - j) >= span[0]]
        expected = torch.zeros(VALUE_DIM, dtype=torch.float64)
        for j in seen:
            count = j + 1 if side == "key" and causal else len(seen)
            weight = cosine(query[0, h, n], key[0, g, j], dim=0) / count**s
            expected = expected + mix["gain"][h] * weight * value[0, g, j]
        assert (output[0, h, n] - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("side", SIDES)
def test_published_form(side):
    """Cottention's two forms: bidirectional n^-s on every value, causal c_j^-s on value j; no gain, no window."""
    (query, key, value), mix = make_inputs(groups=HEADS)
    s = mix["exponent"][:, None, None]
    unit_query, unit_key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    output, _ = cosine_attention(query, key, value, exponent=mix["exponent"], causal=False, scale_side=side)
    assert (output - unit_query @ (unit_key.mT @ (value / LENGTH**s))).abs().max() <= 1e-12
    output, _ = cosine_attention(query, key, value, exponent=mix["exponent"], scale_side="key")
    scaled = value / torch.arange(1, LENGTH + 1, dtype=torch.float64)[:, None] ** s
    assert (output - (unit_query @ unit_key.mT).tril() @ scaled).abs().max() <= 1e-12


@pytest.mark.parametrize("side", SIDES)
def test_state_form_equals_parallel_form_at_4096_tokens(side):
    """float32: S_n = S_n-1 + N(k) v^T in calls of 64 tokens, against one product with a triangular mask."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, 4096, 8, generator=generator) for _ in range(3))
    exponent = torch.tensor([0.3, 0.8])
    state, outputs = None, []
    for piece in zip(*(x.split(64, dim=2) for x in (query, key, value)), strict=True):
        output, state = cosine_attention(
            *piece, exponent=exponent, scale_side=side, initial_state=state, return_state=True
        )
        outputs.append(output)
    unit_query, unit_key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
    scale = torch.arange(1, 4097)[:, None] ** -exponent[:, None, None]
    weights = (unit_query @ unit_key.mT).tril_()
    expected = weights @ (value * scale) if side == "key" else scale * (weights @ value)
    assert (torch.cat(outputs, 2) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_rows_are_as_if_alone(padding, causal):
    inputs, mix = make_inputs()
    mask = make_mask(padding)
    call = {**mix, "causal": causal, "window": 5, "sinks": 2}
    output, _ = cosine_attention(*poison(inputs, mask), **call, attention_mask=mask)
    alone, _ = cosine_attention(*(x[:1, :, mask[0]] for x in inputs), **call)
    assert (output[:1, :, mask[0]] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("span", [(0, 0), (0, 3), (5, 0), (5, 3), (16, 2)], ids=str)
def test_any_cut_into_calls_gives_the_same(span, side, padding, backend):
    inputs, mix = make_inputs()
    call = {**mix, "window": span[0], "sinks": span[1], "scale_side": side, "return_state": True, "backend": backend}
    expected, expected_state = cosine_attention(*inputs, **call)
    for cut in ([1] * LENGTH, [2, 7, 20, 8], [36, 1]):
        state, outputs, start = None, [], 0
        for tokens in cut:
            pieces, mask = [x[:, :, start : start + tokens] for x in inputs], None
            if padding:
                pieces, mask = pad_call(pieces, padding)
            output, state = cosine_attention(*pieces, **call, initial_state=state, attention_mask=mask)
            outputs.append({None: output, "left": output[:, :, 2:], "right": output[:, :, :-2]}[padding])
            start += tokens
        assert (torch.cat(outputs, 2) - expected).abs().max() <= 1e-10
        assert_states_equal(state, expected_state, 1e-10)


def pad_call(pieces, side):
    gap = [x.new_full((*x.shape[:2], 2, x.shape[3]), torch.nan) for x in pieces]
    pairs = zip(gap, pieces, strict=True) if side == "left" else zip(pieces, gap, strict=True)
    mask = torch.ones(pieces[0].shape[0], pieces[0].shape[2] + 2)
    mask[:, slice(0, 2) if side == "left" else slice(-2, None)] = 0
    return [torch.cat(pair, 2) for pair in pairs], mask


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("padding", ["all", None], ids=["padding", "no tokens"])
def test_a_row_without_tokens_leaves_its_state(padding, side):
    inputs, mix = make_inputs(length=6)
    call = {**mix, "window": 4, "sinks": 1, "scale_side": side, "return_state": True}
    _, before = cosine_attention(*inputs, **call)
    mask = make_mask(padding, length=6)
    if padding is None:
        inputs = [x[:, :, :0] for x in inputs]
    _, after = cosine_attention(*poison(inputs, mask), **call, initial_state=before, attention_mask=mask)
    assert_states_equal(*([None if x is None else x[:1] for x in state] for state in (after, before)), 0)
    assert after.count.tolist() == ([6, 12] if padding else [6, 6])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("span", [(0, 0), (5, 2)], ids=str)
def test_packed_sequences_equal_separate_calls(span, causal, backend):
    inputs, mix = make_inputs(batch=1)
    bounds = [0, 0, 5, 6, 30, 30, LENGTH]
    call = {**mix, "window": span[0], "sinks": span[1], "causal": causal, "backend": backend}
    packed, _ = cosine_attention(*inputs, **call, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in itertools.pairwise(bounds):
        alone, _ = cosine_attention(*(x[:, :, start:end] for x in inputs), **call)
        assert alone.shape[2] == 0 or (packed[:, :, start:end] - alone).abs().max() <= 1e-12


def test_a_query_that_sees_no_key_and_a_zero_vector_give_zero():
    inputs, mix = make_inputs()
    inputs[0][:, :, 20] = 0
    output, _ = cosine_attention(*inputs, **mix, window=5, sinks=2)
    assert (output[:, :, :7] == 0).all() and (output[:, :, 20] == 0).all() and (output[:, :, 7] != 0).all()


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunk_size_does_not_matter(chunk, monkeypatch):
    inputs, mix = make_inputs()
    expected, _ = cosine_attention(*inputs, **mix, window=5, sinks=2)
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    output, _ = cosine_attention(*inputs, **mix, window=5, sinks=2)
    assert (output - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(("causal", "side"), [(True, "query"), (True, "key"), (False, "query")])
@pytest.mark.parametrize("span", [(0, 0), (3, 1)], ids=str)
def test_gradients(span, causal, side):
    """gradcheck of the chunked path, and its gradients against the definition's, NaN in the padding included."""
    inputs, mix = make_inputs(length=11)
    mask = make_mask("left", length=11)
    mask[0, :7], mask[0, :2] = True, False
    leaves = [x.clone().requires_grad_() for x in (*poison(inputs, mask), *mix.values())]

    def call(backend, *tensors):
        output, _ = cosine_attention(
            *tensors[:3],
            exponent=tensors[3],
            gain=tensors[4],
            causal=causal,
            scale_side=side,
            window=span[0],
            sinks=span[1],
            attention_mask=mask,
            backend=backend,
        )
        return output

    direction = torch.randn(call("chunked", *leaves).shape, dtype=torch.float64)
    ours = torch.autograd.grad((call("chunked", *leaves) * direction).sum(), leaves)
    definition = torch.autograd.grad((call("reference", *leaves) * direction).sum(), leaves)
    for a, b in zip(ours, definition, strict=True):
        assert torch.isfinite(a).all() and (a - b).abs().max() <= 1e-9 * (1 + b.abs().max())
    free = [x.detach().nan_to_num().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *t: call("chunked", *t)[:, :, 2:], free, fast_mode=True)


@pytest.mark.parametrize("groups", [1, GROUPS, HEADS])
@pytest.mark.parametrize(("length", "dim"), [(3, 8), (37, 8), (20, 24)])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_whole_row_takes_the_cheaper_order(sinks, length, dim, groups):
    """Bidirectional without a window: either order of the products is the definition, and no chunk's work is done."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, HEADS, length, dim), (2, groups, length, dim), (2, groups, length, VALUE_DIM)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    mix = make_inputs()[1]
    leaves = [x.requires_grad_() for x in (*inputs, *mix.values())]
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, -length // 3 :] = False

    def gradients(backend, mask):
        call = dict(zip(mix, leaves[3:], strict=True)) | {"causal": False, "sinks": sinks, "backend": backend}
        output, _ = cosine_attention(*leaves[:3], **call, attention_mask=mask)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    for padding in (None, mask):
        for a, b in zip(gradients("chunked", padding), gradients("reference", padding), strict=True):
            assert (a - b).abs().max() <= 1e-11 * (1 + b.abs().max())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cosine_attention(*leaves[:3], **mix, causal=False, sinks=sinks, backend="chunked")
    keys = length - sinks
    by_pairs, by_sum = HEADS * length * keys * (dim + VALUE_DIM), (HEADS * length + groups * keys) * dim * VALUE_DIM
    assert counter.get_total_flops() == 2 * 2 * min(by_pairs, by_sum)


def test_the_memory_of_a_whole_row_is_linear():
    """What is kept for the backward pass, in either order."""
    (query, key, value), mix = make_inputs(length=256)
    for dim in (DIM, 512):
        sizes = []
        leaves = [x.repeat(1, 1, 1, dim // DIM).requires_grad_() for x in (query, key, value)]
        for length in (128, 256):
            sizes.append(0)

            def keep(x, sizes=sizes):
                sizes[-1] += x.numel()
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                cosine_attention(*(x[:, :, :length] for x in leaves), **mix, causal=False, backend="chunked")
        assert sizes[1] <= (2 if dim == DIM else 2.5) * sizes[0]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(("causal", "side"), [(True, "query"), (True, "key"), (False, "query")])
@pytest.mark.parametrize("window", [0, 3])
def test_a_zero_vector_has_a_zero_gradient(window, causal, side, backend):
    """Not 1 / 1e-12 times what comes back; the gradients of all other tokens are as without it."""
    inputs, mix = make_inputs(length=12)
    inputs[0][:, :, 9], inputs[1][:, :, 4] = 0, 0
    leaves = [x.clone().requires_grad_() for x in inputs]
    call = {"causal": causal, "scale_side": side, "window": window, "backend": backend}
    output, _ = cosine_attention(*leaves, **mix, **call)
    query, key, value = torch.autograd.grad(output.square().sum(), leaves)
    assert not query[:, :, 9].any() and not key[:, :, 4].any() and not value[:, :, 4].any()
    assert query[:, :, 8].all() and key[:, :, 3].all() and max(x.abs().max() for x in (query, key, value)) < 1e3


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("span", [(0, 0), (3, 1)], ids=str)
def test_gradients_through_the_state(span, side):
    """Two calls have the gradients of one, and the state's sum is differentiable in and out."""
    inputs, mix = make_inputs(length=12)
    leaves = [x.clone().requires_grad_() for x in (*inputs, *mix.values())]

    def call(*tensors, **options):
        exponent, gain = leaves[3:]
        options |= {"exponent": exponent, "gain": gain, "scale_side": side, "window": span[0], "sinks": span[1]}
        return cosine_attention(*tensors, **options, return_state=True)

    whole, whole_state = call(*leaves[:3])
    first, state = call(*(x[:, :, :7] for x in leaves[:3]))
    second, state = call(*(x[:, :, 7:] for x in leaves[:3]), initial_state=state)
    direction, state_direction = torch.randn_like(whole), torch.randn_like(state.kv)
    expected = (whole * direction).sum() + (whole_state.kv * state_direction).sum()
    split = (torch.cat([first, second], 2) * direction).sum() + (state.kv * state_direction).sum()
    for a, b in zip(torch.autograd.grad(split, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert (a - b).abs().max() <= 1e-10


def test_low_precision_and_autocast_compute_in_float32():
    inputs, mix = make_inputs(dtype=torch.float32)
    half = [x.bfloat16() for x in inputs]
    expected, _ = cosine_attention(*(x.float() for x in half), **mix, window=5)
    output, state = cosine_attention(*half, **mix, window=5, return_state=True)
    assert output.dtype == state.window_key.dtype == torch.bfloat16 and state.kv.dtype == torch.float32
    assert (output.float() - expected).abs().max() <= 2**-8 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = cosine_attention(*(x.float() for x in half), **mix, window=5)
    assert torch.equal(cast, expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"window": -1}, "at least 0"),
        ({"scale_side": "value"}, "unknown scale_side 'value'"),
        ({"scale_side": "key", "causal": False, "sinks": 1}, "window=0 and sinks=0"),
        ({"exponent": torch.ones(1)}, "exponent must hold one number for each of the 4"),
        ({"gain": torch.ones(HEADS, 1)}, "gain must hold one number"),
        ({"causal": False, "return_state": True}, "causal=True"),
        ({"cu_seqlens": torch.tensor([0, LENGTH])}, "batch size 1"),
        ({"backend": "magic"}, "unknown backend"),
        ({"backend": "triton"}, "cannot run this call"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_contradictions_are_refused(change, sentence):
    inputs, mix = make_inputs()
    with pytest.raises(ValueError, match=sentence):
        cosine_attention(*inputs, **{**mix, **change})


def test_tensors_that_do_not_fit_are_refused():
    (query, key, value), mix = make_inputs()
    with pytest.raises(ValueError, match="one width"):
        cosine_attention(query[..., :4], key, value, **mix)
    with pytest.raises(ValueError, match="do not divide"):
        cosine_attention(query[:, :3], key, value, **mix)
    with pytest.raises(ValueError, match="same tokens"):
        cosine_attention(query, key, value[:, :, :4], **mix)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"scale_side": "key"}, "initial_state.kv"), ({"window": 5}, "window and sinks")],
    ids=["side", "window"],
)
def test_a_state_of_another_form_is_refused(change, sentence):
    inputs, mix = make_inputs()
    _, state = cosine_attention(*inputs, **mix, return_state=True)
    with pytest.raises(ValueError, match=sentence):
        cosine_attention(*inputs, **mix, **change, initial_state=state)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_packing_must_cover_the_tokens(backend):
    inputs, mix = make_inputs(batch=1)
    with pytest.raises(ValueError, match=f"from 0 to the {LENGTH} tokens"):
        cosine_attention(*inputs, **mix, cu_seqlens=torch.tensor([0, LENGTH - 1]), backend=backend)


def test_contracts_agree():
    import linearize.kernels.cosine as kernel

    assert kernel.CONTRACT == op.CONTRACT
