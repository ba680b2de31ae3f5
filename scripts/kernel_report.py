"""What `benchmark_kernels.py` writes from its records: bars, roofline, tables, plot, and the results page."""

import csv
import importlib.util
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from kernel_measures import COUNTED, floor_ms

BAR_SHAPE = {"dim": 128, "features": 128, "heads": 32, "groups": 32, "batch": 1, "window": 64}
FORWARD, BOTH, DECODE = "forward", "forward+backward", "decode"
FLA_LINEAR, FLA_GLA, FLASH = "fla chunk_linear_attn", "fla chunk_simple_gla", "SDPA flash"


# --- bars


@dataclass(frozen=True)
class Bar:
    """figure <= limit, or <= factor x the peer's same figure. lengths None: every length measured."""

    op: str
    mode: str
    figure: str  # a key of a record
    lengths: tuple[int, ...] | None
    limit: float = math.inf
    peer: str = ""
    factor: float = 1.0


BARS = [
    Bar("hybrid", FORWARD, "ms", (2048,), peer=FLASH),
    Bar("hybrid", FORWARD, "ms", (8192,), limit=0.35),
    Bar("hybrid", FORWARD, "ms", (8192,), peer=FLA_LINEAR, factor=0.5),
    Bar("hybrid", FORWARD, "ms", (32768,), limit=1.3),
    Bar("hybrid", BOTH, "ms", (2048,), limit=0.9),
    Bar("hybrid", BOTH, "ms", (8192,), limit=1.8),
    Bar("hybrid", BOTH, "ms", (8192,), peer=FLA_LINEAR, factor=0.65),
    Bar("hybrid", BOTH, "ms", (32768,), limit=6.0),
    Bar("hybrid", BOTH, "peak_mib", (8192, 32768), peer=FLA_LINEAR, factor=0.5),
    Bar("cosine", FORWARD, "ms", None, peer=FLA_GLA),
    Bar("cosine", BOTH, "ms", None, peer=FLA_GLA),
    Bar("hybrid", BOTH, "error_output", (8192, 32768), limit=5e-3),
    Bar("hybrid", BOTH, "error_gradients", (8192, 32768), limit=1e-2),
    Bar("cosine", BOTH, "error_output", (8192, 32768), limit=5e-3),
    Bar("cosine", BOTH, "error_gradients", (8192, 32768), limit=1e-2),
    Bar("hybrid", DECODE, "drift", None, limit=1e-3),
]
WORDS = {
    "ms": "ms",
    "graph_ms": "ms under a graph",
    "peak_mib": "peak MiB",
    "error_output": "error of the output",
    "error_gradients": "largest error of a gradient",
    "drift": "state decoded one by one against the prefill's",
}


def judge(records: list[dict]) -> list[dict]:
    """Every bar against each of our fused rows at the bar's shape; times also as replays of a CUDA graph."""
    rows: list[dict] = []
    for bar in BARS:
        ours = [r for r in records if r["ours"] and r["op"] == bar.op and r["mode"] == bar.mode and at_bar_shape(r)]
        ours = [r for r in ours if "chunked" not in r["contender"] and (bar.mode == DECODE or not r["sinks"])]
        for length in bar.lengths or sorted({r["length"] for r in ours}):
            named = [r for r in ours if r["length"] == length]
            row = {"mode": bar.mode, "length": length, "what": WORDS[bar.figure]}
            row["bar"] = f"{bar.factor:g} x {bar.peer}" if bar.factor != 1 else bar.peer or f"{bar.limit:g}"
            verdicts = [_verdict(bar, r, records) for r in named if bar.figure in r]
            if not verdicts:
                why = next((r["skipped"] for r in named if "skipped" in r), "not measured")
                verdicts = [{"contender": f"ours: {bar.op}", "figure": None, "limit": None, "met": None, "why": why}]
            rows += [row | verdict for verdict in verdicts]
    return rows


def at_bar_shape(record: dict) -> bool:
    return all(record[name] == value for name, value in BAR_SHAPE.items())


def _verdict(bar: Bar, record: dict, records: list[dict]) -> dict:
    """figure, limit, met (None where the peer is missing); for times graph_figure, graph_limit, graph_met too."""
    same = ("mode", "length", *BAR_SHAPE)
    peers = [r for r in records if r["contender"] == bar.peer and all(r[name] == record[name] for name in same)]
    row: dict = {"contender": record["contender"]}
    for prefix, name in (("", bar.figure), *([("graph_", "graph_ms")] if bar.figure == "ms" else [])):
        limit: float | None = bar.limit
        if bar.peer:
            limit = bar.factor * peers[0][name] if peers and name in peers[0] else None
        figure = record.get(name)
        met = None if limit is None or figure is None else bool(figure <= limit)  # NaN is not met
        row |= {f"{prefix}figure": figure, f"{prefix}limit": limit, f"{prefix}met": met}
    if row["met"] is None:
        row["why"] = f"{bar.peer} did not run"
    return row


# --- tables


def _number(value, digits: int = 3) -> str:
    if value is None:
        return ""
    if value != value:
        return "NaN"
    if value == 0 or 1e-2 <= abs(value) < 1e7:
        return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.1e}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def bars_table(bars: list[dict]) -> str:
    rows = []
    for bar in bars:
        said = {True: "yes", False: "**no**", None: ""}
        cells = [f"{bar['mode']}, {bar['what']}", bar["length"], bar["contender"], bar["bar"]]
        cells += [_number(bar["figure"], 4), _number(bar["limit"], 4), said[bar["met"]] or bar["why"]]
        cells += [_number(bar.get(f"graph_{name}"), 4) for name in ("figure", "limit")] + [said[bar.get("graph_met")]]
        rows.append(cells)
    header = ["what", "T", "row", "bar", "figure", "at most", "met", "graph: figure", "at most", "met"]
    return _markdown(header, rows)


def shapes_of(records: list[dict]) -> list[tuple]:
    """The shapes measured, length aside, the bar's first."""
    shapes = {tuple(r[name] for name in BAR_SHAPE) for r in records if r["mode"] != DECODE}
    return sorted(shapes, key=lambda shape: (shape != tuple(BAR_SHAPE.values()), shape))


def times_table(records: list[dict], shape: tuple) -> str:
    """Rows by contender and length at one shape; eager median, (20th to 80th percentile), under a graph."""
    rows = []
    named = [r for r in records if tuple(r[name] for name in BAR_SHAPE) == shape and "ms" in r]
    training = {(r["contender"], r["length"]): r for r in named if r["mode"] == BOTH}
    for record in (r for r in named if r["mode"] == FORWARD):
        both = training.get((record["contender"], record["length"]), {})
        cells = [record["contender"], record["length"]]
        for r in (record, both):
            spread = f" ({_number(r['ms_p20'])} to {_number(r['ms_p80'])})" if r else ""
            cells += [_number(r.get("ms")) + spread, _number(r.get("graph_ms"))]
        cells += [_number(r.get("peak_mib"), 0) for r in (record, both)]
        cells += [_number(both.get(name)) for name in ("error_output", "error_gradients")]
        rows.append(cells)
    rows.sort(key=lambda cells: cells[1])
    header = ["", "T", "forward, ms", "graph", "forward + backward, ms", "graph", "peak MiB, f", "peak MiB, f + b"]
    return _markdown([*header, "error, output", "error, worst gradient"], rows)


def decode_table(records: list[dict]) -> str:
    rows = []
    for r in (r for r in records if r["mode"] == DECODE and "ms" in r):
        times = [_number(1000 * r[name], 1) if name in r else "" for name in ("ms", "graph_ms")]
        cells = [r["contender"], f"{r['heads']} over {r['groups']}", r["length"], *times]
        rows.append([*cells, _number(r["held_mib"], 1)])
    return _markdown(["", "heads", "context", "us a token", "graph", "kept per sequence, MiB"], rows)


def roofline_table(records: list[dict], rates: dict) -> str:
    rows = []
    for r in records:
        if r["op"] not in COUNTED or not r["ours"] or r["mode"] == DECODE or "chunked" in r["contender"]:
            continue
        if "ms" not in r or not at_bar_shape(r):
            continue
        moved, computed = floor_ms(r, rates)
        best, floor = min(r["ms"], r.get("graph_ms", math.inf)), max(moved, computed)
        cells = [r["contender"], r["mode"], r["length"], *map(_number, (moved, computed, best))]
        rows.append([*cells, "bytes" if moved >= computed else "FLOPs", f"{best / floor:.2f}"])
    return _markdown(["", "", "T", "bytes, ms", "FLOPs, ms", "best measured, ms", "bound by", "times the floor"], rows)


def absent_list(records: list[dict]) -> str:
    """Each contender that did not run, with the reason, its modes and lengths together."""
    words = {"skipped": "", "graph_skipped": " under a graph", "error_skipped": ", its error"}
    reasons: dict[tuple[str, str], dict[str, set]] = {}
    for record in records:
        for kind in (kind for kind in words if kind in record):
            key = (record["contender"] + words[kind], record[kind])
            found = reasons.setdefault(key, {"mode": set(), "length": set()})
            for name, values in found.items():
                values.add(record[name])
    return "\n".join(
        f"- {name} ({', '.join(sorted(found['mode']))}; T = {', '.join(map(str, sorted(found['length'])))}): {reason}"
        for (name, reason), found in reasons.items()
    )


def summary(results: dict) -> str:
    """Everything but the plot, as Markdown."""
    records, machine, rates = results["records"], results["machine"], results["ceilings"]
    parts = [
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, fla-core {machine['fla-core']}, "
        f"commit {machine['commit']}, seed {machine['seed']}, {machine['date']}.",
        "## Bars\n\n" + bars_table(judge(records)),
    ]
    for shape in shapes_of(records):
        named = dict(zip(BAR_SHAPE, shape, strict=True))
        title = f"## B {named['batch']}, {named['heads']} heads over {named['groups']}, D {named['dim']}, "
        parts.append(title + f"F {named['features']}, window {named['window']}\n\n" + times_table(records, shape))
    if any(r["mode"] == DECODE and "ms" in r for r in records):
        parts.append("## One token\n\n" + decode_table(records))
    text = (
        f"Measured here: a device copy at {rates['copy_tb_per_s']:.2f} TB/s (read plus written), a matrix product at "
        f"{rates['product_tflop_per_s']:.0f} TFLOP/s. Bytes: each input read once, each output written once; FLOPs: "
        "the chunked algorithm's (`count_bytes` and `count_flops` in `scripts/kernel_measures.py`)."
    )
    notes = dict.fromkeys(f"- {r['contender']}: {r['note']}." for r in records if "note" in r)
    if notes:
        parts.append("Notes:\n\n" + "\n".join(notes))
    parts.append("## Roofline\n\n" + text + "\n\n" + roofline_table(records, rates))
    if absent := absent_list(records):
        parts.append("## Not measured\n\n" + absent)
    return "\n\n".join(parts) + "\n"


# --- plot

INK, MUTED, GRID = "#1f2328", "#59636e", "#e4e7eb"
COLOURS = {
    "ours: hybrid, features": "#b3121d",
    "ours: hybrid, maps": "#e8590c",
    "ours: cosine": "#8a3ffc",
    "SDPA flash": "#3b3f46",
    "SDPA cuDNN": "#8c959f",
    "fla chunk_linear_attn": "#1170aa",
    "fla fused_chunk_linear_attn": "#5fa2ce",
    "fla chunk_simple_gla": "#2f855a",
    "FlexAttention, block window": "#a07c1c",
}


def plot(records: list[dict], path: Path, device: str) -> None:
    """Milliseconds over T at the bar's shape, log-log; labels stand at the lines' ends."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans", "text.color": INK})
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.4), constrained_layout=True)
    for panel, mode in zip(panels, (FORWARD, BOTH), strict=True):
        ends = []
        for name, colour in COLOURS.items():
            points = sorted(
                (r["length"], r["ms"])
                for r in records
                if r["contender"] == name and r["mode"] == mode and "ms" in r and at_bar_shape(r)
            )
            if not points:
                continue
            ours = name.startswith("ours")
            width, size = (2.6, 5.5) if ours else (1.4, 3.5)
            panel.plot(*zip(*points, strict=True), "-o", color=colour, linewidth=width, markersize=size)
            ends.append((points[-1], name, colour, ours))
        _frame(panel, mode)
        if ends:
            _label_ends(panel, ends)
    figure.suptitle(
        f"{device}: bf16, batch 1, 32 heads, D = F = 128, window 64; eager, median", fontsize=11, color=MUTED
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _frame(panel, mode: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_title(mode.replace("+", " + "), loc="left", fontsize=12, fontweight="bold")
    panel.set_xlabel("T, tokens")
    panel.set_ylabel("milliseconds")
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}" if x < 1024 else f"{x / 1024:.0f}k")
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    panel.grid(which="major", color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(which="both", length=0, colors=MUTED)
    for side in ("top", "right", "left", "bottom"):
        panel.spines[side].set_visible(False)


def _label_ends(panel, ends: list) -> None:
    """Labels in one column right of the last T, spread so that none overlap, each joined to its line's end."""
    low, high = (math.log10(y) for y in panel.get_ylim())
    left, right = (math.log2(x) for x in panel.get_xlim())
    last = max(math.log2(end[0][0]) for end in ends)
    ends = sorted(ends, key=lambda end: end[0][1])
    places = spread([math.log10(end[0][1]) for end in ends], (high - low) / 19)
    for (point, name, colour, ours), place in zip(ends, places, strict=True):
        panel.annotate(
            name,
            xy=point,
            xytext=(2 ** (last + 0.07 * (right - left)), 10**place),
            color=colour,
            fontsize=9.5,
            fontweight="bold" if ours else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.6, "relpos": (0, 0.5)},
        )
    panel.set_xlim(2**left, 2 ** (last + 0.55 * (right - left)))
    panel.set_xticks([2**power for power in range(math.ceil(left), int(last) + 1)])
    panel.set_xticks([], minor=True)


def spread(places: list[float], gap: float) -> list[float]:
    """Move ascending places apart to at least `gap`, as little as can be: blocks that touch share their middle."""
    blocks: list[list[float]] = []  # sum of (place - gap x its rank), how many
    for rank, place in enumerate(places):
        blocks.append([place - gap * rank, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    means = [total / count for total, count in blocks for _ in range(int(count))]
    return [mean + gap * rank for rank, mean in enumerate(means)]


# --- files


def write_records(results: dict, folder: Path) -> None:
    """results.json and results.csv, whole each time: a run that is cut off leaves what it has measured."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / "results.json.new"
    fresh.write_text(json.dumps(results, indent=1) + "\n")
    fresh.replace(folder / "results.json")
    flat = [{k: v for k, v in r.items() if not isinstance(v, dict)} for r in results["records"]]
    columns = list(dict.fromkeys(name for record in flat for name in record))
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)


def write_report(results: dict, folder: Path) -> None:
    write_records(results | {"bars": judge(results["records"])}, folder)
    (folder / "table.md").write_text("# Kernels\n\n" + summary(results))
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: draw the plot elsewhere, from results.json, with --report")
    else:
        plot(results["records"], folder / "kernels.png", results["machine"]["device"])


def write_page(results: dict, folder: Path, page: Path) -> None:
    """The results page, with the plot and the raw records copied to `results/` beside it."""
    store = page.parent / "results"
    store.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "kernels.png", store / "kernels.png")
    shutil.copy(folder / "results.json", store / "kernels.json")
    text = f"""# Kernels, measured

```bash
{results["command"]}
```

One process, the same random inputs for all; median of `triton.testing.do_bench` (L2 flushed before each call) and its
20th to 80th percentile; *graph*: the replay of a CUDA graph. Peak memory: while the op runs, minus its inputs, outputs
and gradients. Error: relative Frobenius against float64 from the same rounded inputs. fla tunes itself on the first
length run (8192). The hybrid op has window weight 16 and shift 0.5, both learned; *features* come as bf16 tensors,
*maps* as softmax weights of width F / 2 with magnitudes, from which the features are computed. Raw:
`results/kernels.json`.

![Milliseconds over T](results/kernels.png)

"""
    page.write_text(text + summary(results))
