"""The op: chunked against the definition in float64, and every promise of its contract."""

import itertools

import pytest
import torch

import linearize.modeling.op_dispatch as dispatch
import linearize.modeling.op_hybrid_linear as op
import linearize.modeling.op_hybrid_linear_chunked as chunked
from linearize.modeling import FeatureMapWeights, HybridLinearState, hybrid_linear_attention

HEADS, GROUPS, LENGTH, DIM, WIDTH = 4, 2, 37, 8, 6
SPANS = [(0, 0), (5, 0), (5, 3), (0, 2), (64, 4), (8, 10)]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Several chunks and segments at test lengths."""
    monkeypatch.setattr(chunked, "CHUNK", 8)
    monkeypatch.setattr(chunked, "SEGMENT", 24)


def make_inputs(
    seed=0, batch=2, key_heads=HEADS, activation="softmax", as_weights=True, dtype=torch.float64, length=LENGTH
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key = 1.5 * draw(batch, HEADS, length, DIM), 1.5 * draw(batch, GROUPS, length, DIM)
    value = draw(batch, GROUPS, length, DIM + 1)
    if as_weights:
        features = [
            FeatureMapWeights(draw(h, DIM, WIDTH), draw(h, WIDTH), 0.3 * draw(h, DIM), activation)
            for h in (HEADS, key_heads)
        ]
    else:
        features = [draw(batch, h, length, WIDTH).abs() for h in (HEADS, key_heads)]
    mix = {"window_weight": draw(HEADS).abs() + 0.1, "window_shift": draw(HEADS)}
    return [query, key, value, *features], mix


def make_mask(kind: str | None, batch=2, length=LENGTH):
    if kind is None:
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, {"left": slice(0, 7), "right": slice(-7, None), "all": slice(None)}[kind]] = False
    return mask


def poison(tensors, mask):
    """NaN where padded: padding must be selected away, never multiplied by zero."""
    if mask is None:
        return tensors
    gap = ~mask[:, None, :, None]
    return [x.masked_fill(gap, torch.nan) if isinstance(x, torch.Tensor) else x for x in tensors]


def assert_states_equal(left, right, tolerance):
    for name, a, b in zip(HybridLinearState._fields, left, right, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype, name
            assert a.numel() == 0 or (a - b).abs().max() <= tolerance, name


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("reference_level", ["logsumexp", "max"])
@pytest.mark.parametrize("span", SPANS, ids=lambda s: f"window{s[0]}-sinks{s[1]}")
def test_chunked_equals_reference(span, reference_level, causal):
    options = itertools.product(
        [True, False], [HEADS, GROUPS], ["softmax", "exp", "relu", "elu"], [None, "left", "right", "all"]
    )
    for as_weights, key_heads, activation, padding in options:
        if not as_weights and activation != "softmax":
            continue
        inputs, mix = make_inputs(key_heads=key_heads, activation=activation, as_weights=as_weights)
        mask = make_mask(padding)
        inputs = poison(inputs, mask)
        call = {**mix, "window": span[0], "sinks": span[1], "causal": causal, "window_reference": reference_level}
        call |= {"attention_mask": mask, "return_state": causal}
        expected, expected_state = hybrid_linear_attention(*inputs, **call, backend="reference")
        output, state = hybrid_linear_attention(*inputs, **call, backend="chunked")
        assert (output - expected).abs().max() <= 1e-10, (as_weights, key_heads, activation, padding)
        if causal:
            assert_states_equal(state, expected_state, 1e-10)
        if mask is not None:
            assert (output[~mask[:, None, :].expand(-1, HEADS, -1)] == 0).all()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_padded_rows_are_as_if_alone(padding, causal):
    inputs, mix = make_inputs(as_weights=False)
    mask = make_mask(padding)
    call = {**mix, "window": 5, "sinks": 2, "causal": causal}
    output, _ = hybrid_linear_attention(*poison(inputs, mask), **call, attention_mask=mask)
    real = slice(None) if mask is None else mask[0]
    alone, _ = hybrid_linear_attention(*(x[:1, :, real] for x in inputs), **call)
    assert (output[:1, :, real] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("span", [(0, 0), (0, 3), (5, 0), (5, 3), (16, 2)], ids=str)
def test_any_cut_into_calls_gives_the_same(span, padding, backend):
    inputs, mix = make_inputs()
    call = {**mix, "window": span[0], "sinks": span[1], "return_state": True, "backend": backend}
    expected, expected_state = hybrid_linear_attention(*inputs, **call)
    for cut in ([1] * LENGTH, [2, 7, 20, 8], [36, 1]):
        state, outputs, start = None, [], 0
        for tokens in cut:
            pieces, mask = [x[:, :, start : start + tokens] for x in inputs[:3]], None
            if padding:
                pieces, mask = pad_call(pieces, padding)
            output, state = hybrid_linear_attention(
                *pieces, *inputs[3:], **call, initial_state=state, attention_mask=mask
            )
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


@pytest.mark.parametrize("as_weights", [True, False], ids=["maps", "features"])
def test_a_row_of_padding_leaves_its_state(as_weights):
    inputs, mix = make_inputs(as_weights=as_weights, length=6)
    call = {**mix, "window": 4, "sinks": 1, "return_state": True}
    _, before = hybrid_linear_attention(*inputs, **call)
    mask = make_mask("all", length=6)
    _, after = hybrid_linear_attention(*poison(inputs, mask), **call, initial_state=before, attention_mask=mask)
    assert_states_equal(
        [None if x is None else x[:1] for x in after], [None if x is None else x[:1] for x in before], 0
    )
    assert after.count.tolist() == [6, 12]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_packed_sequences_equal_separate_calls(causal, backend):
    inputs, mix = make_inputs(batch=1, as_weights=False)
    bounds = [0, 5, 6, 30, LENGTH]
    call = {**mix, "window": 5, "sinks": 2, "causal": causal, "backend": backend}
    packed, _ = hybrid_linear_attention(*inputs, **call, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        alone, _ = hybrid_linear_attention(*(x[:, :, start:end] for x in inputs), **call)
        assert (packed[:, :, start:end] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_empty_sequences_have_no_output(causal, backend):
    call = {"window": 5, "sinks": 3, "causal": causal, "backend": backend}
    inputs, mix = make_inputs(batch=1)
    expected, _ = hybrid_linear_attention(*inputs, **mix, **call, cu_seqlens=torch.tensor([0, 4, LENGTH]))
    packed, _ = hybrid_linear_attention(*inputs, **mix, **call, cu_seqlens=torch.tensor([0, 0, 4, 4, LENGTH, LENGTH]))
    assert torch.equal(packed, expected)
    none, mix = make_inputs(batch=2, length=0)
    output, _ = hybrid_linear_attention(*none, **mix, **call)
    assert output.shape == (2, HEADS, 0, DIM + 1)


@pytest.mark.parametrize("as_weights", [True, False])
def test_a_call_without_tokens_leaves_the_state(as_weights):
    call = {"window": 5, "sinks": 3, "return_state": True}
    inputs, mix = make_inputs(as_weights=as_weights)
    none, _ = make_inputs(as_weights=as_weights, length=0)
    _, state = hybrid_linear_attention(*inputs, **mix, **call)
    _, after = hybrid_linear_attention(*none, **mix, **call, initial_state=state)
    assert_states_equal(after, state, 0)


@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e3])
def test_is_softmax_attention_inside_the_window(weight):
    inputs, _ = make_inputs(dtype=torch.float32, length=16)
    query, key, value = inputs[:3]
    mix = {"window_weight": torch.full((HEADS,), weight), "window_shift": torch.randn(HEADS)}
    output, _ = hybrid_linear_attention(*inputs, **mix, window=16)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert (output - expected).abs().max() <= 1e-5


def test_later_tokens_do_not_change_earlier_outputs():
    inputs, mix = make_inputs()
    full, _ = hybrid_linear_attention(*inputs, **mix, window=5, sinks=2)
    short, _ = hybrid_linear_attention(*(x[:, :, :23] for x in inputs[:3]), *inputs[3:], **mix, window=5, sinks=2)
    assert (full[:, :, :23] - short).abs().max() <= 1e-12


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_chunk_size_does_not_matter(chunk, monkeypatch):
    inputs, mix = make_inputs(dtype=torch.float32)
    expected, _ = hybrid_linear_attention(*inputs, **mix, window=5, sinks=2)
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    output, _ = hybrid_linear_attention(*inputs, **mix, window=5, sinks=2)
    assert (output - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("level", ["logsumexp", "max"])
def test_gradients(level, causal):
    """gradcheck of the chunked path, and its gradients against the definition's, NaN in the padding included."""
    inputs, mix = make_inputs(length=11, as_weights=True)
    mask = make_mask("left", length=11)
    mask[0, :7], mask[0, :2] = True, False
    maps = inputs[3:]
    leaves = [*poison(inputs[:3], mask), *(x for m in maps for x in m[:3]), *mix.values()]
    leaves = [x.clone().requires_grad_() for x in leaves]

    def call(backend, *tensors):
        query_map, key_map = FeatureMapWeights(*tensors[3:6], "softmax"), FeatureMapWeights(*tensors[6:9], "softmax")
        output, _ = hybrid_linear_attention(
            *tensors[:3],
            query_map,
            key_map,
            window_weight=tensors[9],
            window_shift=tensors[10],
            window_reference=level,
            window=3,
            sinks=1,
            causal=causal,
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


def test_gradients_through_the_state():
    inputs, mix = make_inputs(length=12, as_weights=False)
    leaves = [x.clone().requires_grad_() for x in inputs]
    call = {**mix, "window": 3, "sinks": 1}
    whole, _ = hybrid_linear_attention(*leaves, **call)
    first, state = hybrid_linear_attention(*(x[:, :, :7] for x in leaves), **call, return_state=True)
    second, _ = hybrid_linear_attention(*(x[:, :, 7:] for x in leaves), **call, initial_state=state)
    direction = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * direction).sum(), leaves)
    split = torch.autograd.grad((torch.cat([first, second], 2) * direction).sum(), leaves)
    for a, b in zip(split, expected, strict=True):
        assert (a - b).abs().max() <= 1e-10


def test_arms_by_arguments():
    """Features None is window softmax alone; window and sinks 0 sends every key through the linear branch."""
    inputs, mix = make_inputs(as_weights=False)
    query, key, value, phi_q, phi_k = inputs
    output, _ = hybrid_linear_attention(query, key, value, None, None, window=5, sinks=2)
    n, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    near = (j <= n) & ((n - j < 5) | (j < 2))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=near, enable_gqa=True)
    assert (output - expected).abs().max() <= 1e-12
    output, _ = hybrid_linear_attention(*inputs, window=0, sinks=0)
    pairs = (phi_q @ phi_k.mT).tril()
    expected = pairs @ value.repeat_interleave(HEADS // GROUPS, 1) / pairs.sum(-1, keepdim=True)
    assert (output - expected).abs().max() <= 1e-12


def test_linear_share_is_the_weight_of_the_far_keys():
    """With values 1 for far keys and 0 in the window the output is the share itself."""
    inputs, mix = make_inputs(as_weights=False, batch=1)
    share = op.linear_share(*inputs, **mix, window=5, sinks=2)
    assert (share[:, :, :5] == 0).all() and ((share >= 0) & (share <= 1)).all()
    n = 30
    far = torch.zeros(1, GROUPS, LENGTH, 1, dtype=torch.float64)
    far[:, :, 2 : n - 4] = 1
    output, _ = hybrid_linear_attention(inputs[0], inputs[1], far, *inputs[3:], **mix, window=5, sinks=2)
    assert (output[:, :, n, 0] - share[:, :, n]).abs().max() <= 1e-12


def test_low_precision_and_autocast_compute_in_float32():
    inputs, mix = make_inputs(dtype=torch.float32)
    half = [x.bfloat16() for x in inputs[:3]]
    expected, _ = hybrid_linear_attention(*(x.float() for x in half), *inputs[3:], **mix, window=5)
    output, state = hybrid_linear_attention(*half, *inputs[3:], **mix, window=5, return_state=True)
    assert (
        output.dtype == torch.bfloat16 and state.kv.dtype == torch.float32 and state.window_key.dtype == torch.bfloat16
    )
    assert (output.float() - expected).abs().max() <= 2**-8 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = hybrid_linear_attention(*(x.float() for x in half), *inputs[3:], **mix, window=5)
    assert torch.equal(cast, expected)


def test_state_does_not_drift_over_many_tokens():
    """2048 tokens one by one in bf16: the float32 sums equal the prefill's (the field's normalisers stop growing)."""
    inputs, mix = make_inputs(batch=1, length=2048, dtype=torch.bfloat16)
    maps = [FeatureMapWeights(*(x.float() for x in m[:3]), "softmax") for m in inputs[3:]]
    mix = {name: x.float() for name, x in mix.items()}
    _, expected = hybrid_linear_attention(*inputs[:3], *maps, **mix, window=16, sinks=2, return_state=True)
    state = None
    for start in range(0, 2048, 8):
        piece = [x[:, :, start : start + 8] for x in inputs[:3]]
        _, state = hybrid_linear_attention(
            *piece, *maps, **mix, window=16, sinks=2, return_state=True, initial_state=state
        )
    for a, b in ((state.kv, expected.kv), (state.normalizer, expected.normalizer)):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"window": -1}, "at least 0"),
        ({"window_reference": "mean"}, "window_reference"),
        ({"window_weight": None}, "window_weight"),
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
        hybrid_linear_attention(*inputs, **{**mix, **change})


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_packing_must_cover_the_tokens(backend):
    inputs, mix = make_inputs(batch=1)
    with pytest.raises(ValueError, match=f"from 0 to the {LENGTH} tokens"):
        hybrid_linear_attention(*inputs, **mix, cu_seqlens=torch.tensor([0, LENGTH - 1]), backend=backend)


def test_one_feature_alone_is_refused():
    inputs, mix = make_inputs()
    with pytest.raises(ValueError, match="both query and key"):
        hybrid_linear_attention(*inputs[:4], None, **mix)


class TestDispatch:
    """A checkpoint never dies of an installed package, and never takes another contract's kernels."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        find = dispatch.find_kernel
        find.cache_clear()
        dispatch.warn_once.cache_clear()
        yield
        find.cache_clear()
        dispatch.warn_once.cache_clear()

    def choose(self, backend="auto", on_gpu=True):
        return dispatch.choose_backend("hybrid_linear", op.CONTRACT, backend, on_gpu, (), {})

    def break_import(self, monkeypatch, error):
        def fail(name):
            raise error

        monkeypatch.setattr(dispatch.importlib, "import_module", fail)

    def test_cpu_looks_for_nothing(self, monkeypatch):
        self.break_import(monkeypatch, RuntimeError("must not be called"))
        assert self.choose(on_gpu=False) is None

    @pytest.mark.parametrize(
        "error",
        [ModuleNotFoundError("no", name="linearize"), ModuleNotFoundError("no", name="triton"), ImportError("broken")],
        ids=["absent", "needs-triton", "broken"],
    )
    def test_unusable_package_runs_chunked_with_one_warning(self, monkeypatch, caplog, error):
        self.break_import(monkeypatch, error)
        assert self.choose() is None and self.choose() is None
        assert len(caplog.records) == 1 and "chunked" in caplog.text
        with pytest.raises(ValueError, match="linearize"):
            self.choose("triton")

    def test_kernels_that_do_not_load_run_chunked(self, monkeypatch, caplog):
        """The Triton files are imported on first use, after the package itself."""
        kernel = dispatch.importlib.import_module("linearize.kernels.hybrid_linear")
        self.break_import(monkeypatch, ImportError("half a file"))
        monkeypatch.setattr(kernel, "unsupported", lambda: dispatch.importlib.import_module("fused"))
        monkeypatch.setattr(dispatch, "find_kernel", lambda op, contract: (kernel, ""))
        assert self.choose() is None and "half a file" in caplog.text
        with pytest.raises(ValueError, match="broken"):
            self.choose("triton")

    def test_another_contract_runs_chunked(self, monkeypatch, caplog):
        kernel = dispatch.importlib.import_module("linearize.kernels.hybrid_linear")
        monkeypatch.setattr(kernel, "CONTRACT", op.CONTRACT + 1)
        assert self.choose() is None
        assert f"contract {op.CONTRACT + 1}" in caplog.text

    def test_environment_chooses(self, monkeypatch):
        monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "reference")
        assert self.choose(on_gpu=False).__name__ == "reference"


def test_contracts_agree():
    import linearize.kernels.hybrid_linear as kernel

    assert kernel.CONTRACT == op.CONTRACT
