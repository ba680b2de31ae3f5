"""How `benchmark_kernels.py` measures: time, time under a CUDA graph, peak memory, error, drift; and the roofline.

Gradients are taken by `torch.autograd.grad`, so no `.grad` exists and none is accumulated into.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from kernel_peers import WINDOW_SHIFT, WINDOW_WEIGHT, Case, Inputs, Shape
from torch import Tensor

WARMUP_MS, REPEAT_MS = 10, 60
GRAPH_LIMIT_MS = 20.0  # launches cost nothing beside a longer call
ERROR_TOKENS = 2**17  # heads x tokens that the float64 reference takes at a time: about 6 GiB
CHUNK = 64
COUNTED = ("hybrid", "cosine")  # the ops that `count_flops` knows

Times = tuple[float, float, float]


# --- time


def time_call(call: Callable[[], object], device: str) -> Times:
    """Milliseconds of a call: median, 20th and 80th percentile; by events on a GPU (cold L2), else by the clock."""
    if device == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(call, warmup=WARMUP_MS, rep=REPEAT_MS, quantiles=[0.5, 0.2, 0.8]))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - start))
    low, middle, high = sorted(taken)
    return middle, low, high


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a call; its replay, which returns what the captured call did."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def time_graph(call: Callable[[], object]) -> Times:
    """The same for the replay of a CUDA graph of the call."""
    return time_call(capture(call), "cuda")


def inference(case: Case) -> Callable[[], Tensor]:
    @torch.no_grad()
    def step():
        return case.run(case.tensors)

    return step


def training_step(case: Case) -> tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]:
    """A call that returns the output and the gradient of every input, for a fixed random upstream gradient."""
    leaves = {name: x.detach().requires_grad_() for name, x in case.tensors.items()}
    with torch.no_grad():
        upstream = torch.randn_like(case.run(leaves))

    def step():
        output = case.run(leaves)
        return output.detach(), *torch.autograd.grad(output, list(leaves.values()), upstream)

    return step, [upstream]


# --- memory


def peak_mib(call: Callable[[], object]) -> float:
    """Peak while the call runs minus what was there before (its inputs) and what it returns (outputs, gradients)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    returned = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    tensors = returned if isinstance(returned, tuple) else (returned,)
    return (peak - before - mebibytes(tensors) * 2**20) / 2**20


def mebibytes(tensors) -> float:
    return sum(x.numel() * x.element_size() for x in tensors) / 2**20


# --- error


def relative_errors(case: Case) -> dict[str, float]:
    """Relative Frobenius error of the output and of each gradient against the reference in float64.

    The reference takes the same numbers (its inputs are the rounded ones) a few key heads at a time.
    """
    assert case.reference is not None
    step, (upstream,) = training_step(case)
    names = ["output", *case.tensors]
    measured = dict(zip(names, step(), strict=True))
    groups = case.tensors["key"].shape[case.head_axis]
    heads, length = (case.tensors["query"].shape[axis] for axis in (case.head_axis, 3 - case.head_axis))
    block = max(1, ERROR_TOKENS // (length * heads // groups))
    wrong, whole = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for first in range(0, groups, block):

        def part(x, first=first):
            axis = case.head_axis if x.dim() == 4 else 0
            ratio = x.shape[axis] // groups
            return x.narrow(axis, first * ratio, min(block, groups - first) * ratio)

        leaves = {name: part(x).detach().double().requires_grad_() for name, x in case.tensors.items()}
        output = case.reference(leaves)
        gradients = torch.autograd.grad(output, list(leaves.values()), part(upstream).double())
        for name, exact in zip(names, (output.detach(), *gradients), strict=True):
            wrong[name] += float((part(measured[name]).double() - exact).square().sum())
            whole[name] += float(exact.square().sum())
        del leaves, output, gradients
    return {name: (wrong[name] / whole[name]) ** 0.5 for name in names}


def state_drift(inputs: Inputs, limit_s: float = 30.0) -> tuple[int, float]:
    """Decode tokens one by one and compare the state's sums with those of a prefill of as many tokens.

    Returns:
        The tokens decoded (fewer than given when the limit cuts in) and the larger relative error of the two sums.
    """
    from linearize.modeling import hybrid_linear_attention

    heads, device = inputs.shape.heads, inputs.query.device
    options: dict = {
        "window_weight": torch.full((heads,), WINDOW_WEIGHT, device=device),
        "window_shift": torch.full((heads,), WINDOW_SHIFT, device=device),
        "window": inputs.shape.window,
        "sinks": 4,
        "return_state": True,
        "backend": "triton",
    }
    tensors = (inputs.query, inputs.key, inputs.value, inputs.query_features, inputs.key_features)
    state: Any = None
    start, done = time.perf_counter(), 0
    with torch.no_grad():
        while done < inputs.shape.length and time.perf_counter() - start < limit_s:
            token = [x[:, :, done : done + 1] for x in tensors]
            state = hybrid_linear_attention(*token, **options, initial_state=state)[1]
            done += 1
        whole: Any = hybrid_linear_attention(*(x[:, :, :done] for x in tensors), **options)[1]
    pairs = ((state.kv, whole.kv), (state.normalizer, whole.normalizer))
    return done, max(float((a - b).double().norm() / b.double().norm()) for a, b in pairs)


# --- roofline


def ceilings(device: str) -> dict[str, float]:
    """The two measured rates: a device copy (bytes read plus written) and a square bf16 matrix product."""
    gpu = device == "cuda"
    source = torch.randn(2**28 if gpu else 2**20, device=device)
    target = torch.empty_like(source)
    copy_ms = time_call(lambda: target.copy_(source), device)[0]
    size = 8192 if gpu else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else None) for _ in "lr")
    product_ms = time_call(lambda: left @ right, device)[0]
    moved = 2 * source.numel() * source.element_size()
    return {"copy_tb_per_s": moved / copy_ms / 1e9, "product_tflop_per_s": 2 * size**3 / product_ms / 1e9}


def count_bytes(op: str, mode: str, shape: Shape, by_maps: bool, width: int = 2) -> float:
    """The fewest bytes an op must move: each input read once, each output written once, `width` bytes a number.

    Forward reads query, key, value (and features, when they come as tensors) and writes the output. Backward reads
    those inputs and the output's gradient, and writes the inputs' gradients. Map weights and numbers per head are
    left out: under 0.1% from 2048 tokens on.
    """
    tokens = shape.batch * shape.length
    inputs = tokens * (shape.heads + 2 * shape.groups) * shape.dim
    if op == "hybrid" and not by_maps:
        inputs += tokens * (shape.heads + shape.groups) * shape.features
    output = tokens * shape.heads * shape.dim
    numbers = inputs + output
    if mode == "forward+backward":
        numbers += inputs + output + inputs
    return width * numbers


def count_flops(op: str, mode: str, shape: Shape, by_maps: bool, sinks: int = 0) -> float:
    """The FLOPs of the chunked algorithm, chunk C = 64, whole tiles; a product of (m, k) and (k, n) is 2 m k n.

    Per query head and token, forward:
      softmax branch   2 (W + C + S) (D + D)   scores against, and values of, the keys that a chunk's windows touch
      linear branch    2 C (F + D)             pairs within the one chunk where linear and masked keys mix
                       2 F D                   the state of all chunks before
    and per key head and token 2 F D, the chunk's outer product. Cosine has no softmax branch and F = D. Maps add
    2 D f per token and head, f = F / 2. Backward: five products for each two of the branches (one recomputed, four
    gradients), five for each two of the state's (recomputed state, gradients of query, key, value features and
    state), and for maps three for one (recomputed, gradients of weight and input).
    """
    tokens, width = shape.batch * shape.length, shape.dim if op == "cosine" else shape.features
    pairs = 2 * CHUNK * (width + shape.dim)
    if op == "hybrid":
        pairs += 2 * (shape.window + CHUNK + sinks) * 2 * shape.dim
    state = 2 * width * shape.dim
    branches = tokens * (shape.heads * (pairs + state) + shape.groups * state)
    maps = tokens * (shape.heads + shape.groups) * shape.dim * shape.features if by_maps else 0
    return branches + maps if mode == "forward" else 3.5 * branches + 4 * maps


def floor_ms(record: dict, rates: dict[str, float]) -> tuple[float, float]:
    """Milliseconds that one of our rows needs at the measured rates: for its bytes, for its FLOPs."""
    shape = Shape(**{name: record[name] for name in Shape.__dataclass_fields__})
    arguments = (record["op"], record["mode"], shape, record["by_maps"])
    moved = count_bytes(*arguments, width=record["bytes_per_number"]) / rates["copy_tb_per_s"] / 1e9
    return moved, count_flops(*arguments, record["sinks"]) / rates["product_tflop_per_s"] / 1e9
