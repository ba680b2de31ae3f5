"""CosineAttention against its formulas written out, its state against the parallel form, and its settings."""

import pytest
import torch
from tiny_models import make_student, make_teacher, perturb
from transformers import DynamicCache

from linearize.modeling import ATTENTIONS, CosineAttention, CosineAttentionConfig
from linearize.modeling.cache_layers import CosineStateLayer
from linearize.modeling.feature_maps import apply_feature_map
from linearize.modeling.op_cosine import CONTRACT

HEADS, GROUPS, DIM = 4, 2, 8
WINDOW = {"window": 3, "sinks": 2}
PURE = {"window": 0, "sinks": 0}


def make(seed=0, **settings):
    """A mechanism all of whose parameters are random."""
    config = CosineAttentionConfig(**settings)
    config.resolve(DIM)
    attention = CosineAttention(config, HEADS, GROUPS, DIM, DIM**-0.5)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return attention


def inputs(tokens=14, batch=2, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, GROUPS, GROUPS)
    return [torch.randn(batch, heads, tokens, DIM, generator=generator, dtype=dtype) for heads in shapes]


def features(x, feature_map):
    if feature_map is None:
        return x
    if feature_map.activation != "projection":
        return apply_feature_map(x[None, :, None], feature_map(x), floor=0.0)[0, :, 0]
    u = torch.stack([feature_map.weight[h].double().T @ x[h] for h in range(len(x))])
    return u if feature_map.bias is None else u + feature_map.bias


def naive(attention, query, key, value, causal=True):
    """One row `(H, T, D)` without padding, token by token and pair by pair."""
    scales, window, sinks = attention.scales, attention.window, attention.sinks
    exponent = scales.exponent_logit.double().sigmoid()
    output = torch.zeros_like(query)
    tokens = query.shape[1]
    for h in range(HEADS):
        g = h // (HEADS // GROUPS)
        for n in range(tokens):
            seen = [j for j in range(tokens) if j <= n or not causal]
            near = [j for j in seen if abs(n - j) < window or j < sinks]
            far = [j for j in seen if j not in near]
            if near:
                scores = torch.stack([attention.scaling * query[h, n] @ key[g, j] for j in near]).softmax(0)
                softmax = sum(score * value[g, j] for score, j in zip(scores, near, strict=True))
                output[h, n] += scales.window_weight[h].double() * softmax
            total = torch.zeros(DIM, dtype=torch.float64)
            q = features(query[:, n], attention.feature_map_q)[h]
            for j in far:
                k = features(key[:, j], attention.feature_map_k)[g]
                cosine = q @ k / (q.norm() * k.norm()).clamp(min=1e-12)
                place = j + 1 if causal and attention.scale_side == "key" else len(far)
                total += place ** -exponent[h] * cosine * value[g, j]
            output[h, n] += total if scales.gain is None else scales.gain[h].double() * total
    return output


SETTINGS = {
    "pure": PURE,
    "pure-no-gain": {**PURE, "gain": False},
    "window": WINDOW,
    "window-alone": {"window": 4, "sinks": 0},
    "sinks-alone": {"window": 0, "sinks": 2},
    "key": {**PURE, "scale_side": "key"},
    "key-window": {**WINDOW, "scale_side": "key"},
    "softmax-map": {**WINDOW, "feature_map": "softmax", "feature_dim": 5},
    "projection": {**WINDOW, "feature_map": "projection", "feature_dim": 4, "bias": True},
    "key-map": {**PURE, "scale_side": "key", "feature_map": "elu"},
}


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_the_formula(name, causal):
    attention = make(**SETTINGS[name])
    query, key, value = inputs()
    if not causal and name == "key-window":
        with pytest.raises(ValueError, match="an encoder can only have with window 0 and sinks 0"):
            attention(query, key, value, causal=False)
        return
    expected = torch.stack([naive(attention, *(x[b] for x in (query, key, value)), causal) for b in range(2)])
    assert (attention(query, key, value, causal=causal) - expected).abs().max() < 1e-6
    single = attention(*(x.float() for x in (query, key, value)), causal=causal)
    assert single.dtype == torch.float32 and (single - expected).abs().max() < 1e-5
    attention.op_backend = "reference"
    assert (attention(query, key, value, causal=causal) - expected).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["pure", "window", "key", "softmax-map"])
def test_pads_never_count(name, side, causal):
    """Each row gives what it gives alone, whatever the padding holds, and 0 where it is padded."""
    attention = make(**SETTINGS[name])
    query, key, value = inputs()
    lengths = (14, 9)
    places = torch.arange(14)
    mask = torch.stack([places < n if side == "right" else places >= 14 - n for n in lengths])
    for x in (query, key, value):
        x.masked_fill_(~mask[:, None, :, None], float("nan"))
    together = attention(query, key, value, mask, causal=causal)
    for row, real in enumerate(mask):
        alone = attention(*(x[row : row + 1, :, real] for x in (query, key, value)), causal=causal)
        assert (together[row, :, real] - alone[0]).abs().max() < 1e-9
        assert (together[row, :, ~real] == 0).all()


def test_padding_leaves_gradients_finite():
    attention = make(**SETTINGS["projection"])
    mask = torch.arange(14) < torch.tensor([[14], [9]])
    query, key, value = (x.masked_fill(~mask[:, None, :, None], float("nan")) for x in inputs())
    attention(query, key, value, mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in attention.parameters())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["pure", "window", "key", "projection"])
def test_gradients_of_all_parameters_and_inputs(name, causal):
    attention = make(**SETTINGS[name]).double()
    data = [x.requires_grad_() for x in inputs(tokens=7, batch=1)]
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def run(query, key, value, *values):
        call = dict(zip(names, values, strict=True))
        return torch.func.functional_call(attention, call, (query, key, value), {"causal": causal})

    assert torch.autograd.gradcheck(run, (*data, *parameters))


@torch.no_grad()
@pytest.mark.parametrize("name", ["pure", "window", "key-window", "softmax-map"])
def test_the_state_gives_what_the_parallel_form_gives(name):
    """Through 4096 tokens in float32, in unequal parts and token by token at the end."""
    attention = make(**{**SETTINGS[name], **({"window": 16} if "window" in name else {})})
    attention.scales.exponent_logit.abs_()
    query, key, value = inputs(tokens=4096, batch=1, dtype=torch.float32)
    whole, layer, parts, start = attention(query, key, value), CosineStateLayer(), [], 0
    for size in (1, 1000, 1, 2048, 7, 1019, *[1] * 20):
        piece = (x[:, :, start : start + size] for x in (query, key, value))
        parts.append(attention(*piece, cache_layer=layer))
        start += size
    assert start == 4096 and layer.get_seq_length() == 4096 and layer.state.kv.dtype == torch.float32
    assert (torch.cat(parts, 2) - whole).abs().max() <= 1e-5


@torch.no_grad()
def test_arms():
    attention = make(**WINDOW)
    query, key, value = inputs()
    near, far = (attention(query, key, value, arm=arm) for arm in ("softmax", "linear"))
    assert attention.arms == ("mixed", "softmax", "linear")
    pure = make(**PURE)
    pure.scales.exponent_logit.copy_(attention.scales.exponent_logit)
    pure.scales.gain.copy_(attention.scales.gain)
    assert torch.equal(pure(query, key, value), far) and pure.arms == ("mixed",)
    attention.scales.gain.zero_()
    attention.scales.window_weight.fill_(1.0)
    assert torch.equal(attention(query, key, value), near)
    share = attention.linear_share(query, key, value)
    assert share.shape == (2, HEADS, 14) and not share.any()
    for arm in ("softmax", "teacher"):
        with pytest.raises(ValueError, match="unknown arm"):
            pure(query, key, value, arm=arm)


@torch.no_grad()
def test_an_arm_keeps_its_own_state():
    attention = make(**SETTINGS["softmax-map"])
    query, key, value = inputs()
    for arm in attention.arms:
        layer = CosineStateLayer()
        parts = [attention(*(x[:, :, i : i + 1] for x in (query, key, value)), None, layer, arm) for i in range(14)]
        assert (torch.cat(parts, 2) - attention(query, key, value, arm=arm)).abs().max() < 1e-6


@torch.no_grad()
def test_an_untrained_student_is_its_window_alone():
    ids = torch.arange(3, 40)[None]
    student = make_student(make_teacher(), {"cosine": {"type": "cosine", **WINDOW}})
    mixed = student(ids).logits
    with student.use_arm("softmax"):
        assert torch.equal(student(ids).logits, mixed)
    pure = make_student(make_teacher(), {"cosine": {"type": "cosine", **PURE}})
    assert pure.arms() == ("mixed", "teacher")
    scales = pure.mixer_attentions()[0].mixer.scales
    assert (scales.gain == 1).all() and (scales.exponent() - 0.6225).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["pure", "window", "key-window", "softmax-map", "projection"])
def test_the_state_s_size_is_known(name):
    student = make_student(make_teacher(), {"cosine": {"type": "cosine", **SETTINGS[name]}})
    cache = DynamicCache(config=student.config)
    for tokens in (30, 5):
        student(torch.randint(3, 97, (1, tokens)), past_key_values=cache, use_cache=True)
        predicted = ATTENTIONS["cosine"].state_bytes(student.config.mixer(0), 4, 2, 16, tokens, 4)
        assert cache.layers[0].nbytes() == predicted


def test_captured_decoding_is_refused_in_a_sentence():
    student = make_student(make_teacher(), {"cosine": {"type": "cosine", **WINDOW}})
    sentence = "cosine attention, which makes a new state with every token: captured decoding needs one that changes"
    with pytest.raises(ValueError, match=sentence), student.captured_decoding():
        pass


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["relu", "elu"])
def test_a_dead_feature_vector_has_weight_zero(name, causal):
    """All features below 0: no direction, so no weight and no gradient, in place of the unit vector of equal parts."""
    attention = make(feature_map=name, **PURE).double()
    with torch.no_grad():
        for feature_map in (attention.feature_map_q, attention.feature_map_k):
            feature_map.weight.copy_(torch.eye(DIM).expand_as(feature_map.weight))
    query, key, value = (x.clone() for x in inputs())
    query[:, :, 5], key[:, :, 3] = -1e3, -1e3
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = attention(*leaves, causal=causal)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    assert not output[:, :, 5].any() and output[:, :, 6].all()
    assert not gradients[0][:, :, 5].any() and not gradients[1][:, :, 3].any() and not gradients[2][:, :, 3].any()
    assert all(torch.isfinite(x).all() for x in gradients)


def test_exponents_of_heads():
    exponents = [0.0, 0.25, 0.5, 1.0]
    settings = {"type": "cosine", "exponent": exponents}
    student = make_student(make_teacher(), {"cosine": settings})
    found = student.mixer_attentions()[0].mixer.scales.exponent()
    low, high = student.mixer_attentions()[0].mixer.scales.exponent_range()
    assert low == pytest.approx(0.018, abs=5e-4) and high == pytest.approx(0.982, abs=5e-4)
    assert (found - torch.tensor(exponents).clamp(low, high)).abs().max() < 1e-6
    found.sum().backward()
    slope = student.mixer_attentions()[0].mixer.scales.exponent_logit.grad
    assert slope.min() > 0.07 * 0.25  # 7% of the greatest at both ends of the range
    assert student.config.mixers["cosine"]["exponent"] == exponents
    with pytest.raises(ValueError, match="lists 3 numbers, but the attention has 4 query heads"):
        make_student(make_teacher(), {"cosine": {**settings, "exponent": [0.1, 0.2, 0.3]}})


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"scale_side": "value"}, "scale_side is 'value': choose one of query, key"),
        ({"window": -1}, "window is -1: it counts tokens"),
        ({"sinks": -3}, "sinks is -3: it counts tokens"),
        ({"exponent": 1.5}, "exponent is 1.5: it must lie between 0 and 1"),
        ({"exponent": [0.1, -0.1, 0.2, 0.3]}, "exponent is -0.1"),
        ({"feature_map": "fourier"}, "feature_map is 'fourier': choose one of none, projection, softmax"),
        ({"feature_dim": 8}, "belong to a feature map"),
        ({"initialization": "kaiming"}, "belong to a feature map"),
        ({"window": 0, "sinks": 0, "window_weight": 2.0}, "window_weight belongs to a softmax branch"),
        ({"window": 0, "sinks": 0, "window_weight": 2}, "set window or sinks, or leave it out"),
        ({"feature_map": "relu", "feature_dim": 17}, "feature_dim 17 is wider than the head dimension 16"),
        ({"feature_map": "relu", "feature_dim": 0}, "feature_dim is 0"),
        ({"window_weight": float("inf")}, "window_weight is inf"),
        ({"contract": CONTRACT + 1}, f"was saved with contract {CONTRACT + 1} of cosine attention"),
        ({"heads": 3}, "unknown attention setting heads"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - @strict wraps what a config raises
        make_student(make_teacher(), {"cosine": {"type": "cosine", **settings}})
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert sentence in str(error) and "\n" not in str(error)


def test_everything_saved_comes_back(tmp_path):
    from linearize.conversion import load_student

    mixers = {"cosine": {"type": "cosine", **SETTINGS["projection"]}}
    student = make_student(make_teacher(), mixers)
    perturb(student)
    student.save_pretrained(tmp_path)
    loaded = load_student(tmp_path)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert loaded.config.mixers["cosine"] == student.config.mixers["cosine"]
