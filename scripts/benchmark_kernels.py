"""Our kernels against SDPA, FlexAttention and fla: time, CUDA graphs, decode, peak memory, error; table and plot.

    pip install fla-core==0.6.0                                    # a peer; whatever is missing is skipped by name
    python scripts/benchmark_kernels.py --preset issue --output out/kernels

Presets: `issue`, the bars' shapes (batch 1, 32 heads, D 128, F 128, window 64; T 2048, 8192, 32768); `full`, T 512 to
65536, D 64 and 128, F 64, 128 and 256, as many key heads as query heads and a quarter of them; `models`, window 224
and the heads of models: 32 over 32 and over 8 of D 128, 9 over 3 of D 64; batch 8 at T 1024, else 1, T 8192 and 32768;
`gate`, at T 8192 the memory that forgets and maps of unrotated projections over the same calls without (times and
their ratios); `smoke` and `gate-smoke`, tiny, on any machine. fla tunes itself for minutes at first; `--limit_seconds`
cuts a run short. DIR gets
results.json and results.csv (after every row), table.md and kernels.png; `--report DIR [DIR ...] --page
docs/results_kernels.md` writes the page from them, on any machine; the records of several runs of one machine are
joined, the later ones winning, in the first DIR.
"""

import argparse
import gc
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import kernel_measures as measures
import kernel_report as report
import torch
from kernel_peers import (
    CONTENDERS,
    DECODERS,
    GATE_CONTENDERS,
    GATE_DECODERS,
    IN_PLACE,
    MAPS,
    Case,
    Contender,
    Inputs,
    Shape,
    draw,
)

ROOT = Path(__file__).parents[1]
SLOW_MS = 100.0  # a quadratic peer's forward; longer sequences are then left out
CONTEXT = 8192
ERROR_LENGTHS = (8192, 32768)


def issue_shapes() -> list[Shape]:
    return [Shape(length) for length in (8192, 2048, 32768)]  # fla tunes itself on the first: a fair middle


def full_shapes() -> list[Shape]:
    shapes = issue_shapes() + [Shape(length) for length in (16384, 4096, 1024, 512, 65536)]
    for groups in (32, 8):
        for dim in (128, 64):
            for features in (128, 64, 256):
                shapes += [Shape(length, dim, features, groups=groups) for length in (8192, 2048, 32768)]
    return list(dict.fromkeys(shapes))


def smoke_shapes() -> list[Shape]:
    return [Shape(length, 32, 32, heads=2, groups=groups, window=16) for groups in (2, 1) for length in (64, 128)]


def model_shapes() -> list[Shape]:
    heads: list[dict] = [{"dim": 128}, {"dim": 128, "groups": 8}, {"dim": 64, "heads": 9, "groups": 3}]
    lengths = {8192: 1, 1024: 8, 32768: 1}  # and the batch
    return [Shape(length, **sizes, batch=batch, window=224) for length, batch in lengths.items() for sizes in heads]


def gate_shapes() -> list[Shape]:
    return [Shape(8192)]


PRESETS = {
    "issue": issue_shapes,
    "full": full_shapes,
    "models": model_shapes,
    "gate": gate_shapes,
    "smoke": smoke_shapes,
    "gate-smoke": lambda: smoke_shapes()[:1],
}
GATE_LIMITS = {report.FORWARD: 1.15, report.BOTH: 1.15, report.DECODE: 1.05}  # x the time of the same without


class Benchmark:
    """One run: measures case by case and keeps the files up to date."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, args.device
        self.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.deadline = time.monotonic() + args.limit_seconds
        self.slow: dict[str, str] = {}
        self.gate = args.preset.startswith("gate")
        self.smoke = args.preset.endswith("smoke")
        self.results: dict = {
            "command": command_line(args),
            "machine": machine(args),
            "ceilings": measures.ceilings(args.device),
            "records": [],
        }

    def run(self) -> dict:
        shapes = PRESETS[self.args.preset]()
        if self.args.lengths:
            shapes = [shape for shape in shapes if shape.length in self.args.lengths]
        first, rest = shapes[:3], shapes[3:]
        self.measure_all(first, compiled=False)
        self.decode()
        if self.gate:
            return self.results
        self.drift()
        self.measure_all(rest, compiled=False)
        self.measure_all(shapes, compiled=True)  # last: torch.compile takes long and a limit may cut it off
        return self.results

    def measure_all(self, shapes: list[Shape], compiled: bool) -> None:
        for shape in shapes:
            inputs = None
            for contender in self.chosen(shape, compiled):
                inputs = inputs or draw(shape, self.device, self.dtype, self.args.seed)
                self.measure(contender, inputs)
            del inputs
            self.clean()

    def chosen(self, shape: Shape, compiled: bool) -> list[Contender]:
        """Away from the bars' shape: those that do not read features once for all F; fla's linear ops, which tune
        themselves for minutes for each pair of widths, where F = D.
        """
        contenders = GATE_CONTENDERS if self.gate else CONTENDERS
        chosen = [c for c in contenders if self.wanted(c.name) and c.compiled == compiled]
        if self.args.preset == "full" and not report.at_bar_shape(vars(shape)):
            chosen = [c for c in chosen if c.longest is None and (c.reads_features or shape.features == 128)]
            chosen = [c for c in chosen if c.op != "linear" or shape.features == shape.dim]
        return chosen

    def wanted(self, name: str) -> bool:
        return not self.args.only or any(word in name for word in self.args.only)

    # --- one contender at one shape

    def measure(self, contender: Contender, inputs: Inputs) -> None:
        self.clean()
        shape = inputs.shape
        common: dict = {"op": contender.op, "contender": contender.name, "ours": contender.ours}
        common |= {"sinks": contender.sinks} | vars(shape)
        common |= {"by_maps": contender.by_maps, "bytes_per_number": inputs.query.element_size()}
        reason = self.reason_to_skip(contender, shape)
        if reason is None:
            try:
                case = contender.build(inputs)
            except Exception as error:  # a peer may fail in any way; the table says how
                reason = one_line(error)
        for mode in (report.FORWARD, report.BOTH):
            record: dict = common | {"mode": mode}
            record |= {"skipped": reason} if reason else self.measure_mode(contender, case, mode, shape)
            if "skipped" in record and mode == report.FORWARD:
                reason = record["skipped"]
            self.keep(record)

    def reason_to_skip(self, contender: Contender, shape: Shape) -> str | None:
        if contender.longest is not None and shape.length > contender.longest:
            return contender.why_longest
        if time.monotonic() > self.deadline:
            return f"the run's limit of {self.args.limit_seconds} s was reached"
        return self.slow.get(contender.name)

    def measure_mode(self, contender: Contender, case: Case, mode: str, shape: Shape) -> dict:
        try:
            step = measures.inference(case) if mode == report.FORWARD else measures.training_step(case)[0]
            record = self.times(step)
            del step
            if contender.quadratic and mode == report.FORWARD and record["ms"] > SLOW_MS:
                self.slow[contender.name] = f"its forward takes {record['ms']:.0f} ms at T = {shape.length} already"
            if mode == report.BOTH:
                record |= self.errors(contender, case, shape)
            if case.note:
                record["note"] = case.note
            return record
        except Exception as error:
            return {"skipped": one_line(error)}

    def times(self, call) -> dict:
        """Eager time, peak memory, time under a graph."""
        call()  # compiles and tunes
        record = dict(zip(("ms", "ms_p20", "ms_p80"), measures.time_call(call, self.device), strict=True))
        if self.device != "cuda":
            return record
        record["peak_mib"] = measures.peak_mib(call)
        if record["ms"] > measures.GRAPH_LIMIT_MS:
            return record | {"graph_skipped": f"launches cost nothing beside more than {measures.GRAPH_LIMIT_MS:g} ms"}
        try:
            names = ("graph_ms", "graph_ms_p20", "graph_ms_p80")
            return record | dict(zip(names, measures.time_graph(call), strict=True))
        except Exception as error:
            return record | {"graph_skipped": one_line(error)}

    def errors(self, contender: Contender, case: Case, shape: Shape) -> dict:
        """Errors of rows with a float64 reference, at the bars' lengths; at other shapes of ours, at 8192."""
        if case.reference is None or "chunked" in contender.name:
            return {}
        at_bars = report.at_bar_shape(vars(shape)) and shape.length in ERROR_LENGTHS
        if not (at_bars or (contender.ours and shape.length == 8192) or self.smoke):
            return {}
        try:
            found = measures.relative_errors(case)
        except Exception as error:
            return {"error_skipped": one_line(error)}
        gradients = {name: error for name, error in found.items() if name != "output"}
        worst = max(gradients.values(), key=lambda error: (error != error, error))  # NaN is the worst
        return {"error_output": found["output"], "error_gradients": worst, "errors": found}

    # --- decoding

    def decode(self) -> None:
        context = 64 if self.smoke else CONTEXT
        for groups in (2, 1) if self.smoke else (32, 8):
            sizes = {"dim": 32, "features": 32, "heads": 2, "window": 16} if self.smoke else {}
            shape = Shape(context + 1, groups=groups, **sizes)
            inputs = draw(shape, self.device, self.dtype, self.args.seed)
            for name, ours, build in GATE_DECODERS if self.gate else DECODERS:
                if not self.wanted(name):
                    continue
                record = {"op": "decode", "contender": name, "ours": ours, "mode": report.DECODE}
                record |= vars(shape) | {"length": context}
                try:
                    record |= self.decode_step(build, inputs)
                except Exception as error:
                    record["skipped"] = one_line(error)
                self.keep(record)
                self.clean()

    @torch.no_grad()
    def decode_step(self, build, inputs: Inputs) -> dict:
        step = build(inputs)
        return self.times(step.run) | {"held_mib": measures.mebibytes(step.held)}

    def drift(self) -> None:
        """32k tokens decoded one by one against their prefill."""
        shape = smoke_shapes()[0] if self.smoke else Shape(32768)
        name = "ours: hybrid, features, 4 sinks"
        if not self.wanted(name):
            return
        record = {"op": "hybrid", "contender": name, "ours": True, "mode": report.DECODE, **vars(shape)}
        try:
            inputs = draw(shape, self.device, self.dtype, self.args.seed)
            record["length"], record["drift"] = measures.state_drift(inputs)
        except Exception as error:
            record["skipped"] = one_line(error)
        self.keep(record)
        self.clean()

    # --- files and memory

    def keep(self, record: dict) -> None:
        self.results["records"].append(record)
        report.write_records(self.results, Path(self.args.output))
        shown = ("ms", "graph_ms", "peak_mib", "error_output", "error_gradients", "drift")
        figures = {name: record[name] for name in shown if name in record}
        text = ", ".join(f"{name} {figure:.4g}" for name, figure in figures.items()) or record["skipped"]
        width = f"{record['heads']}/{record['groups']} D{record['dim']} F{record['features']}"
        print(f"{record['length']:6d} {width} {record['mode']:17s} {record['contender']}: {text}", flush=True)

    def clean(self) -> None:
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def gate_table(records: list[dict]) -> str:
    """Times of each arm of `--preset gate` over those of the same call without gate and unrotated maps."""
    rows = ["| | mode | key heads | x time | x time, graph | at most |", "| --- | --- | --- | --- | --- | --- |"]
    for base in (r for r in records if r["contender"] in (MAPS, IN_PLACE) and "ms" in r):
        for r in records:
            same = all(r[name] == base[name] for name in ("mode", "length", "groups"))
            if not same or not r["contender"].startswith(f"{base['contender']}, ") or "ms" not in r:
                continue
            ratios = [
                f"{r[name] / base[name]:.3f}" if name in r and name in base else "" for name in ("ms", "graph_ms")
            ]
            cells = [r["contender"], r["mode"], str(r["groups"]), *ratios, str(GATE_LIMITS[r["mode"]])]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def one_line(error: Exception) -> str:
    """An exception's first line, short enough for a table and without this machine's paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = re.sub(r"\s*\(?(?<!\w)/[\w./-]{3,}\)?", "", lines[0]) if lines else ""
    return line[:160] or type(error).__name__


def command_line(args: argparse.Namespace) -> str:
    """The command as it can be run anywhere: where this run kept its files is nobody's business."""
    parts = ["python scripts/benchmark_kernels.py", f"--preset {args.preset}"]
    parts += [f"--only {shlex.quote(','.join(args.only))}"] if args.only else []
    parts += [f"--lengths {','.join(map(str, args.lengths))}"] if args.lengths else []
    parts += [f"--seed {args.seed}"] if args.seed else []
    return " ".join([*parts, "--output out/kernels"])


def machine(args: argparse.Namespace) -> dict:
    gpu = args.device == "cuda"
    facts = {"device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__}
    for name in ("triton", "transformers", "fla-core"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    commit = args.commit
    if commit is None:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    return facts | {"commit": commit, "seed": args.seed, "date": time.strftime("%Y-%m-%d")}


def join_runs(folders: Iterable[Path]) -> dict:
    """The results of several runs as one; a row measured again counts once, as last measured."""
    runs = [json.loads((folder / "results.json").read_text()) for folder in folders]
    key = ("contender", "mode", "length", *report.BAR_SHAPE)
    rows = {(*(r[name] for name in key), "drift" in r): r for run in runs for r in run["records"]}
    commands = dict.fromkeys(command for run in runs for command in run["command"].split("\n"))
    commits = dict.fromkeys(run["machine"]["commit"] for run in runs)
    machine = runs[0]["machine"] | {"commit": ", ".join(commits)}
    return {**runs[0], "machine": machine, "command": "\n".join(commands), "records": list(rows.values())}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="issue")
    parser.add_argument("--output", default="out/kernels", metavar="DIR")
    parser.add_argument("--report", metavar="DIR", nargs="+", help="measure nothing; report on these runs")
    parser.add_argument("--page", metavar="FILE", help="also write the results page there")
    parser.add_argument("--only", type=lambda x: x.split(","), help="parts of names, by commas: run these alone")
    parser.add_argument("--lengths", type=lambda x: [int(n) for n in x.split(",")], help="these lengths of the preset")
    parser.add_argument("--limit_seconds", type=float, default=float("inf"), help="start no case after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--commit", help="for a copy of the tree without its history")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    args = parse(arguments)
    if args.device == "cpu" and not args.preset.endswith("smoke") and not args.report:
        sys.exit("there is no GPU here: only --preset smoke and gate-smoke run on a CPU")
    folder = Path(args.report[0] if args.report else args.output)
    results = join_runs(map(Path, args.report)) if args.report else Benchmark(args).run()
    report.write_report(results, folder)
    if args.page:
        report.write_page(results, folder, Path(args.page))
    print((folder / "table.md").read_text())
    if args.preset.startswith("gate"):
        print(gate_table(results["records"]))
    return results


if __name__ == "__main__":
    main()
