"""Models with landmark attention that read a few blocks: selection, the cache, generation."""

import copy

import pytest
import torch
from landmark_students import BOUNDS, TEACHERS, make, make_ids
from transformers import DynamicCache

from linearize.modeling.landmark_tokens import Landmarks


@pytest.fixture
def ids():
    return make_ids()


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("keys", [{}, BOUNDS], ids=["pooled", "bounds"])
@pytest.mark.parametrize("settings", [{"offload": True}, {"max_blocks": 9}, {"max_blocks": 9, "offload": True}])
def test_where_blocks_lie_changes_nothing(kind, settings, keys, ids):
    """29 tokens are 9 blocks, so that the last 9 are all."""
    plain, other = make(kind, **keys), make(kind, **settings, **keys)
    other.load_state_dict(plain.state_dict())
    caches = [DynamicCache(config=model.config) for model in (plain, other)]
    for piece in ids.split([9, 1, 1, 13, 5], dim=1):
        logits = [
            model(piece, past_key_values=cache).logits for model, cache in zip((plain, other), caches, strict=True)
        ]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_with_as_many_blocks_as_there_are_nothing_is_left_out(ids):
    model, few = make(top_k=9), make(top_k=2)
    dense = make(top_k=100)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(few(ids).logits, dense(ids).logits, atol=1e-3)


@pytest.mark.parametrize("keys", [{}, BOUNDS], ids=["pooled", "bounds"])
@pytest.mark.parametrize("max_blocks", [2, 5])
def test_the_cache_stays_within_its_blocks(max_blocks, keys):
    model = make(max_blocks=max_blocks, **keys)
    ids = torch.randint(3, 97, (1, 400), generator=torch.Generator().manual_seed(2))
    cache, sizes = DynamicCache(config=model.config), []
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([150, 1, 49, 100, 1, 99], dim=1)]
        whole = model(ids, use_cache=False).logits
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=2e-5)
        for piece in ids.split(1, dim=1):
            model(piece, past_key_values=cache)
            sizes.append(cache.layers[0].nbytes())
    assert len(set(sizes[50:])) == 1
    assert cache.layers[0].state.index.shape[1] <= 2 * 16 + 1


def test_blocks_are_not_copied_again_for_every_token(monkeypatch):
    """Slots grow by half, so that moving them costs a constant number of copies a block."""
    import linearize.modeling.cache_landmark as cache_landmark

    moved, original = [], cache_landmark._moved
    monkeypatch.setattr(cache_landmark, "_moved", lambda state, slots: moved.append(slots) or original(state, slots))
    model, cache = make(), None
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for token in torch.randint(3, 97, (1, 300)).split(1, dim=1):
            model(token, past_key_values=cache)
    assert len(moved) <= 3 * 6 and max(moved) <= 1.5 * 101


@pytest.mark.parametrize("keys", [{}, BOUNDS], ids=["pooled", "bounds"])
@pytest.mark.parametrize("selection", ["head", "token"])
def test_other_selections_in_pieces(selection, keys, ids):
    """By `token`, pieces give the whole; by `head`, pieces of whole blocks do, whose tokens choose together."""
    model = make(selection=selection, **keys)
    sizes = [9, 6, 12, 2] if selection == "head" else [5, 1, 9, 14]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids, use_cache=False).logits, rtol=0, atol=1e-5)


def test_bounds_choose_other_blocks_and_hold_nothing_that_is_learned(ids):
    """With every block read, ordinary softmax; with few, not those that mean keys choose."""
    pooled, bounds = ({"block_weight": "tokens"}, BOUNDS)
    found = {}
    for top_k in (2, 100):
        models = [make(top_k=top_k, **keys) for keys in (pooled, bounds)]
        models[0].load_state_dict(models[1].state_dict(), strict=False)
        assert not [name for name, _ in models[1].named_parameters() if ".keys." in name]
        for attention in models[0].mixer_attentions():
            attention.mixer.keys.reset_parameters()
        with torch.no_grad():
            found[top_k] = [model(ids, use_cache=False).logits for model in models]
    torch.testing.assert_close(*found[100], rtol=0, atol=1e-5)
    assert not torch.allclose(*found[2], atol=1e-3)


@pytest.mark.parametrize("padding", [0, 7])
def test_rows_of_bounds_are_alone_what_they_are_together(padding, ids):
    model = make(**BOUNDS)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    with torch.no_grad():
        together = model(ids, attention_mask=mask, use_cache=False).logits
        alone = model(ids[1:, padding:], use_cache=False).logits
    torch.testing.assert_close(together[1:, padding:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_generate_in_chunks_of_any_size(chunk, ids):
    model = make()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **options), expected)


def test_rows_of_different_lengths_and_beams(ids):
    model = make("mistral", max_blocks=6)
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": 3}
    mask = torch.ones_like(ids)
    ids[0, :10], mask[0, :10] = 0, 0
    together = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[:1, 10:], attention_mask=mask[:1, 10:], **options)
    assert torch.equal(together[:1, 10:], alone)


def test_a_cache_of_inference_mode_goes_on_outside_it(ids):
    model, cache = make(), None
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :20], past_key_values=cache)
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in ids[:, 20:].split(2, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits[:, 20:], rtol=0, atol=1e-5)


def test_copies_leave_the_last_call_behind(ids):
    model = make(include_landmark_in_loss=True).train()
    model(ids)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_long_groups_are_cut_by_lanes(ids, monkeypatch):
    import linearize.modeling.op_landmark_retrieval as retrieval

    model = make()
    with torch.no_grad():
        whole = model(ids).logits
        monkeypatch.setattr(retrieval, "TILE_ELEMENTS", 1)
        torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=1e-5)


def test_landmarks_go_where_a_layer_lies():
    plan = Landmarks.plan(torch.ones(2, 7).bool(), None, 4, simple=True)
    plan.rotary = torch.ones(3, 4), torch.zeros(3, 4)
    moved = plan.to("meta")
    assert {moved.position.device.type, moved.rotary[0].device.type, moved.slot.device.type} == {"meta"}
    assert moved.tokens == 7
