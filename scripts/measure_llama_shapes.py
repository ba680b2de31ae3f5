"""End-to-end figures on one GPU for models of known shapes with random weights: stage 1 and decoding.

    python scripts/measure_llama_shapes.py --shape 8b --output_dir out/shapes
    python scripts/measure_llama_shapes.py --shape smollm2 --part stage1 --output_dir out/shapes

`stage1`: tokens per second of attention transfer beside the teacher's forward alone, and where a step's time goes.
`decode`: milliseconds and tokens per second of one token a step at a long context, student and teacher, eager and
captured in a CUDA graph, at batch 1 and the largest batch that fits. Writes llama-SHAPE-PART.json as it goes.
"""

import argparse
import subprocess
import time
from pathlib import Path

import torch
from llama_shapes import SHAPES, Clock, Record, attempt, random_student, say, student_config


def main(arguments: list[str] | None = None) -> list[dict]:
    args = parse(arguments)
    clock = Clock(args.device)
    torch.manual_seed(0)
    record = Record(Path(args.output_dir, f"llama-{args.shape}-{args.part}.json"), head(args))
    model = random_student(student_config(args.shape, args.layers), args.device)
    model.requires_grad_(False)
    model.set_op_backend(args.backend)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    record.add(part="model", layers=model.config.num_hidden_layers, weights_gb=weights / 1e9, memory=clock.memory())
    if args.part in ("stage1", "all"):
        from llama_shapes_transfer import measure_transfer

        with attempt(record, part="stage1"):
            measure_transfer(args, model, clock, record)
        model.zero_grad()
        clock.clear()
    if args.part in ("decode", "all"):
        from llama_shapes_decode import measure_decode

        with attempt(record, part="decode"):
            measure_decode(args, model, clock, record)
    summary(record)
    return record.data["rows"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--part", choices=("stage1", "decode", "all"), default="all")
    parser.add_argument("--output_dir", default="out/shapes")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has (the cost of each is the same)")
    parser.add_argument("--device", default="cuda", help="cpu, with --shape tiny, only tries the script out")
    parser.add_argument("--backend", default="auto", help="of the student's op: auto, triton, chunked")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of everything; the median counts")
    parser.add_argument("--warm_up", type=int, default=3, help="steps of stage 1 that do not count")
    parser.add_argument("--lengths", type=integers, default=[1024, 8192], help="of stage 1's sequences")
    parser.add_argument("--branches", type=lambda text: text.split(","), default=["mixed", "both"])
    parser.add_argument("--tokens_per_step", type=int, default=8192)
    parser.add_argument("--profile", action="store_true", help="also list stage 1's kernels by their time")
    parser.add_argument("--context", type=int, default=32768, help="tokens before a decode step")
    parser.add_argument("--batches", type=integers, default=[], help="of decoding, beside 1 and the largest")
    parser.add_argument("--compile", choices=("off", "on", "both"), default="off", help="norms, RoPE and SwiGLU")
    args = parser.parse_args(arguments)
    args.compile = {"off": [False], "on": [True], "both": [False, True]}[args.compile]
    return args


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def head(args: argparse.Namespace) -> dict:
    """What the figures were measured with."""
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "shape": args.shape,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
        "arguments": {name: value for name, value in vars(args).items() if name != "output_dir"},
    }


def summary(record: Record) -> None:
    """The short table at the end."""
    say(f"{record.data['shape']} on {record.data['device']}")
    for row in record.data["rows"]:
        part, line = row["part"], None
        if "error" in row:
            line = f"{row.get('model', '')} {row.get('kind', '')} FAILED: {row['error'][:160]}"
        elif part == "stage1":
            line = (
                f"{row['branch']:5s} T {row['length']:5d} x {row['batch']}  {row['tokens_per_second']:9.0f} tok/s"
                f"  teacher {row['teacher_tokens_per_second']:9.0f}  ratio {row['ratio']:.3f}{_against(row)}"
                f"  extra per layer {row['extra_ms_per_layer']:.2f} ms"
            )
        elif part == "decode":
            line = (
                f"{row['model']:7s} {row['kind']:18s} batch {row['batch']:4d}  {row['ms']:8.2f} ms"
                f"  {row['tokens_per_second']:9.1f} tok/s  state {row['state_gb']:.2f} GB"
                f"  peak {row['memory'].get('peak_gb', 0)} GB, in use {row['memory'].get('in_use_gb', 0)} GB"
            )
        elif part == "decode compared":
            line = f"best student over {row['against']}: {row['ratio']:.1f} times{_against(row)}"
        if line:
            print(f"  {part:16s} {line}", flush=True)


def _against(row: dict) -> str:
    if row["bar"] is None:
        return ""
    return f" (bar {row['bar']}{'' if row['ratio'] >= row['bar'] else ', NOT reached'})"


if __name__ == "__main__":
    main()
