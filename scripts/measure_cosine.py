"""Cosine attention beside SDPA over the sequence length: time and peak memory, forward and with backward.

    python scripts/measure_cosine.py --output docs/results/cosine_lengths_cpu.json
    python scripts/measure_cosine.py --device cuda --output cosine_lengths.json
    python scripts/measure_cosine.py --plot docs/results/cosine_lengths_cpu.json   # a PNG beside it

Batch 1, 8 heads, head dim 64, float32 on a CPU and bfloat16 on a GPU; random inputs; exponent 0.6 for every head. Each
row warms up, takes the median of some synchronised repetitions, and gives what its peak memory grew by from the inputs
on: a GPU's allocated bytes; on a CPU, where each row is a process of its own, the resident set, in steps of pages.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from linearize.modeling.op_cosine import cosine_attention
from linearize.modeling.op_hybrid_linear import hybrid_linear_attention

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEADS, DIM, WINDOW, SINKS = 8, 64, 64, 4
REPETITIONS = 5
FORMS = ("SDPA, causal", "cosine, causal", "cosine with window 64 + 4 sinks", "SDPA, both ways", "cosine, both ways")


def attend(form: str) -> Callable:
    """What is measured, of query, key, value and the exponent."""
    causal = "both" not in form
    if form.startswith("SDPA"):
        return lambda q, k, v, s: functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if "window" not in form:
        return lambda q, k, v, s: cosine_attention(q, k, v, exponent=s, causal=causal)[0]

    def windowed(q, k, v, s):
        options = {"window": WINDOW, "sinks": SINKS}
        near = hybrid_linear_attention(q, k, v, None, None, **options)[0]
        return near + cosine_attention(q, k, v, exponent=s, **options)[0]

    return windowed


def measure(form: str, length: int, backward: bool, device: str) -> dict:
    """One row, in this process."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = [torch.randn(1, HEADS, length, DIM, device=device, dtype=dtype) for _ in range(3)]
    inputs = [x.requires_grad_(backward) for x in inputs]
    exponent, run = torch.full((HEADS,), 0.6, device=device), attend(form)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = memory(device)

    def once() -> float:
        start = clock(device)
        output = run(*inputs, exponent)
        if backward:
            output.backward(torch.ones_like(output))
        return clock(device) - start

    with torch.set_grad_enabled(backward):
        times = [once() for _ in range(2 + REPETITIONS)][2:]
    return {
        "form": form,
        "length": length,
        "backward": backward,
        "milliseconds": round(1000 * statistics.median(times), 3),
        "peak_bytes": memory(device) - before,
    }


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device: str) -> int:
    """The highest so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def apart(form: str, length: int, backward: bool) -> dict:
    """A CPU's row, in a process of its own."""
    command = [sys.executable, __file__, "--row", form, str(length), str(backward)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(args: argparse.Namespace) -> dict:
    rows = []
    for backward in (False, True):
        for form in FORMS:
            for length in args.lengths:
                rows.append(
                    measure(form, length, backward, "cuda") if args.device == "cuda" else apart(form, length, backward)
                )
                print(rows[-1], flush=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    return {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}


def plot(record: dict, path: Path) -> None:
    """Time and memory over the length, forward above and with backward below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for line, backward in enumerate((False, True)):
        for axes, (key, unit, title) in zip(
            panels[line], (("milliseconds", 1, "milliseconds"), ("peak_bytes", 2**20, "peak memory, MiB")), strict=True
        ):
            for form in FORMS:
                found = [r for r in record["rows"] if r["form"] == form and r["backward"] is backward and r[key] > 0]
                style = "--" if form.startswith("SDPA") else "-"
                axes.plot([r["length"] for r in found], [r[key] / unit for r in found], style, marker=".", label=form)
            axes.set(xscale="log", yscale="log", ylabel=title, title="forward + backward" if backward else "forward")
            axes.set_xticks(LENGTHS, [str(x) for x in LENGTHS])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("tokens")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Batch 1, {HEADS} heads of {DIM}: {record['device']}, torch {record['torch']}")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--output", type=Path, default=Path("cosine_lengths.json"))
    parser.add_argument("--plot", type=Path, help="a file of an earlier run: only plot")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        form, length, backward = args.row
        print(json.dumps(measure(form, int(length), backward == "True", "cpu")))
        return
    if args.plot is None:
        args.output.write_text(json.dumps(measure_all(args), indent=1) + "\n")
    path = args.plot or args.output
    plot(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
