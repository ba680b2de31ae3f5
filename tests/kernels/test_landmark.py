"""Landmark attention: the definition against loops over tokens, and its gradients against their closed form."""

import math

import pytest
import torch
from landmark_toys import draw

from linearize.kernels.landmark import reference
from linearize.modeling.op_dispatch import choose_backend, find_kernel
from linearize.modeling.op_landmark import CONTRACT

# block size, place of the first token, tokens; first and last blocks are partial and complete, rows start on landmarks
CUTS = [
    (2, 0, 9),
    (2, 1, 8),
    (3, 0, 9),
    (3, 1, 10),
    (3, 2, 11),
    (4, 0, 3),
    (4, 0, 14),
    (4, 2, 15),
    (4, 3, 9),
    (4, 3, 1),
]


def attend(inputs, block_size, **options):
    output, state = reference(*inputs, block_size=block_size, **options)
    assert state is None
    return output


def close(left, right, tolerance=1e-10):
    return left.shape == right.shape and (left - right).abs().max() <= tolerance


def by_tokens(inputs, block_size, offset=0, scaling=None):
    """Section 1.1 of the mathematics, one query and one key at a time, in Python floats."""
    query, key, value = (x.tolist() for x in inputs)
    batch, heads, length, dim = inputs[0].shape
    scaling = dim**-0.5 if scaling is None else scaling
    landmarks = [(n + offset) % block_size == block_size - 1 for n in range(length)]
    output = torch.zeros(inputs[0].shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h * inputs[1].shape[1] // heads
            for i in range(length):
                score = [scaling * sum(x * y for x, y in zip(query[b][h][i], k, strict=True)) for k in key[b][g]]
                start = i  # of the query's own block
                while start > 0 and not landmarks[start - 1]:
                    start -= 1
                weights = [0.0] * length
                for j in range(start, i + 1):
                    if not landmarks[j]:
                        weights[j] = math.exp(score[j])
                end = start
                gates = {}
                while end > 0:  # the earlier blocks, the last one first; each ends with its landmark at end - 1
                    begin = end - 1
                    while begin > 0 and not landmarks[begin - 1]:
                        begin -= 1
                    if begin < end - 1:
                        gates[begin, end - 1] = math.exp(score[end - 1])
                    end = begin
                total = sum(weights) + sum(gates.values())
                weights = [w / total if w else 0.0 for w in weights]
                for (begin, landmark), gate in gates.items():
                    inner = [math.exp(score[j]) for j in range(begin, landmark)]
                    for j in range(begin, landmark):
                        weights[j] = gate / total * inner[j - begin] / sum(inner)
                for d in range(dim):
                    output[b, h, i, d] = sum(w * v[d] for w, v in zip(weights, value[b][g], strict=True))
    return output


@pytest.mark.parametrize(("block_size", "offset", "length"), CUTS)
def test_the_definition_is_the_two_softmaxes(block_size, offset, length):
    inputs = draw(length)
    assert close(attend(inputs, block_size, offset=offset), by_tokens(inputs, block_size, offset))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_query_heads_share_key_heads_in_runs(heads, groups):
    inputs = draw(10, heads=heads, groups=groups)
    assert close(attend(inputs, 3), by_tokens(inputs, 3))


def test_scaling_is_an_option():
    inputs = draw(10)
    assert close(attend(inputs, 4, scaling=0.7), by_tokens(inputs, 4, scaling=0.7))
    assert close(attend(inputs, 4), attend(inputs, 4, scaling=6**-0.5))


@pytest.mark.parametrize("block_size", [2, 3])
def test_more_than_64_blocks(block_size):
    inputs = draw(67 * block_size + 1, batch=1, heads=1, groups=1, dim=4)
    assert close(attend(inputs, block_size, offset=1), by_tokens(inputs, block_size, 1))


@pytest.mark.parametrize(("block_size", "offset", "length"), CUTS)
def test_weights_sum_to_one_and_landmarks_have_none(block_size, offset, length):
    query, key, _ = draw(length, dim=16)
    one_hot = torch.eye(length, 16, dtype=query.dtype).expand(2, 2, length, 16)
    weights = attend((query, key, one_hot), block_size, offset=offset)[..., :length]
    landmark = (torch.arange(length) + offset) % block_size == block_size - 1
    total = torch.ones(length, dtype=query.dtype)
    if offset == block_size - 1:
        total[0] = 0  # a landmark alone in its block sees nothing
    assert close(weights.sum(-1), total.expand(2, 4, length))
    assert (weights[..., landmark] == 0).all()
    assert (weights[..., ~landmark] > 0).equal(
        torch.ones(length, length).tril().bool()[:, ~landmark].expand(2, 4, -1, -1)
    )


def test_the_first_block_is_causal_softmax():
    query, key, value = draw(3, groups=4)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert close(attend((query, key, value), 4), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_on_either_side(dtype):
    lengths, width = [(0, 9), (4, 9), (0, 3), (9, 9)], 9  # full, left, right, all padding
    inputs = draw(width, batch=4)
    mask = torch.zeros(4, width)
    offset = torch.tensor([1, 2, 0, 1])
    for b, (start, stop) in enumerate(lengths):
        mask[b, start:stop] = 1
        for x in inputs:
            x[b, :, :start], x[b, :, stop:] = torch.nan, torch.inf
    output = attend(inputs, 3, offset=offset, attention_mask=mask.to(dtype))
    for b, (start, stop) in enumerate(lengths):
        assert (output[b, :, :start] == 0).all() and (output[b, :, stop:] == 0).all()
        if stop > start:
            alone = by_tokens([x[b : b + 1, :, start:stop] for x in inputs], 3, int(offset[b]))
            assert close(output[b : b + 1, :, start:stop], alone)


@pytest.mark.parametrize("offsets", [1, [0, 2, 1]])
def test_packed_rows_are_rows_of_their_own(offsets):
    inputs = draw(14, batch=1)
    bounds = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    offset = torch.tensor(offsets) if isinstance(offsets, list) else offsets
    output = attend(inputs, 3, offset=offset, cu_seqlens=bounds)
    spans = zip(bounds[:-1], bounds[1:], torch.tensor(offsets).expand(3), strict=True)
    parts = [by_tokens([x[:, :, a:b] for x in inputs], 3, int(start)) for a, b, start in spans]
    assert close(output, torch.cat(parts, 2))


@pytest.mark.parametrize("closed", [[0], [1], [0, 2]])
def test_a_closed_block_is_as_if_it_were_not_there(closed):
    """For the queries after it; its own and those before it know nothing of it."""
    length, size, offset = 18, 4, 1  # blocks of 3, 4, 4, 4 and 3 tokens
    inputs = draw(length)
    block = (torch.arange(length) + offset) // size
    open_blocks = torch.tensor([[number not in closed for number in range(5)]]).expand(2, 5)
    output = attend(inputs, size, offset=offset, open_blocks=open_blocks)
    for number in range(5):
        kept = (block == number) | (block < number) & ~torch.isin(block, torch.tensor(closed))
        start = 0 if block[kept][0] > 0 else offset
        alone = by_tokens([x[:, :, kept] for x in inputs], size, start)
        own = block == number
        assert close(output[:, :, own], alone[:, :, -int(own.sum()) :])
    assert not close(output, attend(inputs, size, offset=offset))


def test_blocks_that_open_blocks_does_not_reach_are_open():
    inputs, part = draw(18), torch.tensor([[True, False], [False, False]])
    whole = torch.nn.functional.pad(part, (0, 5), value=True)
    assert close(attend(inputs, 4, open_blocks=part), attend(inputs, 4, open_blocks=whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_at_least_in_float32(dtype):
    inputs = [x.to(dtype) for x in draw(13)]
    exact = by_tokens([x.double() for x in inputs], 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(inputs, 4)
    assert output.dtype == dtype
    assert ((output.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


# --- gradients


def closed_form(inputs, grad, block_size, offset):
    """Section 1.2 of the mathematics for one key head per query head: the gradients of query, key and value."""
    query, key, value = inputs
    length, dim = query.shape[2:]
    score = query @ key.mT / dim**0.5
    block = (torch.arange(length) + offset) // block_size
    landmark = (torch.arange(length) + offset) % block_size == block_size - 1
    tokens = [((block == c) & ~landmark).nonzero()[:, 0] for c in range(int(block[-1]) + 1)]
    gate = torch.stack([landmark[j] & (len(tokens[int(block[j])]) > 0) & (block[j] < block) for j in range(length)], 1)
    local = ~landmark & (block == block[:, None]) & torch.ones(length, length).tril().bool()
    a = score.masked_fill(~(local | gate), -torch.inf).softmax(-1).nan_to_num(0.0)
    p = a.masked_fill(~local, 0.0)
    inner = {}
    for j in (landmark & gate.any(0)).nonzero()[:, 0].tolist():
        inner[j] = tokens[int(block[j])], score[..., tokens[int(block[j])]].softmax(-1)
        p[..., inner[j][0]] += a[..., j : j + 1] * gate[:, j, None] * inner[j][1]
    g = grad @ value.mT
    total = (p * g).sum(-1, keepdim=True)
    grad_score = (p * (g - total)).masked_fill(~local, 0.0)
    for j, (members, weights) in inner.items():
        mean = (g[..., members] * weights).sum(-1, keepdim=True)
        open_gate = a[..., j : j + 1] * gate[:, j, None]
        grad_score[..., j : j + 1] = open_gate * (mean - total)
        grad_score[..., members] += open_gate * weights * (g[..., members] - mean)
    return grad_score @ key / dim**0.5, grad_score.mT @ query / dim**0.5, p.mT @ grad


@pytest.mark.parametrize(("block_size", "offset", "length"), CUTS)
def test_gradients_are_the_closed_form(block_size, offset, length):
    inputs = [x.requires_grad_() for x in draw(length, groups=4)]
    grad = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(attend(inputs, block_size, offset=offset), inputs, grad)
    expected = closed_form([x.detach() for x in inputs], grad, block_size, offset)
    for left, right in zip(found, expected, strict=True):
        assert close(left, right)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in draw(7, heads=2, groups=1, dim=4)]
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
    offset = torch.tensor([2, 1])
    assert torch.autograd.gradcheck(lambda *x: attend(x, 3, offset=offset, attention_mask=mask), inputs)


# --- the dispatch


@pytest.mark.parametrize("op, reason", [("landmark", "float64"), ("landmark_retrieval", "no Triton kernel")])
def test_the_dispatch_finds_the_definition(op, reason):
    kernel, problem = find_kernel(op, CONTRACT)
    assert kernel is not None and not problem
    inputs = draw(4)
    assert choose_backend(op, CONTRACT, "reference", False, inputs, {"block_size": 16}) is kernel.reference
    with pytest.raises(ValueError, match=reason):
        choose_backend(op, CONTRACT, "triton", True, inputs, {"block_size": 16})
