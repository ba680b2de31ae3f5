"""Sinks in texts longer than the teacher's positions: they follow in steps, whatever the cut into calls."""

import contextlib
import copy

import pytest
import torch
from tiny_models import make_gpt2, make_gptj, make_mistral, make_student, make_teacher, perturb
from transformers import DynamicCache

LIMIT, STEP = 64, 16
SINKS = 2
BACKBONES = {
    "llama": lambda **changes: make_teacher(max_position_embeddings=LIMIT, **changes),
    "mistral": lambda **changes: make_mistral(max_position_embeddings=LIMIT, **changes),
    "gptj": lambda **changes: make_gptj(n_positions=LIMIT, **changes),
}
WINDOW = {"window": 8, "sinks": SINKS}
GATED = {"gate": "token", "gate_bias": 1.0}
MIXERS = {
    "linear": {"type": "linear", **WINDOW, "gate": "none", "map_input": "rotated"},
    "linear-gated": {"type": "linear", **WINDOW, **GATED, "map_input": "projections"},
    "cosine": {"type": "cosine", **WINDOW},
    "cosine-gated": {"type": "cosine", **WINDOW, **GATED, "directions": "projections"},
    "salient": {"type": "salient", **WINDOW, "kept_tokens": 6},
}


def make(mechanism="linear", backbone="llama", **changes):
    layers = {"n_layer" if backbone == "gptj" else "num_hidden_layers": 2}
    model = make_student(BACKBONES[backbone](**layers, **changes), {"mixer": MIXERS[mechanism]})
    perturb(model)
    return model.double()


def make_ids(tokens, rows=2):
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(5))


@contextlib.contextmanager
def unmoved(model):
    """The sinks stay where they are, as in a teacher of endless positions."""
    before = model.config.max_position_embeddings
    model.config.max_position_embeddings = 10**9
    try:
        yield
    finally:
        model.config.max_position_embeddings = before


def shift(n):
    """Positions that the sinks have followed for the token n, written out."""
    return 0 if n < LIMIT else ((n - LIMIT) // STEP + 1) * STEP


def moved(key, positions, neighbours):
    """Rotated keys `(B, G, T, D)`, the sinks among them `positions` later: pairs of halves, or of neighbours, of which
    GPT-J rotates the first three."""
    width = 6 if neighbours else key.shape[-1]
    angle = positions * 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    first, second = (slice(0, width, 2), slice(1, width, 2)) if neighbours else (slice(0, 8), slice(8, 16))
    key, (x, y) = key.clone(), (key[:, :, :SINKS, first], key[:, :, :SINKS, second])
    key[:, :, :SINKS, first] = x * angle.cos() - y * angle.sin()
    key[:, :, :SINKS, second] = y * angle.cos() + x * angle.sin()
    return key


def by_segments(attention, neighbours, query, key, value, arm, context):
    """Each token from a whole call without state, in which the sinks lie where that token has them."""
    outputs = []
    for n in range(query.shape[2]):
        if n == 0 or shift(n) != shift(n - 1):
            whole = attention.mixer(query, moved(key, shift(n), neighbours), value, None, arm=arm, **context)
        outputs.append(whole[:, :, n])
    return torch.stack(outputs, 2)


def by_scores(attention, neighbours, query, key, value, arm, context):
    """Softmax over window, sinks and kept tokens, token by token from the definition."""
    mixer, groups, tokens = attention.mixer, query.shape[1] // key.shape[1], query.shape[2]
    window, kept, penalty = mixer.window, 0, 0.0
    if arm == "mixed":
        kept, penalty = mixer.kept_tokens, mixer.age_penalty
    masses, outputs = torch.zeros(key.shape[:3], dtype=torch.float64), []
    value = value.repeat_interleave(groups, 1)
    for n in range(tokens):
        keys = moved(key, shift(n), neighbours).repeat_interleave(groups, 1)
        scores = mixer.scaling * torch.einsum("bhd,bhjd->bhj", query[:, :, n], keys)
        place = torch.arange(tokens)
        near = (place <= n) & ((n - place < window) | (place < SINKS))
        weights = scores.masked_fill(~near, -torch.inf).softmax(-1)
        gone = (place >= SINKS) & (place <= n - window)
        rank = masses.clamp(min=1e-20).log() + penalty * place / 1000
        best = rank.masked_fill(~gone, -torch.inf).topk(min(kept, int(gone.sum()))).indices
        seen = near.expand(key.shape[:3]).clone().scatter(2, best, True).repeat_interleave(groups, 1)
        outputs.append(torch.einsum("bhj,bhjd->bhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value))
        far_half = (n - place >= window // 2) & (n - place < window) & (place >= SINKS)
        masses = masses + (weights.unflatten(1, (-1, groups)).sum(2) * far_half).detach()
    return torch.stack(outputs, 2)


def directly(model, ids, direct):
    """Logits of the model with `direct` in place of every layer's mixer, from now on."""
    neighbours = model.config.model_type == "linearized_gptj"
    for attention in model.mixer_attentions():

        def mix(query, key, value, padding_mask, layer, arm, packing, far_sinks, attention=attention, **context):
            return direct(attention, neighbours, query, key, value, arm, context)

        attention.mix = mix
    return model(ids, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("mechanism", MIXERS)
def test_nothing_changes_up_to_the_limit(mechanism):
    model, ids = make(mechanism), make_ids(LIMIT + 1)
    cut = (ids[:, :50], ids[:, 50:63], ids[:, 63:64])

    def read():
        cache = DynamicCache(config=model.config)
        return [model(ids[:, :LIMIT]).logits, *(model(x, past_key_values=cache).logits for x in cut)]

    with unmoved(model):
        expected, beyond = read(), model(ids).logits
    assert all(torch.equal(a, b) for a, b in zip(read(), expected, strict=True))
    assert not torch.allclose(model(ids).logits[:, LIMIT:], beyond[:, LIMIT:], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("mechanism", MIXERS)
def test_beyond_the_limit_as_written_out(mechanism, backbone):
    model, ids = make(mechanism, backbone), make_ids(LIMIT + 3 * STEP + 5)
    for arm in ("mixed", "softmax"):
        model.set_arm(arm)
        direct = by_scores if mechanism == "salient" else by_segments
        torch.testing.assert_close(model(ids).logits, directly(copy.deepcopy(model), ids, direct), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_window_is_softmax_over_it_and_the_moved_sinks():
    model, ids = make("linear"), make_ids(LIMIT + 2 * STEP + 1)
    model.set_arm("softmax")
    torch.testing.assert_close(model(ids).logits, directly(copy.deepcopy(model), ids, by_scores), rtol=0, atol=1e-5)


def test_gradients_reach_across_the_moves():
    model, ids = make("linear-gated"), make_ids(LIMIT + STEP + 3, rows=1)
    other = copy.deepcopy(model)
    model(ids, labels=ids).loss.backward()
    logits = directly(other, ids, by_segments)
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    gradients = [(x.grad, y.grad) for x, y in zip(model.parameters(), other.parameters(), strict=True)]
    assert sum(x is not None for x, _ in gradients) > 20
    for x, y in gradients:
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def in_calls(model, ids, cut, cache=None, mask=None):
    """Logits of the last tokens, read with a cache in calls of `cut` tokens; mask is that of all tokens."""
    cache, outputs = DynamicCache(config=model.config) if cache is None else cache, []
    start = ids.shape[1] - sum(cut)
    for part in ids[:, start:].split(cut, 1):
        start += part.shape[1]
        seen = None if mask is None else mask[:, :start]
        outputs.append(model(part, attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(outputs, 1)


CUTS = {
    "single tokens at both boundaries": [63, *[1] * 20, 37],
    "at a boundary": [64, 16, 16, 24],
    "anywhere": [70, 1, 30, 1, 18],
}


@torch.no_grad()
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("mechanism", MIXERS)
def test_any_cut_into_calls(mechanism, cut):
    model, ids = make(mechanism), make_ids(sum(CUTS[cut]))
    one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = model(ids, past_key_values=one).logits
    torch.testing.assert_close(in_calls(model, ids, CUTS[cut], other), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-9)
    for a, b in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(a.state.sink_key, b.state.sink_key, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("mechanism", MIXERS)
def test_rows_of_other_lengths_beside(mechanism, cut):
    """Padding on the left, and within a row: every row gives what it gives alone."""
    model, ids = make(mechanism), make_ids(sum(CUTS[cut]), rows=4)
    mask = torch.ones_like(ids)
    mask[1, :9] = mask[2, :64] = mask[3, 40:47] = mask[3, 80:82] = 0
    found = in_calls(model, ids, CUTS[cut], mask=mask)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for row in range(4):
        real = mask[row].bool()
        alone = model(ids[row, real][None], use_cache=False).logits[0]
        torch.testing.assert_close(found[row, real], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(whole[row, real], alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mechanism", MIXERS)
def test_beams_take_their_sinks_along(mechanism):
    """Rows of other counts change places in a cache, and go on past a boundary."""
    model, ids = make(mechanism), make_ids(90)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache = DynamicCache(config=model.config)
    model(ids[:, :78], attention_mask=mask[:, :78], past_key_values=cache)
    order = torch.tensor([1, 0])
    cache.reorder_cache(order)
    ids, mask = ids[order], mask[order]
    found = in_calls(model, ids, [1] * 12, cache, mask)
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 78:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mechanism", MIXERS)
def test_packed_texts_have_sinks_of_their_own(mechanism):
    model, ids = make(mechanism), make_ids(200, rows=1)
    lengths = [30, 101, 64, 5]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    found = model(ids, position_ids=places, use_cache=False).logits
    alone = [model(x, use_cache=False).logits for x in ids.split(lengths, 1)]
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("mechanism", MIXERS)
def test_generate_goes_on_past_the_limit(mechanism):
    model, ids = make(mechanism), make_ids(55)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 45, "min_new_tokens": 45, "do_sample": False}
    found = model.generate(ids, **options)
    long_mask = torch.cat([mask, mask.new_ones(2, 45)], 1)
    logits = model(found, attention_mask=long_mask, use_cache=False).logits
    logits[..., model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens keeps it from being chosen
    assert torch.equal(logits[:, 54:-1].argmax(-1), found[:, 55:])
    with unmoved(model):
        assert not torch.equal(model.generate(ids, **options), found)
    if not mechanism.startswith("cosine"):  # which makes a new state with every token
        with model.captured_decoding():
            assert torch.equal(model.generate(ids, **options), found)


@torch.no_grad()
@pytest.mark.parametrize("mechanism", ["linear", "linear-gated", "salient"])
def test_a_decoding_session_moves_sinks_in_place(mechanism):
    """Rows that rest, states that come from a cache and go back."""
    from linearize.modeling.decoding import DecodingSession

    model, ids = make(mechanism), make_ids(100)
    session = DecodingSession(model, 2)
    cache = DynamicCache(config=model.config)
    model(ids[:, :60], past_key_values=cache)
    session.attach(cache.layers)
    place, outputs = [60, 60], ([], [])
    for step in range(40):
        real = torch.tensor([[True], [step % 5 != 4]])
        token = torch.stack([ids[row, place[row]] for row in range(2)])
        logits = session.step(token, real).clone()
        for row in range(2):
            if real[row]:
                outputs[row].append(logits[row])
                place[row] += 1
    expected = model(ids, use_cache=False).logits
    for row in range(2):
        torch.testing.assert_close(torch.stack(outputs[row]), expected[row, 60 : place[row]], rtol=0, atol=1e-5)
    session.release()
    again = DynamicCache(config=model.config)
    model(ids[:1, : place[0]], past_key_values=again)
    for a, b in zip(cache.layers, again.layers, strict=True):
        torch.testing.assert_close(a.state.sink_key[:1], b.state.sink_key, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["yarn", "longrope", "linear", "llama3"])
def test_a_rotation_goes_on_without_the_scaling_of_scores(kind):
    """A key at position 3 moves on to 19: the scale of yarn's and longrope's tables stays as it is."""
    more = {"original_max_position_embeddings": 32, "factor": 2.0}
    options = {
        "yarn": more,
        "longrope": {**more, "short_factor": [1.5] * 8, "long_factor": [4.0] * 8},
        "linear": {"factor": 2.0},
        "llama3": {**more, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }
    model = make(rope_parameters={"rope_type": kind, "rope_theta": 1e4, **options[kind]})
    base, ids = model.model, make_ids(LIMIT + 2 * STEP)
    cosine, sine = base.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(LIMIT)[None])
    assert (cosine[0, 0, 0] > 1.01) == (kind in ("yarn", "longrope"))
    key = torch.randn(1, 2, 1, 16, dtype=torch.float64)

    def at(n):
        half = torch.cat([-key[..., 8:], key[..., :8]], -1)
        return key * cosine[0, n] + half * sine[0, n]

    torch.testing.assert_close(base.key_rotation(STEP)(at(3)), at(3 + STEP), rtol=0, atol=1e-5)
    with unmoved(model):
        plain = model(ids).logits
    assert (model(ids).logits - plain)[:, LIMIT:].abs().max() > 1e-3


@torch.no_grad()
def test_what_has_no_rotation_to_go_on_with_is_left_as_it_is():
    """`dynamic` changes its frequencies with the length of the text; other arms and mechanisms have no sinks."""
    dynamic = make(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    linear, none = make("linear"), make_student(BACKBONES["llama"](), {"mixer": {**MIXERS["linear"], "sinks": 0}})
    linear.set_arm("linear")
    hybrid = make_student(BACKBONES["llama"](), {"mixer": MIXERS["linear"]}, ["softmax", "mixer", "softmax"])
    hybrid.set_arm("teacher")
    for model in (dynamic, linear, none, hybrid):
        ids = make_ids(LIMIT + 2 * STEP)
        found = model(ids, use_cache=False).logits
        with unmoved(model):
            assert torch.equal(model(ids, use_cache=False).logits, found)


@torch.no_grad()
def test_beside_softmax_layers():
    model = make_student(BACKBONES["llama"](), {"mixer": MIXERS["linear"]}, ["softmax", "mixer", "softmax"]).double()
    ids = make_ids(LIMIT + STEP + 5)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(in_calls(model, ids, [30, 40, *[1] * 15]), expected, rtol=0, atol=1e-9)
    with unmoved(model):
        assert (model(ids, use_cache=False).logits - expected)[:, LIMIT:].abs().max() > 1e-3


def test_learned_positions_end():
    model = make_student(make_gpt2(n_positions=LIMIT), {"mixer": MIXERS["linear"]})
    with pytest.raises(ValueError, match="learned positions"):
        model(make_ids(LIMIT + 1))


@torch.no_grad()
def test_half_precision_keeps_its_dtype():
    model, ids = make("salient").bfloat16(), make_ids(LIMIT + 9 * STEP)
    cache = DynamicCache(config=model.config)
    assert model(ids, past_key_values=cache).logits.isfinite().all()
    for layer in cache.layers:
        assert layer.state.sink_key.dtype == torch.bfloat16


def test_a_step_past_the_limit_asks_no_device():
    """A tensor without values stands for one on a GPU: to read it would fail."""
    from linearize.modeling.far_sinks import plan_far_sinks

    model, cache = make(), DynamicCache(config=make().config)
    model(make_ids(LIMIT), past_key_values=cache)
    for layer in cache.layers:
        layer.state = layer.state._replace(count=layer.state.count.to("meta"))
    token = torch.empty(2, 1, 32, device="meta")
    for mask in (None, torch.ones(2, 1, dtype=torch.bool, device="meta")):
        plan = plan_far_sinks(model.model, token, mask, cache)["far_sinks"]
        assert [[(x.start, x.stop, x.moved.shape) for x in pieces] for pieces in plan.texts] == [[(0, 1, (2,))]]
