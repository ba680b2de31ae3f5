"""Tables of what `measure_students.py train` left: perplexity by length, past the teacher's positions, recall."""

import json
import math
from pathlib import Path

import numpy as np

Runs = dict[str, dict[int, dict]]
"""arm -> seed -> what its run left."""
QUARTERS = (0, 8, 16, 24, 32)
"""Of a 32k piece, in thousands of tokens."""


def report(folder: Path) -> None:
    """Print all tables in Markdown."""
    runs: Runs = {}
    for path in sorted(folder.glob("student_*.json")):
        run = json.loads(path.read_text())
        runs.setdefault(run["arm"], {})[run["seed"]] = run
    report_lengths(runs)
    report_far(runs)
    report_recall(runs)


def report_lengths(runs: Runs) -> None:
    """Ratio of perplexities to the teacher of the same seed, mean and half the range over seeds; then paired
    differences to the uniform window in nats a token at 8k over both foreign texts."""
    teachers = {seed: run["teacher"] for seed, run in runs["teacher"].items()}
    names = list(next(iter(teachers.values())))
    print("| student | seeds | kB a layer at 8k | " + " | ".join(names) + " | 8k against the window |")
    for arm, seeds in runs.items():
        for part in ("mixed", "softmax"):
            found = {seed: run[part] for seed, run in seeds.items() if part in run and seed in teachers}
            if not found:
                continue
            lengths = ("1024", "4096", "8192")
            cells = [" / ".join(ratio(found, teachers, text, length) for length in lengths) for text in names]
            size = next(iter(seeds.values()))["bytes"]["8192"] / 30_000
            print(f"| {arm}, {part} | {len(found)} | {size:.0f} | {' | '.join(cells)} | {against(runs, found)} |")


def report_far(runs: Runs) -> None:
    """32k pieces: perplexity of the same tokens read with 32k of context over that with 8k; and nats a token below the
    student's own window in each quarter."""
    print("\n| student, text | same tokens, 32k over 8k | below its own window, to 8k; 16k; 24k; 32k |")
    for arm, seeds in runs.items():
        for seed, run in seeds.items():
            for text, of in run.get("mixed", {}).items():
                if "each_1024_of_32768" not in of:
                    continue
                same = math.exp(np.mean(of["same_32768"]) - np.mean(of["same_8192"]))
                gain = np.array(run["softmax"][text]["each_1024_of_32768"]) - np.array(of["each_1024_of_32768"])
                parts = [interval(gain[:, a:b].ravel()) for a, b in zip(QUARTERS, QUARTERS[1:], strict=False)]
                print(f"| {arm} {seed}, {text} | {same:.3f} | {'; '.join(parts)} |")


def report_recall(runs: Runs) -> None:
    """Right tokens in %, at each length; against the windows placed by the same rule, paired."""
    found = {
        (arm, seed): run["recall"] for arm, seeds in runs.items() for seed, run in seeds.items() if "recall" in run
    }
    if not found:
        return
    tasks = list(next(iter(found.values())))
    control = next((of for (arm, _), of in found.items() if arm == "window_placed"), None)
    print("\n| student | " + " | ".join(tasks) + " | over placed windows |")
    for (arm, seed), of in found.items():
        cells = [" / ".join(f"{100 * np.mean(v):.1f}" for v in of[task].values()) for task in tasks]
        gains = [
            interval(100 * (np.array(of[task][n]) - np.array(control[task][n])), 1)
            for task in tasks
            for n in (of[task] if control else ())
        ]
        print(f"| {arm} {seed} | {' | '.join(cells)} | {'; '.join(gains)} |")


def ratio(found: dict, teachers: dict, text: str, length: str) -> str:
    values = [
        math.exp(np.mean(of[text][length]) - np.mean(teachers[seed][text][length])) for seed, of in found.items()
    ]
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def against(runs: Runs, found: dict) -> str:
    """Mean gain over the uniform window with its paired 95% interval over pieces and seeds."""
    gains = [
        old - new
        for seed, of in found.items()
        if seed in runs.get("window", {})
        for text in of
        if text != "validation"
        for old, new in zip(runs["window"][seed]["mixed"][text]["8192"], of[text]["8192"], strict=True)
    ]
    return interval(np.array(gains), 4) if gains else ""


def interval(values: np.ndarray, digits: int = 3) -> str:
    """Mean and half the width of its 95% interval."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"
