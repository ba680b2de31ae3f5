"""The chunked paths of landmark attention against their definitions: all ways in which rows and blocks can lie."""

import pytest
import torch
from landmark_toys import Blocks, draw, retrieval_call, rotary_tables, shuffled
from torch.nn import functional
from torch.testing import assert_close

from linearize.kernels.landmark import reference
from linearize.kernels.landmark.reference import retrieval_reference
from linearize.modeling import op_landmark_chunked, op_landmark_retrieval
from linearize.modeling.landmark_keys import key_bounds
from linearize.modeling.op_landmark import SELECTIONS, LandmarkBlocks, landmark_attention, landmark_retrieval_attention

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(params=["one tile", "small tiles"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(op_landmark_chunked, "TILE_ELEMENTS", 1)
        monkeypatch.setattr(op_landmark_retrieval, "TILE_ELEMENTS", 1)


def dense(inputs, **options):
    return landmark_attention(*inputs, backend="chunked", **options)[0]


def definition(inputs, **options):
    plain = {"offset": 0, "scaling": None, "attention_mask": None, "cu_seqlens": None}
    return reference(*inputs, **{**plain, **options})[0]


@pytest.mark.parametrize(
    "block_size, offset, length", [(2, 0, 9), (4, 0, 16), (4, 3, 17), (3, 2, 1), (5, 1, 23), (8, 0, 5)]
)
def test_blocks_of_any_size_from_any_place(block_size, offset, length, tiles):
    inputs = draw(length)
    options = {"block_size": block_size, "offset": offset}
    assert_close(dense(inputs, **options), definition(inputs, **options), **EXACT)


def test_more_than_64_blocks(tiles):
    inputs = draw(2 * 70, heads=2, groups=1)
    assert_close(dense(inputs, block_size=2), definition(inputs, block_size=2), **EXACT)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_and_a_place_for_each_row(side, tiles):
    inputs = draw(19, batch=3)
    place = torch.arange(19)
    spans = {
        "left": [(0, 19), (4, 19), (11, 19)],
        "right": [(0, 19), (0, 7), (0, 1)],
        "both": [(2, 18), (4, 9), (0, 0)],
    }
    mask = torch.stack([(place >= a) & (place < b) for a, b in spans[side]])
    options = {"block_size": 4, "offset": torch.tensor([0, 3, 2]), "attention_mask": mask, "scaling": 0.4}
    found = dense(inputs, **options)
    assert_close(found, definition(inputs, **options), **EXACT)
    assert not found.transpose(1, 2)[~mask].any()


def test_packed_rows(tiles):
    inputs = draw(20, batch=1)
    bounds = torch.tensor([0, 7, 7, 8, 20], dtype=torch.int32)
    options = {"block_size": 4, "cu_seqlens": bounds, "offset": torch.tensor([1, 0, 3, 2])}
    assert_close(dense(inputs, **options), definition(inputs, **options), **EXACT)


CHOICES = {
    "all open": {},
    "some closed": {"open_blocks": torch.tensor([[True, False, True, False], [False, True, False, True]])},
    "few named": {"open_blocks": torch.tensor([[False], [True]])},
    "all closed": {"open_blocks": torch.zeros(2, 9, dtype=torch.bool)},
    "padded": {
        "open_blocks": torch.tensor([[False, True, True], [True, False, True]]),
        "attention_mask": torch.tensor([[1] * 14, [0] * 3 + [1] * 11]),
        "offset": torch.tensor([3, 2]),
    },
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_blocks_that_later_ones_do_not_read(choice, tiles):
    inputs = draw(14)
    options = {"block_size": 4, "offset": 1, **choice}
    assert_close(dense(inputs, **options), definition(inputs, **options), **EXACT)


def test_packed_rows_close_blocks_of_their_own(tiles):
    inputs = draw(20, batch=1)
    is_open = torch.tensor([[False, True, True], [True, True, True], [True, False, True]])
    options = {"block_size": 4, "cu_seqlens": torch.tensor([0, 7, 8, 20], dtype=torch.int32), "open_blocks": is_open}
    assert_close(dense(inputs, **options), definition(inputs, **options), **EXACT)
    assert not torch.equal(dense(inputs, **options), dense(inputs, **{**options, "open_blocks": None}))


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_gradients(choice, tiles):
    results = []
    for run in (dense, definition):
        inputs = [x.requires_grad_() for x in draw(14)]
        output = run(inputs, **{"block_size": 4, "offset": 1, **choice})
        output.mul(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        results.append([x.grad for x in inputs])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, **EXACT)


def test_half_precision_keeps_its_type():
    inputs = [x.bfloat16() for x in draw(21)]
    found = dense(inputs, block_size=4)
    assert found.dtype == torch.bfloat16
    assert_close(found.double(), definition([x.double() for x in inputs], block_size=4), rtol=0, atol=0.06)


def finite(call):
    """The same call with zeros where nothing is to be read: the fast path multiplies it by a weight of 0."""
    (query, key, value, blocks), options = call
    parts = [x.nan_to_num() for x in (query, key, value)]
    return (*parts, LandmarkBlocks(*(x.nan_to_num() for x in blocks[:3]), blocks[3])), options


def both(call, **more):
    args, options = finite(call)
    plain = {"selection": "token_and_head", "max_blocks": None, "scaling": None}
    expected = retrieval_reference(*call[0][:3], Blocks(*call[0][3]), **{**plain, **call[1], **more})
    found = landmark_retrieval_attention(*args, **options, **more, backend="chunked")
    return found, expected.nan_to_num()


ROTARY = {"rotated": rotary_tables(200), "scaled": rotary_tables(200, factor=1.3), "still": None}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("block_size, top_k", [(3, 1), (4, 3), (2, 5), (4, 40)])
def test_the_best_blocks(block_size, top_k, rotary, selection, tiles):
    call = retrieval_call(draw(27), block_size, ROTARY[rotary])
    assert_close(*both(call, top_k=top_k, selection=selection), **EXACT)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spans", [[(0, 5), (0, 27), (9, 20)], [(26, 27), (3, 4), (14, 15)], [(6, 8), (7, 9), (0, 2)]])
def test_rows_at_different_places(spans, side, selection, tiles):
    call = retrieval_call(draw(27, batch=3), 4, ROTARY["rotated"], spans=spans, side=side)
    assert_close(*both(call, top_k=2, selection=selection, scaling=0.3), **EXACT)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("spans", [[(0, 27), (9, 20)], [(26, 27), (3, 4)]])
def test_blocks_that_weigh_by_their_tokens(spans, selection, tiles):
    call = retrieval_call(draw(27), 4, ROTARY["rotated"], spans=spans)
    found, expected = both(call, top_k=2, selection=selection, block_weight="tokens")
    assert_close(found, expected, **EXACT)
    gated, _ = both(call, top_k=2, selection=selection)
    assert not torch.allclose(gated, found, atol=1e-3)


def test_blocks_that_weigh_by_their_tokens_are_softmax_attention():
    """Every block read: the ordinary softmax over all tokens that are no landmarks."""
    inputs = draw(27)
    found, _ = both(retrieval_call(inputs, 4, None), top_k=9, block_weight="tokens")
    query, key, value = inputs
    token = torch.arange(27)
    visible = (token <= token[:, None]) & (token % 4 != 3)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    assert_close(found, expected, **EXACT)


def bounded(call, parts):
    """The same call with bounds of the stored blocks' keys in place of their landmarks' keys."""
    (*inputs, blocks), options = call
    return (*inputs, blocks._replace(landmark=key_bounds(blocks.key, parts))), options


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("rotary", ["rotated", "scaled"])
@pytest.mark.parametrize(
    "parts, spans", [(1, [(0, 27), (9, 20)]), (3, [(14, 27), (9, 20)]), (4, [(26, 27), (13, 14)])]
)
def test_blocks_ranked_by_bounds_of_their_keys(spans, parts, rotary, selection, tiles):
    call = retrieval_call(draw(27), 5, ROTARY[rotary], spans=spans)
    options = {"top_k": 2, "selection": selection, "block_weight": "tokens"}
    found, expected = both(bounded(call, parts), **options)
    assert_close(found, expected, **EXACT)
    assert not torch.allclose(found, both(call, **options)[0], atol=1e-3)  # other blocks


def test_with_a_part_for_each_token_the_best_token_ranks_a_block():
    """By hand, without rotation: the last token reads, beside its own block, the block with its best score."""
    query, key, value = draw(30, batch=1, heads=2, groups=1)
    call = bounded(retrieval_call((query, key, value), 5, None, spans=[(29, 30)]), 4)
    found, _ = both(call, top_k=1, block_weight="tokens")
    token = torch.arange(30)
    real = token % 5 != 4
    for head in range(2):
        scores = (key[0, 0] @ query[0, head, 29]) / 6**0.5
        best = scores.masked_fill(~real | (token >= 25), -torch.inf).argmax() // 5
        seen = real & ((token // 5 == best) | (token >= 25))
        assert_close(found[0, head, 0], scores.masked_fill(~seen, -torch.inf).softmax(0) @ value[0, 0], **EXACT)


def test_bounds_are_no_gates():
    args, options = finite(bounded(retrieval_call(draw(27), 4, None), 1))
    with pytest.raises(ValueError, match="set block_weight to tokens"):
        landmark_retrieval_attention(*args, **options, top_k=2)


@pytest.mark.parametrize("max_blocks", [2, 3, 100])
def test_only_the_last_blocks(max_blocks):
    call = retrieval_call(draw(31), 3, ROTARY["rotated"])
    assert_close(*both(call, top_k=2, max_blocks=max_blocks), **EXACT)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_slots_in_any_order_and_missing_blocks(selection):
    args, options = retrieval_call(draw(31), 4, ROTARY["rotated"])
    blocks = shuffled(args[3])
    blocks = blocks._replace(index=torch.where(blocks.index == 2, -1, blocks.index))
    assert_close(*both(((*args[:3], blocks), options), top_k=3, selection=selection), **EXACT)


def test_the_first_block_has_none_before_it():
    call = retrieval_call(draw(3), 4, ROTARY["rotated"])
    assert call[0][3].index.shape[1] == 0
    assert_close(*both(call, top_k=2), **EXACT)


def test_of_equal_landmarks_the_newest_is_read():
    query, key, value = draw(24, heads=2, groups=1)
    key[:, :, 3::4] = 1.0
    call = retrieval_call((query, key, value), 4, None)
    found, expected = both(call, top_k=2)
    assert_close(found, expected, **EXACT)
    near, _ = both(call, top_k=2, max_blocks=2)
    assert_close(found, near, **EXACT)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradients_of_retrieval(selection, tiles):
    results = []
    for run in (landmark_retrieval_attention, retrieval_reference):
        tensors = [x.requires_grad_() for x in draw(19)]
        args, options = finite(retrieval_call(tensors, 4, ROTARY["rotated"]))
        more = {"top_k": 2, "selection": selection, "max_blocks": None, "scaling": None}
        output = run(*args, **options, **more)
        output.mul(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        results.append([x.grad for x in tensors])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"top_k": 0}, "at least 1 block"),
        ({"top_k": 3, "max_blocks": 2}, "at least top_k"),
        ({"selection": "best"}, "choose one of"),
        ({"block_weight": "all"}, "choose one of landmark, tokens"),
        ({"rotary": rotary_tables(10)}, "top_k \\+ 2 blocks need 16"),
        ({"backend": "triton"}, "no Triton kernel"),
    ],
)
def test_refusals_of_retrieval(change, sentence):
    args, options = finite(retrieval_call(draw(9), 4, ROTARY["rotated"]))
    with pytest.raises(ValueError, match=sentence):
        landmark_retrieval_attention(*args, **{**options, "top_k": 2, **change})


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"block_size": 1}, "at least 2"),
        ({"offset": 4}, "a place in a block"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "batch size 1"),
        ({"open_blocks": torch.ones(1, 3, dtype=torch.bool)}, "this call has 2 rows"),
        ({"open_blocks": torch.ones(2, 3)}, "of torch.bool"),
    ],
)
def test_refusals(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        landmark_attention(*draw(9), **{"block_size": 4, **change})


def test_wrong_shapes_are_refused():
    query, key, value = draw(9)
    with pytest.raises(ValueError, match="do not divide"):
        landmark_attention(query[:, :3], key, value, block_size=4)
    with pytest.raises(ValueError, match="the same tokens"):
        landmark_attention(query, key[:, :, :4], value, block_size=4)
