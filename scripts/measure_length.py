"""Perplexity by length: trained students of any mechanism, in pieces of 1, 4 and 8 times their trained length.

    python scripts/measure_length.py out/students --texts one.txt other.txt --length 1024 --output length.json

Every length scores the same tokens of each text, in each arm that a student has: mixed, its window alone (softmax),
its memory alone (linear). Students are converted repositories with their tokenizer, or folders that hold some.
"""

import argparse
import json
from pathlib import Path

import torch

from linearize.commands import choose_device
from linearize.conversion import load_student, load_tokenizer
from linearize.data import TokenBlocks, load_text_blocks
from linearize.evaluation import perplexity
from linearize.evaluation.arms import arms_of
from linearize.evaluation.tables import Table, format_number, show_tables


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", type=Path)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens that the students were trained at")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--max_tokens", type=int, default=65_536, help="of each text")
    parser.add_argument("--batch_tokens", type=int, default=8_192, help="read together, one piece at least")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--output", type=Path, help="JSON file of the figures, rewritten after every student")
    args = parser.parse_args(arguments)
    if any(max(args.times) % times for times in args.times):
        parser.error(f"--times {args.times}: each must divide the greatest, so that all score the same tokens")
    figures: list[dict] = []
    for path in found_students(args.students):
        figures += measure(path, args)
        if args.output:
            args.output.write_text(json.dumps(figures, indent=1) + "\n")
    show_tables(tables(figures, args))


def found_students(paths: list[Path]) -> list[Path]:
    """The repositories among the paths, and those within the others."""
    found = []
    for path in paths:
        within = [path] if (path / "config.json").is_file() else sorted(x.parent for x in path.glob("*/config.json"))
        if not within:
            raise SystemExit(f"{path} holds no converted model: give a folder with a config.json, or one of such")
        found += within
    return found


def measure(path: Path, args: argparse.Namespace) -> list[dict]:
    """Perplexity of one student: every text, arm and length."""
    device = choose_device(args.device)
    model = load_student(path, dtype="float32" if device.type == "cpu" else "auto").to(device)
    tokenizer, longest, found = load_tokenizer(path), max(args.times) * args.length, []
    for text in args.texts:
        blocks = load_text_blocks(text, tokenizer, longest, max(args.max_tokens, longest))
        ids = torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))])
        for arm in arms_of(model):
            if arm == "teacher":
                continue
            for times in args.times:
                length = times * args.length
                pieces = TokenBlocks(ids.reshape(-1, length))
                result = perplexity(model, pieces, arm=arm, batch_size=max(1, args.batch_tokens // length))
                figure = {"student": path.name, "text": text, "arm": arm, "times": times, "tokens": result.tokens}
                found.append(figure | {"perplexity": result.perplexity, "seconds": result.seconds})
    return found


def tables(figures: list[dict], args: argparse.Namespace) -> list[Table]:
    """One for each text: a row for each student and arm, a column for each length."""
    made = []
    for text in args.texts:
        rows: dict[tuple[str, str], list[str]] = {}
        for figure in (x for x in figures if x["text"] == text):
            rows.setdefault((figure["student"], figure["arm"]), []).append(format_number(figure["perplexity"]))
        header = ["student, arm", *(f"{times}x: {times * args.length:,}" for times in args.times)]
        made.append(Table(f"Perplexity: {text}", header, [[", ".join(row), *cells] for row, cells in rows.items()]))
    return made


if __name__ == "__main__":
    main()
