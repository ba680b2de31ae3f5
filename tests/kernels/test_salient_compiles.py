"""The Triton kernels of salient-token attention through the compiler, for an H100, without a GPU.

The interpreter takes what the compiler refuses, such as a name that changes its shape in a loop. Run as a script, in
a process that does not interpret, this file compiles every launch of some calls and prints the kernels' names.
"""

import os
import subprocess
import sys

import pytest
import torch

KERNELS = ("window", "mass", "sort", "merge", "until", "fwd", "bwd_query", "bwd_far", "bwd_key")
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
POINTERS |= {torch.uint8: "*u8", torch.float16: "*fp16"}
CALLS = ["plain", "packed", "state", "none kept"]
STEPS = ["masked", "whole", "float32", "window of one", "none kept", "window alone"]
WIDE_STEPS = [(dim, dtype) for dim in (64, 128) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_every_kernel_compiles(call):
    expected = {f"salient_{name}_kernel" for name in KERNELS if call != "none kept" or name in KERNELS[5:]}
    assert set(compiled("call", call)) == expected


@pytest.mark.slow
def test_the_decode_kernel_compiles():
    assert compiled("steps") == ["salient_decode_kernel"] * len(STEPS + WIDE_STEPS)


def compiled(*arguments):
    """The names that this file prints as a script."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def compile_launch(kernel, grid, tensors, numbers, constants, warps, stages, registers=None, shared=None):
    """Compile what `launch` would run; the same arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from linearize.kernels.launching import AMPLE_SHARED_MEMORY, _chosen

    fixed, signature = _chosen(kernel, shared or {}, constants), {}
    for name, value in zip(kernel.arg_names, [*tensors, *numbers], strict=False):
        if value is None or (isinstance(value, int) and value == 1):  # what Triton makes constants of
            fixed[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    options = {"num_warps": warps, "num_stages": stages}
    done = compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32), options=options)
    assert done.metadata.shared <= AMPLE_SHARED_MEMORY
    print(kernel.fn.__name__)


def compile_call(call):
    """Forward and backward of a small call."""
    import linearize.kernels.salient.function as function
    from linearize.kernels.hybrid_linear.rows import make_rows

    function.launch = compile_launch
    window, sinks, kept = 40, 2, 0 if call == "none kept" else 20
    places = 40 + (window + sinks + kept if call == "state" else 0)
    query, key, value = (torch.zeros(1, *shape, 16).bfloat16() for shape in ((2, 40), (1, places), (1, places)))
    bounds = torch.tensor([0, 40], dtype=torch.int32) if call == "packed" else None
    count = torch.tensor([5]) if call == "state" else None
    settings = function.Call(make_rows(query, None, bounds, count), window, sinks, kept, 0.6, 0.25)
    old = (torch.zeros(1, 1, window), torch.zeros(1, 1, kept)) if call == "state" else (None, None)
    chosen = function.run_choice(settings, query, key, *old)[:2] if kept else (None, None)
    output, level = function.run_forward(settings, query, key, value, *chosen, save=True)
    function.run_backward(settings, query, key, value, *chosen, output, level, torch.zeros_like(output))


def compile_steps():
    """One-token steps of every kind, and those of models' heads at the usual window and store."""
    import linearize.kernels.salient.decode as decode

    decode.launch = compile_launch
    for step in STEPS:
        window, sinks = 1 if step == "window of one" else 40, 0 if step == "window alone" else 2
        kept = 0 if step in ("none kept", "window alone") else 20
        dtype = torch.float32 if step == "float32" else torch.bfloat16
        compile_step(decode.decode_step_, dtype, 16, window, sinks, kept, step == "masked")
    for dim, dtype in WIDE_STEPS:
        compile_step(decode.decode_step_, dtype, dim, 224, 4, 220, False)


def compile_step(decode_step_, dtype, dim, window, sinks, kept, masked):
    """One token of one row, two query heads over one key head."""
    query, key, value = (torch.zeros(1, heads, 1, dim, dtype=dtype) for heads in (2, 1, 1))
    held = [torch.zeros(1, 1, n, dim, dtype=dtype) for n in (window, window, kept, kept, sinks, sinks)]
    mass, rank = torch.zeros(1, 1, window), torch.zeros(1, 1, kept)
    decode_step_(
        query,
        key,
        value,
        window=window,
        sinks=sinks,
        kept=kept,
        age_penalty=0.6,
        scaling=None,
        attention_mask=torch.ones(1, 1, dtype=torch.bool) if masked else None,
        buffers=[*held[:2], mass, *held[2:4], rank, *held[4:]],
        count=torch.tensor([5]),
    )


if __name__ == "__main__":
    compile_steps() if sys.argv[1] == "steps" else compile_call(sys.argv[2])
