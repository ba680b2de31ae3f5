"""Gain-cell attention: the definition against loops over cells, the chunked path against the definition."""

import itertools
import math

import pytest
import torch

import linearize.modeling.op_gain_cell_chunked as chunked
from linearize.modeling import GainCell, GainCellNoise, gain_cell_attention

SMALL = GainCell(tile=4, leak=0.01, score_saturation=8.0, output_saturation=10.0)
WINDOW = 12
CELLS = {
    "cell": SMALL,
    "linear": SMALL.linear(),
    "no-leak": SMALL.replace(leak=0.0),
    "fast-leak": SMALL.replace(leak=3.0),
    "published-grid": SMALL.replace(output_grid="published"),
    "no-levels": SMALL.replace(input_levels=None, weight_levels=None, output_levels=None),
}
NOISES = {
    "none": None,
    "read": GainCellNoise(read=0.05, seed=1),
    "mismatch": GainCellNoise(mismatch=0.1, seed=2),
    "write": GainCellNoise(write=0.05),
    "leak": GainCellNoise(leak_spread=0.4),
    "all": GainCellNoise(0.02, 0.1, 0.05, 0.3, seed=7),
}
BATCH, HEADS, GROUPS, DIM = 2, 4, 2, 6


def draw(length, dtype=torch.float64, seed=0, batch=BATCH, heads=HEADS, groups=GROUPS, dim=DIM):
    """Queries, keys and values that reach past the ranges on both sides."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(heads, low, high):
        return low + (high - low) * torch.rand(batch, heads, length, dim, generator=generator, dtype=dtype)

    return uniform(heads, -0.2, 1.1), uniform(groups, -0.1, 1.0), uniform(groups, -0.1, 1.0)


def attend(inputs, cell=SMALL, backend="chunked", window=WINDOW, **options):
    return gain_cell_attention(*inputs, cell=cell, window=window, backend=backend, **options)


def close(left, right, tolerance=1e-10):
    return left.shape == right.shape and (left - right).abs().max() <= tolerance


def in_pieces(inputs, pieces, **options):
    state, outputs, start = None, [], 0
    for size in pieces:
        part = [x[:, :, start : start + size] for x in inputs]
        output, state = attend(part, initial_state=state, return_state=True, **options)
        outputs.append(output)
        start += size
    assert start == inputs[0].shape[2]
    return torch.cat(outputs, 2), state


# --- the definition


def by_loops(inputs, cell, window):
    """Every cell by itself, in Python floats: an explicit ring of voltages, read token by token and tile by tile."""
    query, key, value = (x.tolist() for x in inputs)
    heads, groups, length, dim = len(query[0]), len(key[0]), len(query[0][0]), len(query[0][0][0])

    def level(x, low, high, levels):
        x = min(max(x, low), high)
        return (
            x if levels is None else low + (high - low) / (levels - 1) * round((x - low) / (high - low) * (levels - 1))
        )

    def charge(u, age):
        u *= math.exp(-cell.leak * age)
        return sum(c * u**power for power, c in enumerate(cell.polynomial))

    def converter(y):
        y = min(max(y, -1.0), 1.0)
        if cell.output_levels is None:
            return y
        if cell.output_grid == "symmetric":
            codes = cell.output_levels // 2 - 1
            return round(y * codes) / codes
        return round(y * (cell.output_levels - 1) / 2) * 2 / (cell.output_levels - 1)

    result = torch.zeros(inputs[0].shape, dtype=torch.float64)
    for row, head in itertools.product(range(len(query)), range(heads)):
        group, ring = head * groups // heads, [None] * window
        for n in range(length):
            stored = (key[row][group][n], value[row][group][n])
            voltages = [
                [level(x, *cell.weight_range, cell.weight_levels) - cell.offset for x in side] for side in stored
            ]
            ring[n % window] = (n, *voltages)
            pulse = [level(x, *cell.input_range, cell.input_levels) for x in query[row][head][n]]
            for first in range(0, window, cell.tile):
                total = [0.0] * dim
                for slot in filter(None, ring[first : first + cell.tile]):
                    token, k, v = slot
                    score = sum(p * charge(u, n - token) for p, u in zip(pulse, k, strict=True))
                    weight = min(max(score / cell.score_saturation, 0.0), 1.0)
                    total = [t + weight * charge(u, n - token) for t, u in zip(total, v, strict=True)]
                for d in range(dim):
                    result[row, head, n, d] += converter(total[d] / cell.output_saturation)
    return result


@pytest.mark.parametrize("name", CELLS)
def test_the_definition_is_the_ring_of_cells(name):
    inputs = draw(29)  # through two and a half windows
    output, _ = attend(inputs, CELLS[name], "reference")
    assert close(output, by_loops(inputs, CELLS[name], WINDOW))


@pytest.mark.parametrize("leak", [0.0, 0.02])
def test_a_linear_polynomial_is_the_published_linear_cell(leak):
    """specs: the linear model with absolute tiles, within one window, on the published grid."""
    cell = GainCell(
        polynomial=(0.0, 19.3, 0.0, 0.0), leak=leak, tile=4, output_grid="published", score_saturation=8.0,
        output_saturation=10.0,
    )  # fmt: skip
    q, k, v = draw(24, groups=HEADS)
    pulse = (q.clamp(0, 1) * 15).round() / 15
    stored = [(x.clamp(0, 0.9) / (0.9 / 7)).round() * (0.9 / 7) - 0.45 for x in (k, v)]
    age = torch.arange(24)[:, None] - torch.arange(24)
    fade = torch.exp(-leak * age.double())
    weights = (19.3 * pulse @ stored[0].mT * fade / 8).clamp(0, 1).masked_fill(age < 0, 0.0)
    expected = 0
    for first in range(0, 24, 4):
        tile = slice(first, first + 4)
        y = 19.3 / 10 * (weights * fade)[..., tile] @ stored[1][:, :, tile]
        expected = expected + (y.clamp(-1, 1) * 31 / 2).round() * 2 / 31
    for backend in ("reference", "chunked"):
        assert close(attend((q, k, v), cell, backend, window=24)[0], expected)


# --- the chunked path


@pytest.mark.parametrize("segment", [5, 256])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", CELLS)
def test_chunked_equals_the_definition(name, noise, segment, monkeypatch):
    monkeypatch.setattr(chunked, "SEGMENT", segment)
    inputs, options = draw(29), {"noise": NOISES[noise], "return_state": True}
    expected, expected_state = attend(inputs, CELLS[name], "reference", **options)
    output, state = attend(inputs, CELLS[name], **options)
    assert close(output, expected)
    for left, right in zip(state, expected_state, strict=True):
        assert left.dtype == right.dtype and close(left, right)


@pytest.mark.parametrize("gradient", ["exact", "linear"])
@pytest.mark.parametrize("noise", ["none", "all"])
@pytest.mark.parametrize("name", CELLS)
def test_gradients_equal_the_definition(name, noise, gradient):
    state = attend(draw(9, seed=3), CELLS[name], return_state=True)[1]
    found = []
    for backend in ("reference", "chunked"):
        leaves = [x.requires_grad_() for x in draw(21)]
        cells = [x.clone().requires_grad_() for x in state[:2]]
        options = {
            "gradient": gradient,
            "noise": NOISES[noise],
            "initial_state": state._replace(key=cells[0], value=cells[1]),
        }
        output, _ = attend(leaves, CELLS[name], backend, **options)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
        found.append(torch.autograd.grad((output * direction).sum(), [*leaves, *cells]))
    assert all(close(left, right) for left, right in zip(*found, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in found[0])


def test_the_exact_gradient_is_that_of_the_output():
    cell = SMALL.replace(input_levels=None, weight_levels=None, output_levels=None, output_saturation=100.0)
    inputs = [(0.1 + 0.7 * x).requires_grad_() for x in draw(9, batch=1, heads=2, groups=1, dim=3)]
    assert torch.autograd.gradcheck(lambda *x: attend(x, cell)[0], inputs)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_surrogate_is_the_published_linear_backward(backend):
    """Both products as if linear at first-order decay, around the true weights and clamps."""
    cell = SMALL.replace(output_saturation=30.0)
    q, k, v = (x.requires_grad_() for x in draw(12, groups=HEADS))
    output, _ = attend((q, k, v), cell, backend, gradient="linear")
    direction = torch.randn(output.shape, dtype=output.dtype)
    found = torch.autograd.grad((output * direction).sum(), (q, k, v))
    with torch.no_grad():
        pulse = (q.clamp(0, 1) * 15).round() / 15
        kappa, nu = ((x.clamp(0, 0.9) / (0.9 / 7)).round() * (0.9 / 7) - 0.45 for x in (k, v))
        age = (torch.arange(12)[:, None] - torch.arange(12)).double()
        fade, causal = torch.exp(-cell.leak * age), age >= 0
        raw = sum(c * fade**i * (pulse @ (kappa**i).mT) for i, c in enumerate(cell.polynomial)) / cell.score_saturation
        weights = raw.clamp(0, 1) * causal
        dk_free, dv = torch.zeros_like(raw), torch.zeros_like(v)
        for first in range(0, 12, 4):
            tile = slice(first, first + 4)
            y = sum(
                c * (weights * fade**i)[..., tile] @ (nu**i)[:, :, tile] for i, c in enumerate(cell.polynomial)
            ) / cell.output_saturation  # fmt: skip
            dy = direction * (y.abs() <= 1) / cell.output_saturation
            dk_free[..., tile] = 19.3 * (dy @ nu[:, :, tile].mT) * fade[..., tile]
            dv[:, :, tile] = 19.3 * (weights * fade)[..., tile].mT @ dy
        ds = dk_free * ((raw >= 0) & (raw <= 1) & causal) / cell.score_saturation
        dq, dk = 19.3 * (ds * fade) @ kappa, 19.3 * (ds * fade).mT @ pulse
        inside = [(x >= low) & (x <= high) for x, low, high in ((q, 0, 1), (k, 0, 0.9), (v, 0, 0.9))]
    assert all(close(g, e * m) for g, e, m in zip(found, (dq, dk, dv), inside, strict=True))


def test_later_tokens_change_nothing():
    inputs = draw(40)
    whole, _ = attend(inputs)
    for length in (1, 4, 13, 31):
        assert close(whole[:, :, :length], attend([x[:, :, :length] for x in inputs])[0])


@pytest.mark.parametrize("noise", ["none", "all"])
@pytest.mark.parametrize("pieces", [[1] * 36, [7, 1, 1, 12, 0, 15], [36], [35, 1], [3, 33]])
def test_prefill_and_decode_through_three_windows(pieces, noise):
    inputs = draw(3 * WINDOW)
    expected, expected_state = attend(inputs, return_state=True, noise=NOISES[noise])
    output, state = in_pieces(inputs, pieces, noise=NOISES[noise])
    assert close(output, expected)
    assert all(close(left, right) for left, right in zip(state, expected_state, strict=True))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, backend):
    inputs, lengths = draw(21, batch=3), (21, 14, 0)
    mask = torch.zeros(3, 21, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, 21 - length if side == "left" else 0 : 21 if side == "left" else length] = True
    spoiled = [x.masked_fill(~mask[:, None, :, None], math.nan) for x in inputs]
    options = {"noise": NOISES["all"], "return_state": True}
    output, state = attend(spoiled, backend=backend, attention_mask=mask, **options)
    assert (output[~mask[:, None, :, None].expand_as(output)] == 0).all()
    for row in (0, 1):
        alone = [x[row : row + 1][:, :, mask[row]] for x in inputs]
        expected, expected_state = attend(alone, **options)
        assert close(output[row : row + 1][:, :, mask[row]], expected)
        assert all(close(left[row : row + 1], right) for left, right in zip(state, expected_state, strict=True))
    assert state.count.tolist() == [21, 14, 0] and (state.written[2] == -1).all()
    again = draw(5, batch=3, seed=4)
    following, _ = attend(again, initial_state=state, noise=NOISES["all"])
    expected, _ = attend([x[2:] for x in again], noise=NOISES["all"])
    assert close(following[2:], expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_sequences_are_rows_of_their_own(backend):
    inputs, bounds = draw(30, batch=1), [0, 13, 13, 30]
    output, _ = attend(inputs, backend=backend, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in ((0, 13), (13, 30)):
        assert close(output[:, :, start:end], attend([x[:, :, start:end] for x in inputs])[0])


def test_float32_lands_on_the_neighbouring_level_rarely(record_property):
    """At the paper's sizes: tile outputs that rounding puts on another level than float64 does."""
    cell, window = GainCell(), 256
    inputs = draw(1024, torch.float32, batch=1, heads=2, groups=2, dim=64)
    wide = [x.double() for x in inputs]
    tiles = inputs[0].numel() * (window // cell.tile)

    def share(found, expected):
        return float((found.double() - expected).abs().mul(cell.output_levels / 2 - 1).round().sum() / tiles)

    exact, _ = attend(wide, cell, window=window)
    shares = {"chunked": share(attend(inputs, cell, window=window)[0], exact)}
    shares["decode"] = share(in_pieces(inputs, [1000, *[1] * 24], cell=cell, window=window)[0], exact)
    padded = [torch.cat([torch.full_like(x[:, :, :100], math.nan), x], 2) for x in inputs]
    mask = torch.arange(1124)[None] >= 100
    shares["padding"] = share(attend(padded, cell, window=window, attention_mask=mask)[0][:, :, 100:], exact)
    shares["prefix"] = share(attend([x[:, :, :500] for x in inputs], cell, window=window)[0], exact[:, :, :500])
    shares["reference"] = share(
        attend([x[:, :, :300] for x in inputs], cell, "reference", window=window)[0], exact[:, :, :300]
    )
    for name, value in shares.items():
        record_property(name, value)
    print("share of tile outputs on a neighbouring level:", shares)
    assert max(shares.values()) <= 1e-3


# --- levels


def test_levels():
    x = torch.linspace(-2, 2, 200001, dtype=torch.float64)
    cell = GainCell()
    assert chunked.to_levels(x, cell.input_range, 16).unique().numel() == 16
    stored = chunked.to_levels(x, cell.weight_range, 8).unique() - cell.offset
    assert torch.allclose(stored, torch.tensor([-7, -5, -3, -1, 1, 3, 5, 7]).double() * 0.45 / 7, atol=1e-12)
    ours = chunked.to_output_levels(x, cell).unique()
    assert ours.numel() == 31 and ours.min() == -1 and ours.max() == 1 and 0 in ours
    published = chunked.to_output_levels(x, cell.replace(output_grid="published")).unique()
    assert published.numel() == 33 and published.max() == pytest.approx(32 / 31)
    charges = sum(c * stored**power for power, c in enumerate(cell.polynomial))
    table = [-10.33, -5.65, -2.53, -0.38, 1.40, 3.38, 6.16, 10.31]
    assert torch.allclose(charges, torch.tensor(table).double(), atol=5e-3)
    assert torch.allclose(19.3 * stored[4:], torch.tensor([1.24, 3.72, 6.20, 8.69]).double(), atol=5e-3)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_silent_tile_gives_exactly_zero(backend):
    """Scores below 0 leave every weight 0: nothing leaks through offset or grid."""
    q, k, v = draw(20)
    output, _ = attend((torch.ones_like(q), torch.zeros_like(k), v), SMALL.linear(), backend)
    assert (output == 0).all()


def test_lower_ends_other_than_zero_are_levels_too():
    x = chunked.to_levels(torch.linspace(-1, 1, 1001, dtype=torch.float64), (-0.3, 0.5), 5).unique()
    assert torch.allclose(x, torch.tensor([-0.3, -0.1, 0.1, 0.3, 0.5]).double())


# --- noise


def test_noise_belongs_to_places_not_to_batches():
    inputs = draw(20)
    for noise in NOISES.values():
        together, _ = attend(inputs, noise=noise)
        flipped, _ = attend([x.flip(0) for x in inputs], noise=noise)
        assert close(flipped.flip(0), together)
    plain, _ = attend(inputs)
    assert close(attend(inputs, noise=GainCellNoise(seed=9))[0], plain)
    seeds = [attend(inputs, noise=GainCellNoise(read=0.05, seed=seed))[0] for seed in (1, 2)]
    assert not close(*seeds)


def test_draws_are_standard_normal_and_independent():
    draws = GainCellNoise(seed=3).draw("read", torch.arange(300)[:, None], torch.arange(400))
    assert abs(draws.mean()) < 0.01 and abs(draws.std() - 1) < 0.01 and abs((draws**4).mean() - 3) < 0.1
    assert abs((draws[1:] * draws[:-1]).mean()) < 0.01 and abs((draws[:, 1:] * draws[:, :-1]).mean()) < 0.01
    other = GainCellNoise(seed=3).draw("key write", torch.arange(300)[:, None], torch.arange(400))
    assert abs((draws * other).mean()) < 0.01


# --- the call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    inputs = [x.to(dtype) for x in draw(20)]
    with torch.autocast("cpu", torch.bfloat16):
        output, state = attend(inputs, return_state=True)
    assert output.dtype == dtype and state.key.dtype == torch.float32
    assert close(output, attend([x.float() for x in inputs])[0].to(dtype), 1e-2)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"leak": -1e-4}, "time constant"),
        ({"token_time": 0.0}, "above 0"),
        ({"weight_range": (0.9, 0.0)}, "lower end"),
        ({"input_range": (1.0, 1.0)}, "lower end"),
        ({"input_levels": 1}, "at least 2"),
        ({"weight_levels": 0}, "at least 2"),
        ({"output_levels": 31}, "even"),
        ({"output_levels": 2}, "at least 4"),
        ({"output_grid": "other"}, "symmetric"),
        ({"polynomial": (1.0, 2.0)}, "4 numbers"),
        ({"score_saturation": -1.0}, "above 0"),
        ({"tile": 0}, "at least 1"),
        ({"colour": 1}, "unknown key colour"),
    ],
)
def test_an_impossible_cell_is_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        GainCell.from_dict(change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"window": 10}, "multiple of the cell's tile"),
        ({"window": 0}, "multiple of the cell's tile"),
        ({"gradient": "other"}, "exact or linear"),
        ({"backend": "triton"}, "no Triton kernel"),
        ({"cu_seqlens": torch.tensor([0, 5]), "return_state": True}, "cu_seqlens"),
    ],
)
def test_an_impossible_call_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        attend(draw(5, batch=1), **options)


def test_a_cell_keeps_what_it_is_given():
    cell = GainCell(polynomial=[0, 1, 0, 2], weight_levels=None)
    assert GainCell.from_dict(cell.to_dict()) == cell and hash(cell) == hash(GainCell.from_dict(cell.to_dict()))
    assert cell.replace(tile=8).tile == 8 and cell.linear().polynomial == (0.0, 19.3, 0.0, 0.0)
    assert GainCell().replace(surrogate_slope=None).slope == pytest.approx(19.21, abs=5e-3)
    assert GainCell().time_constant == pytest.approx(4.875e-3)
