"""The chunked path on a GPU: against the definition in float64, in every dtype, for the op and for a model."""

import pytest
import torch
from tiny_models import make_student, make_teacher, perturb

from linearize.modeling import FeatureMapWeights, hybrid_linear_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)],
    ids=str,
)
def test_chunked_against_float64(dtype, tolerance):
    """Relative Frobenius error of output and gradients; the inputs are rounded to dtype before both."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [draw(2, 4, 300, 64), draw(2, 2, 300, 64), draw(2, 2, 300, 64)]
    maps = [(draw(4, 64, 32) / 8, draw(4, 32), draw(4, 64) / 8) for _ in "qk"]
    mix = {"window_weight": draw(4).exp(), "window_shift": draw(4)}
    direction = draw(2, 4, 300, 64)

    def run(device, dtype, backend):
        leaves = [x.to(dtype).to(device, wide(dtype) if backend == "reference" else dtype) for x in inputs]
        leaves = [x.requires_grad_() for x in leaves]
        held = [FeatureMapWeights(*(x.to(device, wide(dtype)) for x in m), "softmax") for m in maps]
        options = {name: x.to(device, wide(dtype)) for name, x in mix.items()}
        output, _ = hybrid_linear_attention(*leaves, *held, **options, window=16, sinks=4, backend=backend)
        gradients = torch.autograd.grad((output * direction.to(device)).sum(), leaves)
        return [x.detach().double().cpu() for x in (output, *gradients)]

    def wide(dtype):
        return torch.float64 if dtype == torch.float64 else torch.float32

    rounded = [x.to(dtype).double() for x in inputs]
    inputs = rounded
    expected = run("cpu", torch.float64, "reference")
    for ours, reference in zip(run("cuda", dtype, "chunked"), expected, strict=True):
        assert (ours - reference).norm() <= tolerance * reference.norm()


@torch.no_grad()
def test_a_model_generates_on_the_gpu_as_on_the_cpu():
    student = make_student(make_teacher(), {"linear": {"type": "linear", "window": 5, "sinks": 2}})
    perturb(student)
    student.double()
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = student.generate(ids, max_new_tokens=16, do_sample=False)
    found = student.cuda().generate(ids.cuda(), max_new_tokens=16, do_sample=False)
    assert torch.equal(found.cpu(), expected)
