"""What a training step on a GPU must keep, whatever it computes."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_capturable(step: Callable[[], list[Tensor]]) -> None:
    """The step waits for nothing, and a CUDA graph of it gives the same bits."""
    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
