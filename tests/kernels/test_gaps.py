"""Padding anywhere: rows with holes give on their real tokens what these give alone, by every op and every backend."""

import pytest
import torch

from linearize.kernels.triton_support import interpreting
from linearize.modeling import (
    FeatureMapWeights,
    GainCell,
    cosine_attention,
    gain_cell_attention,
    hybrid_linear_attention,
    landmark_attention,
)

HEADS, GROUPS, LENGTH, DIM = 2, 1, 21, 16
MASKS = {  # the second row is whole
    "hole": [slice(7, 10)],
    "holes": [slice(0, 2), slice(5, 6), slice(9, 13), slice(20, 21)],
    "every other": [slice(1, 21, 2)],
}
# Cells without levels: rounding would turn the last digit of a sum into a whole step.
CELL = GainCell(tile=4, leak=0.01, score_saturation=8.0, output_saturation=10.0).replace(
    input_levels=None, weight_levels=None, output_levels=None
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(tensors, backend, **options):
    maps = [FeatureMapWeights(draw(HEADS, DIM, 4, seed=i), None, None, "softmax") for i in (4, 5)]
    mix = {"window_weight": torch.tensor([0.5, 2.0]), "window": 4, "sinks": 2}
    return hybrid_linear_attention(*tensors, *maps, **mix, backend=backend, **options)


def features(tensors, backend, **options):
    """Linear attention whose features come as tensors."""
    query, key, value = tensors
    given = [query.abs(), key.abs().repeat_interleave(HEADS // GROUPS, 1)]
    return hybrid_linear_attention(
        *tensors, *given, window_weight=torch.ones(HEADS), window=0, sinks=0, backend=backend, **options
    )


def cosine(tensors, backend, **options):
    return cosine_attention(*tensors, exponent=torch.tensor([0.3, 0.7]), backend=backend, **options)


def cosine_window(tensors, backend, **options):
    return cosine_attention(*tensors, exponent=torch.tensor([0.3, 0.7]), window=4, sinks=1, backend=backend, **options)


def gain_cell(tensors, backend, **options):
    return gain_cell_attention(*tensors, cell=CELL, window=8, backend=backend, **options)


def landmark(tensors, backend, return_state=False, **options):
    return landmark_attention(*tensors, block_size=16 if backend == "triton" else 4, backend=backend, **options)


OPS = {
    f"{run.__name__}-{backend}": (run, backend)
    for run, kernels in (
        (linear, True),
        (features, True),
        (cosine, True),
        (cosine_window, False),
        (gain_cell, False),
        (landmark, True),
    )
    for backend in ("reference", "chunked", *(("triton",) if kernels and interpreting() else ()))
}


def make_call(name, seed=0):
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    for hole in MASKS[name]:
        mask[0, hole] = False
    shapes = [(2, heads, LENGTH, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)], mask


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("op", OPS)
def test_holes_do_not_matter(op, name):
    """Outputs, states and gradients; NaN in the padding, zeros out of it."""
    run, backend = OPS[op]
    tensors, mask = make_call(name)
    spoiled = [x.masked_fill(~mask[:, None, :, None], torch.nan).requires_grad_() for x in tensors]
    output, state = run(spoiled, backend, attention_mask=mask.long(), return_state=True)
    assert (output[~mask[:, None].expand(-1, HEADS, -1)] == 0).all()
    direction = draw(*output.shape, seed=9)
    gradients = torch.autograd.grad((output * direction).sum(), spoiled)
    for row in range(2):
        real = mask[row]
        alone = [x[row : row + 1, :, real].detach().requires_grad_() for x in tensors]
        expected, after = run(alone, backend, return_state=True)
        assert (output[row : row + 1, :, real] - expected).abs().max() <= 1e-5
        found = torch.autograd.grad((expected * direction[row : row + 1, :, real]).sum(), alone)
        for ours, theirs in zip(gradients, found, strict=True):
            assert (ours[row : row + 1, :, real] - theirs).abs().max() <= 1e-4
            assert torch.isfinite(ours).all()
        if state is not None:
            for ours, theirs in zip(state, after, strict=True):
                if ours is not None and ours.numel():
                    assert (ours[row : row + 1] - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("op", [name for name in OPS if not name.startswith("landmark")])
@torch.no_grad()
def test_a_call_goes_on_after_holes(op):
    run, backend = OPS[op]
    tensors, mask = make_call("hole")
    state, outputs = None, []
    for part in (slice(0, 12), slice(12, 13), slice(13, LENGTH)):
        pieces = [x[:, :, part] for x in tensors]
        options = {"attention_mask": mask[:, part], "initial_state": state, "return_state": True}
        output, state = run(pieces, backend, **options)
        outputs.append(output)
    alone, _ = run([x[:1, :, mask[0]] for x in tensors], backend)
    assert (torch.cat(outputs, 2)[:1, :, mask[0]] - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(2, LENGTH + 1), (2, LENGTH - 1), (1, LENGTH)])
def test_a_mask_of_another_shape_is_refused(op, shape):
    run, backend = OPS[op]
    with pytest.raises(ValueError, match="covers this call's 21 tokens alone"):
        run(make_call("hole")[0], backend, attention_mask=torch.ones(shape))
