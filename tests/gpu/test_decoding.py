"""Decoding on a GPU: the kernel against the definition, graphs against ordinary decoding, and no wait for the host."""

import contextlib

import pytest
import torch
from tiny_models import make_student, make_teacher, perturb
from transformers import DynamicCache

import linearize.kernels.hybrid_linear.decode as decode
from linearize.kernels.hybrid_linear import reference
from linearize.modeling import FeatureMapWeights, HybridLinearState
from linearize.modeling.decoding import DecodingSession
from linearize.modeling.op_hybrid_linear_decode import hybrid_linear_step_, new_buffers, read_buffers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

STEPS = 80
SHAPES = {
    # heads, groups, key map heads, D, f, activation, window, sinks
    "llama": (8, 2, 8, 128, 64, "softmax", 64, 4),
    "wide-map": (4, 2, 4, 128, 128, "exp", 16, 0),
    "small": (3, 3, 3, 32, 32, "softmax", 7, 1),
    "d80": (4, 2, 4, 80, 40, "elu", 5, 2),
    "d96-shared": (4, 2, 2, 96, 96, "relu", 20, 2),
    "d112": (4, 1, 4, 112, 64, "softmax", 64, 4),
    "d256": (4, 2, 4, 256, 128, "softmax", 32, 4),
    "linear-arm": (4, 2, 4, 64, 64, "softmax", 0, 0),
}


@contextlib.contextmanager
def no_host_wait():
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def draw_case(shape, dtype, batch=3):
    heads, groups, key_heads, dim, f, activation, window, sinks = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    inputs = [draw(batch, h, STEPS, dim).to(dtype) for h in (heads, groups, groups)]
    maps = [
        FeatureMapWeights(draw(h, dim, f) / dim**0.5, draw(h, f), 0.3 * draw(h, dim) / dim**0.5, activation)
        for h in (heads, key_heads)
    ]
    options = {
        "window_weight": draw(heads).abs() + 0.1,
        "window_shift": draw(heads) / 4,
        "window_reference": "logsumexp",
        "window": window,
        "sinks": sinks,
        "scaling": None,
    }
    mask = torch.ones(batch, STEPS, dtype=torch.bool)
    mask[0, [0, 40]] = False
    return inputs, maps, options, mask


def moved(maps, *where):
    return FeatureMapWeights(*(x.to(*where) for x in maps[:3]), maps.activation)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_the_definition(shape, dtype, tolerance):
    """Relative Frobenius error of all outputs, in place and from state to state; 16-bit outputs are rounded once."""
    inputs, maps, options, mask = draw_case(shape, dtype)
    wide = [x.double() for x in inputs]
    weights = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    expected, last = reference(
        *wide, *(moved(m, torch.float64) for m in maps), **weights, attention_mask=mask, return_state=True
    )
    _, empty = reference(
        *(x[:, :, :1] for x in inputs), *maps, **options, attention_mask=mask[:, :1] & False, return_state=True
    )
    inputs, mask = [x.cuda() for x in inputs], mask.cuda()
    maps = [moved(m, "cuda") for m in maps]
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    state = HybridLinearState._make(None if x is None else x.cuda() for x in empty)
    buffers, count = new_buffers(state, mask.shape[0]), torch.zeros_like(state.count)
    functional, in_place = [], []
    for i in range(STEPS):
        call = [*(x[:, :, i : i + 1] for x in inputs), *maps]
        real = mask[:, i : i + 1]
        output, state = decode.decode_step(*call, **options, attention_mask=real, state=state)
        functional.append(output)
        in_place.append(
            hybrid_linear_step_(
                *call, **options, log_weight=False, attention_mask=real, buffers=buffers, count=count, backend="triton"
            )
        )
        count += real[:, 0]
    for outputs in (functional, in_place):
        ours = torch.cat(outputs, 2).double().cpu()
        assert (ours - expected).norm() <= tolerance * expected.norm()
    for final in (state, read_buffers(buffers, count)):
        for name in ("kv", "normalizer"):
            ours, theirs = getattr(final, name).double().cpu(), getattr(last, name)
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name
        assert torch.equal(final.count.cpu(), last.count)
        assert torch.equal(final.window_key.cpu(), last.window_key.to(dtype))
        assert torch.equal(final.sink_value.cpu(), last.sink_value.to(dtype))


LINEAR = {"type": "linear", "window": 5, "sinks": 2}
SALIENT = {"type": "salient", "window": 6, "sinks": 2, "kept_tokens": 5}
STUDENTS = {
    "linear": ({"linear": LINEAR}, None),
    "salient": ({"salient": SALIENT}, None),
    "both": ({"linear": LINEAR, "salient": SALIENT}, ["salient", "linear", "salient"]),
}


@pytest.fixture(params=STUDENTS)
def model(request):
    student = make_student(make_teacher(), *STUDENTS[request.param])
    perturb(student)
    return student.cuda()


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(3)).cuda()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["greedy", "sampling", "beams"],
)
def test_captured_generation_is_the_same(model, ids, options, dtype):
    """In float64 graphs hold the chunked path, in float32 the kernel; a second call replays the first one's graph."""
    model.to(dtype)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    call = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **options}
    torch.manual_seed(0)
    expected = model.generate(ids, **call)
    with model.captured_decoding():
        for _ in range(2):
            torch.manual_seed(0)
            assert torch.equal(model.generate(ids, **call), expected)


@torch.no_grad()
@pytest.mark.parametrize("capture", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_a_session_gives_the_logits_of_a_full_forward(model, ids, capture, compile):
    full = model(ids).logits
    session = DecodingSession(model, 2, capture=capture, compile=compile)
    for i in range(23):
        assert (session.step(ids[:, i]) - full[:, i]).abs().max() <= 1e-3 * full.abs().max()


@torch.no_grad()
def test_a_session_in_bfloat16_and_back_to_a_cache(ids):
    student = make_student(make_teacher(head_dim=64), {"linear": LINEAR})
    perturb(student)
    student.cuda()
    for name, parameter in student.named_parameters():
        if ".mixer." not in name:
            parameter.data = parameter.data.bfloat16()
    full = student(ids).logits
    session = DecodingSession(student, 2)
    for i in range(22):
        logits = session.step(ids[:, i])
    assert (logits - full[:, 21]).float().norm() <= 5e-2 * full[:, 21].float().norm()
    cache = session.to_cache()
    logits = student(ids[:, 22:], past_key_values=cache, use_cache=True).logits[:, -1]
    assert (logits - session.step(ids[:, 22])).float().norm() <= 5e-2 * logits.float().norm()


@torch.no_grad()
def test_no_step_waits_for_the_host(model, ids):
    session = DecodingSession(model, 2)
    cache = DynamicCache(config=model.config)
    mask = torch.ones_like(ids)
    longer = [torch.ones(2, 24 + i, dtype=torch.long, device="cuda") for i in range(4)]
    token, rows = ids[:, :1].clone(), torch.tensor([1, 0]).cuda()
    model(ids, attention_mask=mask)  # compiles what the calls below launch
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    model(token, attention_mask=longer[0], past_key_values=cache, use_cache=True)
    cache.reset()
    with no_host_wait():
        session.step(token)
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        model(token, attention_mask=longer[0], past_key_values=cache, use_cache=True)
    with model.captured_decoding():
        model(input_ids=token, attention_mask=longer[1], past_key_values=cache, use_cache=True)
        with no_host_wait():
            model(input_ids=token, attention_mask=longer[2], past_key_values=cache, use_cache=True)
            cache.reorder_cache(rows)
            model(input_ids=token, attention_mask=longer[3], past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_a_masked_forward_and_backward_do_not_wait_for_the_host(model, ids, backend):
    model.set_op_backend(backend)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for checked in (False, True):
        with no_host_wait() if checked else contextlib.nullcontext(), torch.enable_grad():
            model(ids, attention_mask=mask).logits.sum().backward()
