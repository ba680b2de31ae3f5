"""Figures on one GPU: speed and quality of attention transfer, peak memory of both stages against the forecast.

    python scripts/measure_smollm2.py --model .cache/smollm2-135m-instruct --train train.jsonl.gz \
        --validation validation.jsonl.gz --output_dir out/measure

Parts: `speed` (200 steps of 8192 tokens against a plain forward of the teacher), `quality` (1.2 M tokens, ours and the
published preset, against the training-free window), `memory` (both stages, bf16 and 4-bit). Writes measurements.json.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from torch.utils.data import Subset
from transformers import set_seed

import linearize
from linearize.config.settings import DataConfig, FinetuneConfig, TransferConfig, changed
from linearize.conversion.quantization import quantization_config
from linearize.conversion.students import load_config
from linearize.data.sequences import TokenBlocks, prepare_data
from linearize.evaluation import perplexity
from linearize.hardware.memory import forecast_finetune, forecast_transfer, runs_fused
from linearize.runs.settings import RunConfig, resolve_run
from linearize.stages.finetuning import finetune
from linearize.stages.transfer import transfer_attention

LENGTH = 1024
TOKENS_PER_STEP = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--output_dir", default="out/measure")
    parser.add_argument("--parts", default="speed,quality,memory")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--device", default="cuda", help="cpu, with --steps 2, only tries the script out")
    parser.add_argument("--steps", type=int, help="instead of each part's own number")
    args = parser.parse_args()
    data = DataConfig(dataset=args.train, validation=args.validation, sequence_length=LENGTH)
    data.cache_dir = str(Path(args.output_dir) / "data")
    train, validation = prepare_data(data, linearize.load_tokenizer(args.model))
    gpu = args.device == "cuda"
    record = {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "train_tokens": len(train) * LENGTH,
        "validation_tokens": len(validation) * LENGTH,
    }
    parts = {"speed": measure_speed, "quality": measure_quality, "memory": measure_memory}
    for name in args.parts.split(","):
        record[name] = parts[name](args, train, validation)
        Path(args.output_dir, "measurements.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


def student(args: argparse.Namespace, attention: dict | None = None, **options):
    """A fresh student in bf16 on the device, and its memory counted from here."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = linearize.convert(args.model, attention or {"type": "linear"}, dtype=torch.bfloat16, **options)
    return model if "quantization_config" in options else model.to(args.device)


def measure_speed(args: argparse.Namespace, train: TokenBlocks, validation: TokenBlocks) -> dict:
    """Tokens per second of 200 steps of stage 1, and of the frozen teacher's forward over as many tokens."""
    steps = args.steps or 200
    model = student(args)
    batches = torch.stack([train[i]["input_ids"] for i in range(8)]).to(args.device)

    def teacher_forward() -> float:
        rounds = min(steps, 50)
        with torch.no_grad(), model.use_arm("teacher"):
            for i in range(rounds + 5):
                if i == 5:
                    _synchronize(args)
                    started = time.perf_counter()
                model.model(batches, use_cache=False)
            _synchronize(args)
        return rounds * batches.numel() / (time.perf_counter() - started)

    config = TransferConfig(max_steps=steps, batch_size=8, tokens_per_step=TOKENS_PER_STEP)
    result = transfer_attention(model, train, config, output_dir=Path(args.output_dir, "speed"), device=_stay(args))
    teacher = teacher_forward()
    return {
        "steps": result.steps,
        "transfer_tokens_per_second": result.tokens_per_second,
        "teacher_forward_tokens_per_second": teacher,
        "share_of_teacher_forward": result.tokens_per_second / teacher,
    }


def measure_quality(args: argparse.Namespace, train: TokenBlocks, validation: TokenBlocks) -> list[dict]:
    """Perplexity after 150 steps of 8192 tokens of stage 1, of ours and of the published preset."""
    presets = {"ours": resolve_run("llama3_8b_linear"), "published": resolve_run("llama3_8b_lolcats")}
    rows = []
    for seed in map(int, args.seeds.split(",")):
        for name, preset in presets.items():
            set_seed(seed)
            attention = {**preset.attention, "window": 64}
            model = student(args, attention)
            row = {"seed": seed, "recipe": name}
            held_out = validation if args.device == "cuda" else Subset(validation, range(2))
            arms = {"teacher": "teacher", "before": "mixed", "linear arm before": "linear"}
            row |= {
                label: perplexity(model, held_out, arm=arm, batch_size=8).perplexity for label, arm in arms.items()
            }
            control = student(args, {"type": "linear", "window": 64, "sinks": 4})
            row["control"] = perplexity(control, held_out, arm="softmax", batch_size=8).perplexity
            size = {"batch_size": 8, "tokens_per_step": TOKENS_PER_STEP}
            config = changed(preset.stages["transfer"], max_steps=args.steps or 150, **size)
            folder = Path(args.output_dir, f"quality-{name}-{seed}")
            result = transfer_attention(model, train, config, output_dir=folder, seed=seed, device=_stay(args))
            row |= {"steps": result.steps, "tokens": result.tokens, "seconds": result.seconds}
            arms = {"after": "mixed", "linear arm after": "linear"}
            row |= {
                label: perplexity(model, held_out, arm=arm, batch_size=8).perplexity for label, arm in arms.items()
            }
            row["after / control"] = row["after"] / row["control"]
            row["after / teacher"] = row["after"] / row["teacher"]
            rows.append(row)
            print(row, flush=True)
    return rows


def measure_memory(args: argparse.Namespace, train: TokenBlocks, validation: TokenBlocks) -> list[dict]:
    """Peak bytes of two steps of each stage beside what `linearize.hardware.memory` expects."""
    teacher = load_config(args.model)
    rows = []
    for bits, batch, checkpointing in [(16, 1, False), (16, 8, False), (16, 8, True), (4, 8, False), (4, 8, True)]:
        options = {"quantization_config": quantization_config(load_in_4bit=True)} if bits == 4 else {}
        step = {"max_steps": 2, "batch_size": batch, "tokens_per_step": batch * LENGTH}
        run = RunConfig(model_name_or_path=args.model, dtype="bfloat16", load_in_4bit=bits == 4, device=args.device)
        run.data.sequence_length = LENGTH
        folder = Path(args.output_dir, f"memory-{bits}-{batch}-{checkpointing}")
        lora = FinetuneConfig(**step, gradient_checkpointing=checkpointing)
        stages = {"finetune": (finetune, lora, forecast_finetune)}
        if not checkpointing:
            stages["transfer"] = (transfer_attention, TransferConfig(**step), forecast_transfer)
        for stage, (train_stage, config, forecast) in stages.items():
            model = student(args, **options)
            result = train_stage(model, train, config, output_dir=folder / stage, device=_stay(args))
            expected = forecast(teacher, run, config, fused=runs_fused(teacher, run))
            measured = result.peak_memory_bytes
            row = {"stage": stage, "bits": bits, "batch": batch, "checkpointing": checkpointing, "measured": measured}
            row |= {"forecast": expected.total, "parts": vars(expected)}
            row["ratio"] = expected.total / measured if measured else None
            rows.append(row)
            print(row, flush=True)
            del model, result
    return rows


def _stay(args: argparse.Namespace) -> str | None:
    return "cpu" if args.device == "cpu" else None


def _synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
