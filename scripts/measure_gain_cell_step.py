"""Forward and backward of gain-cell models on one GPU, eager and compiled, beside the softmax model of that shape.

    python scripts/measure_gain_cell_step.py --output gain_cell_step.json

Random weights: a GPT-2 of 29 M parameters (64 sequences of 512 tokens), SmolLM2-135M's shape (16 of 1024), under
bfloat16 autocast, the mechanism in float32, window 1024. Mean of several steps after two.
"""

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from linearize.conversion import convert
from linearize.modeling.compiled import compiled_training

SHAPES = {"gpt2_29m": (64, 512), "smollm2_135m": (16, 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gain_cell_step.json")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cpu, with --steps 1, only tries the script out")
    args = parser.parse_args()
    rows = []
    for shape in SHAPES:
        for cell, compiled in (
            (None, False),
            ("linear", False),
            ("linear", True),
            ("nonlinear", False),
            ("nonlinear", True),
        ):
            rows.append(measure(shape, cell, compiled, args))
            print(rows[-1], flush=True)
    record = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "torch": torch.__version__}
    Path(args.output).write_text(json.dumps({**record, "date": time.strftime("%Y-%m-%d"), "rows": rows}, indent=1))


def make(shape: str, cell: str | None):
    """The softmax model, or its conversion."""
    if shape == "gpt2_29m":
        config = GPT2Config(
            vocab_size=8192, n_positions=512, n_layer=8, n_head=8, n_embd=512, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )
    if cell is None:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return convert(folder, {"type": "gain_cell", "cell_kind": cell}, dtype="float32")


def measure(shape: str, cell: str | None, compiled: bool, args: argparse.Namespace) -> dict:
    """Milliseconds and peak memory of a step."""
    batch, length = SHAPES[shape]
    model = make(shape, cell).to(args.device).train()
    ids = torch.randint(0, 8192, (batch, length), device=args.device)
    gpu = args.device == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            with torch.autocast(args.device, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            model.zero_grad(set_to_none=True)
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    torch._dynamo.reset()
    with compiled_training() if compiled else nullcontext():
        warm = run(2)
        seconds = run(args.steps) / args.steps
    return {
        "shape": shape,
        "cell": cell or "softmax",
        "compiled": compiled,
        "ms": 1e3 * seconds,
        "tokens_per_second": batch * length / seconds,
        "first_two_steps_s": warm,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
    }


if __name__ == "__main__":
    main()
