"""One decode step of softmax attention on the GPU of this machine: its time, and the board's energy where it is told.

Each query sees the whole cache. A causal flag would be wrong for it: SDPA aligns its causal mask at the top left, so a
single query would see the first key alone.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BATCHES = (1, 64)
DTYPE = torch.float16
L2_TURNS = 3  # inputs rotate through so many times the L2 cache: none is in it when its turn comes
GRAPH_CALLS = 32  # calls of one replay at least, so that starting it costs little beside them
WARM_UP, REPEATS = 5, 50
ENERGY_SECONDS = 2.0  # boards update their energy counter about ten times a second


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Of one call: median seconds, and joules of the whole board where it counts them."""

    seconds: float
    joules: float | None


@dataclasses.dataclass(frozen=True)
class GpuDecode:
    """One layer's attention for one new token of each sequence; a token's share is the step's over the batch."""

    device: str
    dtype: str
    window: int
    batch: int
    step_ns: float
    token_ns: float
    token_nj: float | None


def measure_gpu(heads: int, key_value_heads: int, head_dim: int, window: int) -> list[GpuDecode]:
    """Measure the visible GPU at each of `BATCHES`."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return [
        measure_decode(
            (batch, heads, key_value_heads, window, head_dim),
            device=torch.device("cuda", torch.cuda.current_device()),
            name=properties.name,
            l2_bytes=properties.L2_cache_size,
            measure=_measure_graph,
        )
        for batch in BATCHES
    ]


def measure_decode(
    shape: tuple[int, int, int, int, int],
    *,
    device: torch.device,
    name: str,
    l2_bytes: int,
    measure: Callable[[Sequence[Callable[[], Tensor]]], Measurement],
) -> GpuDecode:
    """Measure one decode step.

    Args:
        shape: batch, query heads, key/value heads, cached tokens, head dimension.
        device, name: where it runs, and what that is called in the result.
        l2_bytes: of the device's cache, which the rotating inputs exceed.
        measure: takes calls that differ in their inputs alone, and gives the figures of one call.
    """
    batch, heads, key_value_heads, window, head_dim = shape
    step_bytes = 2 * batch * key_value_heads * window * head_dim * DTYPE.itemsize
    calls = []
    for _ in range(max(1, math.ceil(L2_TURNS * l2_bytes / step_bytes))):
        query = torch.randn(batch, heads, 1, head_dim, device=device, dtype=DTYPE)
        key, value = torch.randn(2, batch, key_value_heads, window, head_dim, device=device, dtype=DTYPE)
        calls.append(partial(decode_step, query, key, value))
    found = measure(calls)
    return GpuDecode(
        device=name,
        dtype=str(DTYPE).removeprefix("torch."),
        window=window,
        batch=batch,
        step_ns=found.seconds * 1e9,
        token_ns=found.seconds * 1e9 / batch,
        token_nj=None if found.joules is None else found.joules * 1e9 / batch,
    )


def decode_step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one query token per head over every cached token.

    Args:
        query: `[B, H, 1, D]`.
        key, value: `[B, G, T, D]`, G a divisor of H.

    Returns:
        `[B, H, 1, D]`.
    """
    return scaled_dot_product_attention(query, key, value, is_causal=False, enable_gqa=query.shape[1] != key.shape[1])


def _measure_graph(calls: Sequence[Callable[[], Tensor]]) -> Measurement:
    """Time replays of a CUDA graph of the calls by events: launches from Python would be longer than the kernels."""
    calls = list(calls) * math.ceil(GRAPH_CALLS / len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(WARM_UP + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    seconds = statistics.median(times[WARM_UP:])
    replays = math.ceil(ENERGY_SECONDS / seconds)
    joules = _board_joules(graph.replay, replays)
    return Measurement(seconds / len(calls), None if joules is None else joules / replays / len(calls))


def _board_joules(run: Callable[[], None], times: int) -> float | None:
    """Joules of the whole board, idle power included, while `run` runs so often; None without NVML or its counter."""
    try:
        import pynvml
    except ImportError:
        return None
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    try:
        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        torch.cuda.synchronize()
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
        for _ in range(times):
            run()
        torch.cuda.synchronize()
        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(board) - before) / 1000
    except pynvml.NVMLError:
        return None
