"""Peak memory of the chunked path of hybrid linear attention over length, on the CPU: it grows with T, not with T x T.

    python scripts/measure_op_memory.py --lengths 2048,8192,32768

Each length runs in a process of its own, forward and backward (features by maps, window 64, 4 sinks, 4 heads of 64);
the figure is the process's peak resident memory minus what it held before the call.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import torch

HEADS, GROUPS, DIM, WIDTH = 4, 2, 64, 64


def peak_resident() -> int:
    """This process's peak resident memory in bytes; the kernel's rusage figure would include that of its parent."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_bytes(length: int, train: bool) -> int:
    """Bytes that one call adds to this process's peak."""
    from linearize.modeling import FeatureMapWeights, hybrid_linear_attention

    torch.manual_seed(0)
    shapes = [(1, HEADS, length, DIM), (1, GROUPS, length, DIM), (1, GROUPS, length, DIM)]
    query, key, value = (torch.randn(shape, requires_grad=train) for shape in shapes)
    maps = [
        FeatureMapWeights(torch.randn(HEADS, DIM, WIDTH, requires_grad=train), None, None, "softmax") for _ in "qk"
    ]
    before = peak_resident()
    with torch.set_grad_enabled(train):
        output, _ = hybrid_linear_attention(
            query, key, value, *maps, window_weight=torch.ones(HEADS), window=64, sinks=4
        )
    if train:
        output.sum().backward()
    return peak_resident() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--one", help="length,train: measure in this process and print bytes")
    args = parser.parse_args()
    if args.one:
        length, train = args.one.split(",")
        print(peak_bytes(int(length), train == "train"))
        return
    print(f"{'tokens':>8} {'forward MiB':>12} {'KiB per token':>14} {'fwd+bwd MiB':>12} {'KiB per token':>14}")
    for length in map(int, args.lengths.split(",")):
        cells = []
        for mode in ("infer", "train"):
            command = [sys.executable, __file__, "--one", f"{length},{mode}"]
            used = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells += [f"{used / 2**20:12.0f}", f"{used / 1024 / length:14.1f}"]
        print(f"{length:8d}", *cells)


if __name__ == "__main__":
    main()
