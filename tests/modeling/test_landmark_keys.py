"""Pooled landmark keys: their formula, where they start, and the same key however a block comes in."""

import pytest
import torch
from tiny_models import make_gpt2, make_student, make_teacher, perturb
from transformers import DynamicCache

from linearize.modeling.attention_landmark import LandmarkAttentionConfig
from linearize.modeling.landmark_keys import LandmarkKeys, key_bounds


def make_keys(seed=0):
    torch.manual_seed(seed)
    keys = LandmarkKeys(2, 6, 5).double()
    for parameter in keys.parameters():
        torch.nn.init.normal_(parameter)
    return keys


def test_formula():
    keys, blocks = make_keys(), torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    found = keys(blocks)
    for b, g, u in ((0, 0, 0), (1, 1, 2), (2, 0, 3)):
        k = blocks[b, g, u]
        weights = torch.stack([keys.content[g] @ k[j] + keys.place[g, j] for j in range(4)]).softmax(0)
        pooled = sum(weights[j] * k[j] for j in range(4))
        expected = pooled @ keys.mix[g] + keys.bias[g] + keys.landmark[g] * k[4]
        torch.testing.assert_close(found[b, g, u], expected, rtol=0, atol=1e-12)


def test_starts_from_the_mean():
    keys, blocks = make_keys(), torch.randn(1, 2, 3, 5, 6)
    with torch.no_grad():
        keys.float().reset_parameters()
    torch.testing.assert_close(keys(blocks), blocks[..., :4, :].mean(3))
    half = keys(blocks.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), blocks[..., :4, :].mean(3), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "runs", [[(0, 7)], [(0, 3), (3, 7)], [(0, 2), (2, 4), (4, 7)], [(i, i + 1) for i in range(7)]]
)
def test_bounds_of_parts(runs):
    blocks = torch.randn(2, 3, 4, 8, 6, dtype=torch.float64)
    found = key_bounds(blocks, len(runs))
    assert found.shape == (2, 3, 4, len(runs), 12)
    for part, (start, stop) in enumerate(runs):
        assert torch.equal(found[..., part, :6], blocks[..., start:stop, :].amax(-2))
        assert torch.equal(found[..., part, 6:], blocks[..., start:stop, :].amin(-2))
    query = torch.randn(6, dtype=torch.float64)
    bound = torch.maximum(found[..., :6] * query, found[..., 6:] * query).sum(-1).amax(-1)
    best = (blocks[..., :7, :] @ query).amax(-1)
    assert bool((bound >= best - 1e-12).all())
    assert torch.allclose(bound, best) == (len(runs) == 7)


@pytest.mark.parametrize("block_weight", ["landmark", "tokens"])
@pytest.mark.parametrize("make", [make_teacher, make_gpt2], ids=["rotary", "learned positions"])
def test_the_whole_text_and_the_cache_pool_alike(make, block_weight):
    """Every block read, so that both are the same softmax: whole, and in pieces that cut blocks."""
    mixer = {"type": "landmark", "block_size": 8, "top_k": 9, "block_weight": block_weight}
    model = make_student(make(), {"landmark": mixer}).eval()
    perturb(model)
    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.train()
        whole = model(ids, use_cache=False).logits
        model.eval()
        cache = DynamicCache(config=model.config)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([3, 4, 1, 1, 12, 1, 40, 8], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5)


def test_blocks_that_training_closes_are_closed():
    """Rows with padding, ordinary softmax: a closed block changes what later ones give, and nothing else does."""
    mixer = {"type": "landmark", "block_size": 8, "top_k": 9, "block_weight": "tokens", "block_dropout": 0.5}
    model = make_student(make_teacher(), {"landmark": mixer}).train()
    perturb(model)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    attentions = model.mixer_attentions()
    flags = torch.ones(2, 6, dtype=torch.bool)

    def run(ids):
        for attention in attentions:
            attention.mixer._open_blocks = lambda landmarks: flags
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits

    whole = run(ids)
    single = run(torch.cat([ids[:1], ids[1:, 9:].repeat(1, 2)[:, :40]]))  # other text in front of the second row
    flags[:, 1] = False
    closed = run(ids)
    assert torch.isfinite(whole[mask.bool()]).all()
    torch.testing.assert_close(closed[0, :14], whole[0, :14], rtol=0, atol=1e-6)
    torch.testing.assert_close(closed[1, : 9 + 14], whole[1, : 9 + 14], rtol=0, atol=1e-6)
    assert not torch.allclose(closed[0, 16:], whole[0, 16:], atol=1e-3)
    torch.testing.assert_close(single[0], whole[0], rtol=0, atol=1e-6)


def test_the_token_alone_is_the_published_key():
    settings = LandmarkAttentionConfig(block_size=8, landmark_key="token")
    model = make_student(make_teacher(), {"landmark": vars(settings)})
    assert all(attention.mixer.keys is None for attention in model.mixer_attentions())
    with pytest.raises(ValueError, match="landmark_key is 'mean': choose one of pooled, token"):
        LandmarkAttentionConfig(landmark_key="mean")
    with pytest.raises(ValueError, match="nothing trains a landmark's own key"):
        LandmarkAttentionConfig(landmark_key="token", block_weight="tokens")
