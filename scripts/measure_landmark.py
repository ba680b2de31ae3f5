"""Landmark attention beside softmax attention on one GPU: training steps, prefill and decoding at a long context.

    python scripts/measure_landmark.py --shape smollm2_135m --output landmark.json
    python scripts/measure_landmark.py --shape llama_8b --parts decode --output landmark_8b.json

Random weights and tokens. `step`: forward and backward at 1008 tokens under bfloat16 autocast, of the softmax model,
of blocks that weigh by their landmarks, and of blocks that weigh by their tokens, some left out; eager and compiled.
`decode`: a prompt read in pieces of 2048, then single tokens, in bfloat16: milliseconds, and bytes that the cache
holds on the GPU and in CPU memory. Medians after two warm-ups.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from linearize.conversion import convert
from linearize.modeling.compiled import compiled_training

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "smollm2_135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "llama_8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
}  # fmt: skip
PIECE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2_135m")
    parser.add_argument("--parts", nargs="+", choices=["step", "decode"], default=["step", "decode"])
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a training step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda", help="cpu, with the shape tiny, only tries the script out")
    parser.add_argument("--output", default="landmark.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    if "step" in args.parts:
        for settings, compiled in (
            (None, False),
            (None, True),
            ({}, False),
            ({}, True),
            ({"block_weight": "tokens", "block_dropout": 0.5}, False),
            ({"block_weight": "tokens", "block_dropout": 0.5}, True),
        ):
            rows.append(measure_step(settings, compiled, args))
            print(rows[-1], flush=True)
    if "decode" in args.parts:
        for settings in (
            None,
            {"selection": "token_and_head"},
            {"selection": "head", "block_weight": "tokens"},
            {"selection": "head", "block_weight": "tokens", "offload": True},
        ):
            rows.append(measure_decode(settings, args))
            print(rows[-1], flush=True)
    record = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "torch": torch.__version__}
    record |= {"shape": args.shape, "date": time.strftime("%Y-%m-%d")}
    Path(args.output).write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


def make(settings: dict | None, args: argparse.Namespace, dtype: torch.dtype) -> torch.nn.Module:
    """The softmax model (None), or its conversion."""
    with torch.device(args.device):
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[args.shape], max_position_embeddings=args.context + 4096))
        finally:
            torch.set_default_dtype(torch.float32)
    if settings is None:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
        return convert(folder, {"type": "landmark", **settings}, dtype=name).to(args.device)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_step(settings: dict | None, compiled: bool, args: argparse.Namespace) -> dict:
    """Milliseconds and peak memory of a training step."""
    model = make(settings, args, torch.float32).train()
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.batch, 1008), device=args.device)
    times = []
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with compiled_training() if compiled else nullcontext():
        for _ in range(min(args.steps, 6) + 2):
            start = clock(args.device)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            model.zero_grad(set_to_none=True)
            times.append(clock(args.device) - start)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    return {
        "part": "step",
        "attention": "softmax" if settings is None else "landmark",
        "settings": settings,
        "compiled": compiled,
        "tokens": ids.numel(),
        "milliseconds": 1000 * statistics.median(times[2:]),
        "peak_bytes": peak,
    }


@torch.no_grad()
def measure_decode(settings: dict | None, args: argparse.Namespace) -> dict:
    """Milliseconds of the prompt and of a token after it, and what the cache holds where."""
    model = make(settings, args, torch.bfloat16 if args.device == "cuda" else torch.float32).eval()
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (1, args.context), device=args.device)
    cache = DynamicCache(config=model.config)
    start = clock(args.device)
    for piece in ids.split(PIECE, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    prefill = clock(args.device) - start
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(args.steps + 2):
        start = clock(args.device)
        model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
        times.append(clock(args.device) - start)
    held = {"cuda": 0, "cpu": 0}
    for layer in cache.layers:
        parts = (layer.keys, layer.values) if settings is None else layer.state
        for x in parts:
            held[x.device.type] += x.nbytes
    return {
        "part": "decode",
        "attention": "softmax" if settings is None else "landmark",
        "settings": settings,
        "context": args.context,
        "prefill_seconds": prefill,
        "milliseconds_per_token": 1000 * statistics.median(times[2:]),
        "cache_bytes_gpu": held["cuda"],
        "cache_bytes_cpu": held["cpu"],
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
    }


if __name__ == "__main__":
    main()
