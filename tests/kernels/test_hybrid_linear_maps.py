"""Triton's feature maps in its interpreter: against float64 autograd of `apply_feature_map`."""

import itertools

import pytest
import torch

from linearize.kernels.hybrid_linear import maps as kernels
from linearize.kernels.triton_support import interpreting
from linearize.modeling.feature_maps import FeatureMapWeights, apply_feature_map

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is there: tests/gpu has these")
ACTIVATIONS = ["softmax", "exp", "relu", "elu"]


def make(heads=2, map_heads=4, length=21, dim=12, width=6, activation="softmax", bias=True, magnitude=True, batch=2):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    maps = FeatureMapWeights(
        draw(map_heads, dim, width) / 2,
        draw(map_heads, width) if bias else None,
        draw(map_heads, dim) if magnitude else None,
        activation,
    )
    x = draw(batch, heads, length, dim)
    features = width * (2 if activation in ("softmax", "exp") else 1)
    return x, maps, draw(batch, map_heads, length, features)


def expected(x, maps, direction):
    """Features, dL/dx per map head, dL/dweight, dL/dbias, dL/dmagnitude, all in float64."""
    ratio = maps.weight.shape[0] // x.shape[1]
    wide = x.double().repeat_interleave(ratio, dim=1).requires_grad_()
    held = [None if y is None else y.double().requires_grad_() for y in maps[:3]]
    phi = apply_feature_map(wide, FeatureMapWeights(*held, maps.activation))
    leaves = [y for y in [wide, *held] if y is not None]
    gradients = iter(torch.autograd.grad((phi * direction.double()).sum(), leaves))
    return [phi.detach(), *(None if y is None else next(gradients) for y in [wide, *held])]


def found(x, maps, direction, span=None, **options):
    phi = kernels.map_features(x, maps, torch.float32, span, **options)
    grad_x = torch.ones(x.shape[0], maps.weight.shape[0], *x.shape[2:])
    gradients = kernels.map_backward(x, maps, direction, grad_x, span, **options)
    return [phi, grad_x - 1, *gradients]


def assert_close(ours, reference, tolerance=1e-5):
    for a, b in zip(ours, reference, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.shape == b.shape
            assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("bias", "magnitude"), list(itertools.product([True, False], repeat=2)))
def test_features_and_gradients(activation, bias, magnitude):
    case = make(activation=activation, bias=bias, magnitude=magnitude)
    assert_close(found(*case), expected(*case))


@pytest.mark.parametrize(("heads", "map_heads", "dim", "width"), [(1, 1, 32, 16), (3, 3, 20, 8), (1, 3, 16, 33)])
def test_shapes(heads, map_heads, dim, width):
    case = make(heads, map_heads, dim=dim, width=width)
    assert_close(found(*case), expected(*case))


def test_programs_share_the_tiles_of_all_rows():
    """Three rows of three tiles: one program takes all, or two (so that a program crosses rows), or nine."""
    case = make(batch=3, length=40)
    reference = expected(*case)
    for programs in (4, 8, 100):
        assert_close(found(*case, sizes=kernels.Sizes(16, 4, 1, programs)), reference)


@pytest.mark.parametrize("activation", ["softmax", "elu"])
def test_a_large_map_is_cut_along_d(activation, monkeypatch):
    monkeypatch.setattr(kernels, "WEIGHT_TILE", 1024)
    case = make(dim=40, width=10, activation=activation)
    assert kernels._shape(*case[:2])["PARTS"] == 3
    assert_close(found(*case), expected(*case))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_subgradients_at_floor_limit_and_ties(activation):
    """Features under the floor get no gradient, nor levels beyond the limit; tied extremes of `exp` share theirs."""
    x, maps, direction = make(activation=activation, map_heads=2, width=8)
    x[:, :, ::2] *= 30
    weight = maps.weight.clone()
    weight[:, :, 3] = weight[:, :, 4]
    weight[:, :, 6] = 0.0
    case = x, maps._replace(weight=weight, bias=None), direction
    reference = expected(*case)
    floored = (reference[0] / reference[0].amax(-1, True)) < 1e-11
    assert floored.any() or activation == "exp"
    assert_close(found(*case), reference)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_padding_is_selected_away(activation):
    x, maps, direction = make(activation=activation)
    start, length = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([18, 0], dtype=torch.int32)
    real = torch.zeros(2, 1, 21, 1, dtype=torch.bool)
    real[0, :, 3:] = True
    reference = expected(x.where(real, 0.0), maps, direction.where(real, 0.0))
    nan = torch.tensor(torch.nan)
    phi, grad_x, *gradients = found(x.where(real, nan), maps, direction.where(real, nan), (start, length))
    assert phi.isfinite().all()
    assert (grad_x.where(real, 0.0) == grad_x).all()
    assert_close([phi.where(real, 0.0), grad_x, *gradients], [reference[0].where(real, 0.0), *reference[1:]])


def test_strides_and_what_is_not_asked_for():
    x, maps, direction = make()
    reference = expected(x, maps, direction)
    spread = x.transpose(1, 2).contiguous().transpose(1, 2)
    grads = direction.transpose(1, 2).contiguous().transpose(1, 2)
    grad_x = torch.zeros(2, 21, 4, 12).transpose(1, 2)
    assert kernels.map_backward(spread, maps, grads, grad_x, need_weights=False) == (None, None, None)
    assert_close([grad_x], reference[1:2])
    assert_close(kernels.map_backward(spread, maps, grads), reference[2:])
    assert_close([kernels.map_features(spread.mT.contiguous().mT, maps, torch.float32)], reference[:1])


def test_no_tokens():
    x, maps, direction = make(length=0)
    phi, grad_x, *gradients = found(x, maps, direction)
    assert phi.shape == (2, 4, 0, 12)
    assert all((g == 0).all() for g in gradients)
