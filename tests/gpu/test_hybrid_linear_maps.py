"""Triton's feature maps on a GPU: against float64 in every dtype, at many shapes, and the same twice."""

import pytest
import torch

from linearize.modeling.feature_maps import FeatureMapWeights, apply_feature_map

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
# Relative Frobenius error. bfloat16 and float16 round features and grad_x once (2^-9, 2^-11) and dL/du, W once more.
TOLERANCE = {torch.bfloat16: (4e-3, 6e-3), torch.float16: (5e-4, 2e-3), torch.float32: (1e-5, 1e-5)}


def make(dtype, heads, map_heads, length, dim, width, activation, batch=2):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    maps = FeatureMapWeights(
        (torch.eye(dim)[:, :width] if width <= dim else 0) + draw(map_heads, dim, width) / dim**0.5,
        draw(map_heads, width),
        draw(map_heads, dim) / dim**0.5,
        activation,
    )
    features = width * (2 if activation in ("softmax", "exp") else 1)
    x = draw(batch, length, heads, dim).to(dtype).transpose(1, 2)
    direction = draw(batch, map_heads, length, features).to(dtype)
    return x.cuda(), maps._replace(**{k: getattr(maps, k).cuda() for k in ("weight", "bias", "magnitude")}), direction


def expected(x, maps, direction):
    """Features, dL/dx per map head and the map's gradients, in float64."""
    wide = x.double().repeat_interleave(maps.weight.shape[0] // x.shape[1], dim=1).requires_grad_()
    held = [y.double().requires_grad_() for y in maps[:3]]
    phi = apply_feature_map(wide, FeatureMapWeights(*held, maps.activation))
    return [phi.detach(), *torch.autograd.grad((phi * direction.cuda().double()).sum(), [wide, *held])]


def found(x, maps, direction):
    from linearize.kernels.hybrid_linear.maps import map_backward, map_features

    grad_x = torch.zeros(x.shape[0], maps.weight.shape[0], *x.shape[2:], dtype=x.dtype, device=x.device)
    phi = map_features(x, maps, x.dtype)
    return [phi, grad_x, *map_backward(x, maps, direction.cuda(), grad_x)]


def check(dtype, case):
    ours, reference = found(*case), expected(*case)
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert (a - b).norm() <= TOLERANCE[dtype][i > 0] * b.norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("activation", ["softmax", "exp", "relu", "elu"])
def test_against_float64(dtype, activation):
    check(dtype, make(dtype, 2, 4, 300, 128, 64, activation))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("dim", "width"),
    [
        (32, 8),
        (64, 16),
        (64, 32),
        (64, 64),
        (80, 40),
        (96, 48),
        (112, 56),
        (128, 128),
        (128, 256),
        (256, 64),
        (256, 256),
    ],
)
def test_shapes(dtype, dim, width):
    check(dtype, make(dtype, 1, 3, 200, dim, width, "softmax"))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_long_and_deterministic(dtype):
    case = make(dtype, 2, 2, 5000, 64, 32, "softmax", batch=3)
    first, second = found(*case), found(*case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(dtype, case)


def test_padding_is_selected_away():
    from linearize.kernels.hybrid_linear.maps import map_backward, map_features

    x, maps, direction = make(torch.bfloat16, 2, 2, 300, 64, 32, "softmax")
    real = torch.zeros(2, 1, 300, 1, dtype=torch.bool, device="cuda")
    real[0, :, 40:] = real[1, :, :170] = True
    span = tuple(torch.tensor(y, dtype=torch.int32, device="cuda") for y in ([40, 0], [260, 170]))
    zeroed, direction = x.where(real, 0.0), direction.cuda().where(real, 0.0)
    poisoned = x.where(real, torch.nan), direction.where(real, torch.nan)
    grad_x, clean_grad_x = torch.ones_like(zeroed), torch.ones_like(zeroed)
    assert map_features(poisoned[0], maps, torch.bfloat16, span).isfinite().all()
    gradients = map_backward(poisoned[0], maps, poisoned[1], grad_x, span)
    clean = map_backward(zeroed, maps, direction, clean_grad_x)
    assert torch.equal(grad_x.where(real, 1.0), grad_x)
    assert torch.equal(grad_x, clean_grad_x.where(real, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(gradients, clean, strict=True))
