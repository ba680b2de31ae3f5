"""A memory that forgets and maps that read other tensors, in the Triton kernels on a GPU, against float64."""

import pytest
import torch
from cuda_checks import assert_capturable
from tiny_models import make_student, make_teacher, perturb

from linearize.modeling import FeatureMapWeights, hybrid_linear_attention
from linearize.modeling.decoding import DecodingSession
from linearize.modeling.op_hybrid_linear_decode import hybrid_linear_step_, new_buffers, read_buffers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# Relative Frobenius error of outputs and of gradients: the same bars as without a gate.
TOLERANCE = {torch.bfloat16: (5e-3, 1e-2), torch.float16: (1e-3, 2e-3), torch.float32: (2e-5, 5e-5)}
PER_TOKEN = ("map_query", "map_key", "log_decay")


def make_call(dtype, batch=1, heads=4, groups=2, key_heads=4, length=300, dim=64, width=64, maps=True, seed=0):
    """Inputs by name, and what a call takes beside them; gates that keep half over 3 to 10000 tokens, and one that
    closes."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    call = {"query": draw(batch, heads, length, dim).to(dtype)}
    call |= {name: draw(batch, groups, length, dim).to(dtype) for name in ("key", "value")}
    if maps:
        for name, h in (("query_features", heads), ("key_features", key_heads)):
            call[name] = FeatureMapWeights(draw(h, dim, width // 2) / dim**0.5, None, draw(h, dim) / dim, "softmax")
        call |= {"map_query": draw(batch, heads, length, dim).to(dtype)}
        call |= {"map_key": draw(batch, groups, length, dim).to(dtype)}
    else:
        for name, h in (("query_features", heads), ("key_features", key_heads)):
            scores = 2 * draw(batch, h, length, width // 2)
            call[name] = torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1).to(dtype)
    call |= {"window_weight": draw(heads).exp() * 4, "window_shift": 0.5 + 0.1 * draw(heads)}
    call["log_decay"] = -(draw(batch, key_heads, length) * 2 - 5).exp()
    call["log_decay"][..., length // 3] = -50.0
    return call


def convert(value, dtype):
    if isinstance(value, torch.Tensor):
        value = value.detach().clone()
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value
    return value._make(convert(x, dtype) for x in value) if isinstance(value, tuple) else value


def leaves_of(call):
    """Floating-point inputs by name; a map's tensors each by their own."""
    for name, value in call.items():
        parts = {f"{name} {i}": x for i, x in enumerate(value)} if isinstance(value, tuple) else {name: value}
        yield from ((part, x) for part, x in parts.items() if isinstance(x, torch.Tensor) and x.is_floating_point())


def run(backend, call, options, direction, wide=False):
    """Output, and gradients of all floating-point inputs by name; in float64 if `wide`."""
    call = {name: convert(x, torch.float64 if wide else None) for name, x in call.items()}
    leaves = {name: x.requires_grad_() for name, x in leaves_of(call)}
    output, _ = hybrid_linear_attention(**call, **options, backend=backend)
    total = (output * direction.to(output.dtype)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}


def errors_of(dtype, call, options):
    """Relative Frobenius error of output and gradients by name.

    A single key has a softmax weight of 1, whatever its score, and a sum over all tokens may cancel: there the error
    is relative to a share of the upstream gradient.
    """
    direction = torch.randn_like(call["query"][..., : call["value"].shape[-1]])
    expected = run("chunked", call, options, direction, wide=True)
    found = run("triton", call, options, direction)
    least = {name: (1e-2 if x.dim() == 1 else 1e-4) * direction.double().norm() for name, x in expected.items()}
    return {
        name: ((found[name].double() - x).norm() / x.norm().clamp_min(least[name])).item()
        for name, x in expected.items()
    }


def compare(dtype, call, options):
    errors = errors_of(dtype, call, options)
    output_bar, gradient_bar = TOLERANCE[dtype]
    assert errors.pop("output") <= output_bar
    per_head = {name: errors.pop(name) for name in ("window_weight", "window_shift")}
    assert max(per_head.values()) <= 10 * gradient_bar, per_head
    assert max(errors.values()) <= gradient_bar, ", ".join(f"{name} {x:.1e}" for name, x in errors.items())


@pytest.mark.parametrize("level", ["logsumexp", "max"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("maps, key_heads", [(True, 4), (True, 2), (False, 4), (False, 2)], ids=str)
def test_dtypes(dtype, level, maps, key_heads):
    call = make_call(dtype, batch=2, maps=maps, key_heads=key_heads)
    compare(dtype, call, {"window": 64, "sinks": 4, "window_reference": level})


def test_unrotated_maps_without_a_gate():
    call = make_call(torch.bfloat16)
    del call["log_decay"]
    compare(torch.bfloat16, call, {"window": 64, "sinks": 4})


@pytest.mark.parametrize("dim, width", [(32, 32), (80, 64), (96, 256), (128, 128), (256, 128), (256, 256)])
def test_widths(dim, width):
    compare(torch.bfloat16, make_call(torch.bfloat16, dim=dim, width=width, maps=False), {"window": 64, "sinks": 4})


@pytest.mark.parametrize("dtype, dim, width", [(torch.float32, 128, 128), (torch.float16, 96, 32)])
def test_widths_in_other_dtypes(dtype, dim, width):
    compare(dtype, make_call(dtype, dim=dim, width=width), {"window": 64})


@pytest.mark.parametrize("window, sinks", [(0, 0), (0, 4), (1, 0), (37, 0), (100, 16), (256, 4)])
def test_windows(window, sinks):
    compare(torch.bfloat16, make_call(torch.bfloat16), {"window": window, "sinks": sinks})


@pytest.mark.parametrize("length", [3, 63, 64, 65, 128, 129, 1000])
def test_lengths(length):
    compare(torch.bfloat16, make_call(torch.bfloat16, length=length), {"window": 37, "sinks": 4})


@pytest.mark.parametrize("rows", ["left", "right", "packed"])
def test_rows(rows):
    if rows == "packed":
        bounds = torch.tensor([0, 1, 130, 130, 259, 300], device="cuda", dtype=torch.int32)
        compare(torch.bfloat16, make_call(torch.bfloat16), {"window": 64, "sinks": 4, "cu_seqlens": bounds})
        return
    mask = torch.ones(3, 300, device="cuda", dtype=torch.long)
    mask[1, slice(0, 77) if rows == "left" else slice(-77, None)] = 0
    call = make_call(torch.bfloat16, batch=3)
    compare(torch.bfloat16, call, {"window": 64, "sinks": 4, "attention_mask": mask})


@pytest.mark.parametrize("maps", [True, False], ids=["maps", "features"])
def test_errors_at_length_are_no_larger_than_without(maps):
    """At 8192 tokens, in bfloat16: the bars, and at most what the same call has without a gate (a tenth is noise)."""
    call = make_call(torch.bfloat16, length=8192, dim=128, width=128, maps=maps)
    options = {"window": 64, "sinks": 4}
    compare(torch.bfloat16, call, options)
    gated = errors_of(torch.bfloat16, call, options)
    decay_error = gated.pop("log_decay")
    del call["log_decay"]
    plain = errors_of(torch.bfloat16, call, options)
    shown = {name: (gated[name], plain[name]) for name in plain} | {"log_decay": decay_error}
    for name in ("window_weight", "window_shift"):  # sums that may cancel, held by `compare` alone
        gated.pop(name), plain.pop(name)
    assert gated["output"] <= 1.1 * plain["output"], shown
    assert max(gated.values()) <= 1.1 * max(plain.values()), shown


def test_two_runs_are_bit_equal():
    call = make_call(torch.bfloat16, batch=2, length=1000)
    direction = torch.randn(2, 4, 1000, 64, device="cuda")
    first, second = (run("triton", call, {"window": 64, "sinks": 4}, direction) for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
@pytest.mark.parametrize("maps, key_heads", [(True, 4), (True, 2), (False, 4)], ids=str)
def test_a_state_goes_on_and_steps_in_place(maps, key_heads):
    """A prompt in pieces, then token by token, from state to state and in place, as in one call."""
    call = make_call(torch.float32, batch=2, length=200, maps=maps, key_heads=key_heads)
    options = {"window": 64, "sinks": 4}
    by_token = [n for n in call if isinstance(call[n], torch.Tensor) and call[n].dim() > 1]

    def piece(span):
        return call | {name: call[name][:, :, span] for name in by_token}

    expected, last = hybrid_linear_attention(**call, **options, return_state=True, backend="triton")
    outputs, state, start, stepped = [], None, 0, []
    buffers = count = None
    for tokens in [70, 1, 100, *[1] * 29]:
        if start == 171:
            buffers, count = new_buffers(state, 2).load_(state), state.count.clone()
        cut = piece(slice(start, start + tokens))
        output, state = hybrid_linear_attention(
            **cut, **options, initial_state=state, return_state=True, backend="triton"
        )
        outputs.append(output)
        if buffers is not None:
            stepped.append(
                hybrid_linear_step_(
                    **cut,
                    **options,
                    window_reference="logsumexp",
                    scaling=None,
                    attention_mask=None,
                    log_weight=False,
                    buffers=buffers,
                    count=count,
                    backend="triton",
                )  # fmt: skip
            )
            count += 1
        start += tokens
    for found, theirs in ((torch.cat(outputs, 2), expected), (torch.cat(stepped, 2), expected[:, :, 171:])):
        assert (found - theirs).norm() <= 2e-5 * theirs.norm()
    for final in (state, read_buffers(buffers, count)):
        assert (final.kv - last.kv).norm() <= 1e-4 * last.kv.norm()
        assert torch.equal(final.window_key, last.window_key) and torch.equal(final.count, last.count)
        assert final.window_map_key is None or torch.equal(final.window_map_key, last.window_map_key)


def test_no_host_synchronisation_and_graph_capture():
    call = make_call(torch.bfloat16, batch=2)
    mask = torch.ones(2, 300, device="cuda", dtype=torch.long)
    mask[0, :50] = 0
    leaves = [x.requires_grad_() for _, x in leaves_of(call)]

    def step():
        output, _ = hybrid_linear_attention(**call, sinks=4, attention_mask=mask, backend="triton")
        return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]

    assert_capturable(step)


@torch.no_grad()
@pytest.mark.parametrize("capture", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("gate", ["head", "token", "key"])
def test_a_captured_session_gives_the_logits_of_a_full_forward(gate, capture):
    options = {"type": "linear", "window": 5, "sinks": 2, "map_input": "projections", "gate": gate, "gate_bias": 1.0}
    student = make_student(make_teacher(), {"linear": options})
    perturb(student)
    student.cuda()
    ids = torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(3)).cuda()
    full = student(ids).logits
    session = DecodingSession(student, 2, capture=capture)
    for i in range(23):
        assert (session.step(ids[:, i]) - full[:, i]).abs().max() <= 1e-3 * full.abs().max()
