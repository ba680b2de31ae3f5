"""Landmark keys fitted to a model's own scores, nothing trained: divergence and held-out perplexity.

    python scripts/measure_landmark_keys.py --model path/to/llama --train train.jsonl.gz --validation held_out.jsonl.gz

Float32 on a CPU, or a GPU where there is one.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from linearize.config.settings import DataConfig
from linearize.conversion.students import convert, load_model, load_tokenizer
from linearize.data import prepare_data
from linearize.evaluation import perplexity
from linearize.stages.calibration import calibrate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--sequence_length", type=int, default=1008)
    parser.add_argument("--eval_sequences", type=int, default=8)
    parser.add_argument("--top_k", type=int, default=14)
    parser.add_argument("--output", type=Path, help="folder to save the fitted model in")
    args = parser.parse_args()
    data = DataConfig(
        dataset=args.train,
        validation=args.validation,
        sequence_length=args.sequence_length,
        max_tokens=2 * args.sequences * args.sequence_length,
    )
    train, validation = prepare_data(data, load_tokenizer(args.model))
    held_out = [validation[i] for i in range(min(args.eval_sequences, len(validation)))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"teacher": perplexity(load_model(args.model).to(device), held_out, arm=None).perplexity}
    attention = {"type": "landmark", "selection": "head", "top_k": args.top_k}
    student = convert(args.model, attention, dtype="float32").to(device)
    found["mean keys"] = perplexity(student, held_out, arm="mixed").perplexity
    start = time.perf_counter()
    report = calibrate(student, train, args.sequences)
    found |= {"seconds": time.perf_counter() - start, **report.summary()}
    found["fitted keys"] = perplexity(student, held_out, arm="mixed").perplexity
    if args.output:
        student.save_pretrained(args.output)
        load_tokenizer(args.model).save_pretrained(args.output)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
