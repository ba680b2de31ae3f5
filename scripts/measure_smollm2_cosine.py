"""SmolLM2-135M onto cosine attention: perplexity after calibration and each stage, and the trained teacher.

    python scripts/measure_smollm2_cosine.py --model .cache/smollm2-135m-instruct --train train.jsonl.gz \
        --validation validation.jsonl.gz --output_dir out/cosine --parts window,pure,teacher

Parts: `window` is the preset smollm2_135m_cosine, `pure` the same without window and sinks, `teacher` the preset's
LoRA on the softmax model, which reads as many tokens as both stages of a student together. Each part can run in a
process of its own; it leaves its report in `output_dir/PART.json`.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import Subset

import linearize
from linearize.conversion import convert, load_tokenizer
from linearize.data import prepare_data
from linearize.evaluation import perplexity
from linearize.runs.settings import RunConfig, resolve_run
from linearize.stages.finetuning import finetune

PRESET = "smollm2_135m_cosine"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("out/cosine"))
    parser.add_argument("--parts", default="window,pure,teacher")
    parser.add_argument("--transfer_tokens", type=int, help="default: the preset's")
    parser.add_argument("--finetune_tokens", type=int, help="default: the preset's")
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--evaluation_tokens", type=int, default=131_072)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()
    for part in args.parts.split(","):
        config = settings(args, part)
        report = measure_teacher(config) if part == "teacher" else measure_student(config)
        path = args.output_dir / f"{part}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(path.read_text(), flush=True)


def settings(args: argparse.Namespace, part: str) -> RunConfig:
    """The preset on the given text, in a run directory of the part's own."""
    config = resolve_run(PRESET)
    config.model_name_or_path, config.output_dir = args.model, str(args.output_dir / part)
    config.dtype, config.device = "float32" if args.device == "cpu" else "bfloat16", args.device
    if part == "pure":
        config.attention |= {"window": 0, "sinks": 0}
    data = config.data
    data.dataset, data.validation, data.dataset_config = args.train, args.validation, None
    data.sequence_length = config.evaluation.sequence_length = args.sequence_length
    data.cache_dir = str(args.output_dir / "data")
    config.evaluation.max_tokens, config.evaluation.batch_size = args.evaluation_tokens, args.batch_size
    for name, tokens in (("transfer", args.transfer_tokens), ("finetune", args.finetune_tokens)):
        stage = config.stages[name]
        stage.batch_size, stage.tokens = args.batch_size, tokens or stage.tokens
        stage.tokens_per_step = max(1, stage.tokens_per_step // (args.batch_size * args.sequence_length)) * (
            args.batch_size * args.sequence_length
        )
    return config


def measure_student(config: RunConfig) -> dict:
    """The rows of a whole run, and what its stages took."""
    result = linearize.run(config)
    stages = {name: result.stages[name] for name in ("transfer", "finetune")}
    return {
        "attention": config.attention,
        "rows": result.report.to_dict(),
        "stages": {
            name: {"tokens": stage.tokens, "seconds": stage.seconds, "peak_memory_bytes": stage.peak_memory_bytes}
            for name, stage in stages.items()
        },
    }


def measure_teacher(config: RunConfig) -> dict:
    """Perplexity of the softmax model after the student's LoRA stage, made as long as both stages together."""
    tokenizer = load_tokenizer(config.model_name_or_path)
    train, held_out = prepare_data(config.data, tokenizer)
    model = convert(config.model_name_or_path, config.attention, dtype=config.dtype)
    if config.device != "cpu" and torch.cuda.is_available():
        model = model.cuda()
    lora = config.stages["finetune"]
    lora.tokens += config.stages["transfer"].tokens
    device = "cpu" if config.device == "cpu" else None
    result = finetune(model, train, lora, output_dir=config.output_dir, arm="teacher", device=device)
    blocks = max(1, config.evaluation.max_tokens // config.data.sequence_length)
    held_out = Subset(held_out, range(min(len(held_out), blocks)))
    measured = perplexity(result.model, held_out, arm="teacher", batch_size=config.evaluation.batch_size)
    return {
        "perplexity": measured.perplexity,
        "scored_tokens": measured.tokens,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
    }


if __name__ == "__main__":
    main()
