"""Where the bytes of a bounded state are worth most: arms of one size, surveyed, trained with LoRA, scored by length.

    python scripts/measure_state_arms.py prepare --model .cache/smollm2-135m-instruct --train train.jsonl.gz \
        --validation validation.jsonl.gz --foreign a.txt,b.txt --data out/arms
    python scripts/measure_state_arms.py survey --model MODEL --data out/arms    # windows, kept tokens; untrained
    python scripts/measure_state_arms.py train --model MODEL --data out/arms --arms teacher,uniform,placed
    python scripts/measure_state_arms.py report --data docs/results/state_arms
    python scripts/measure_state_arms.py check      # the chunked forms against loops over tokens, in float64

`survey` chooses on the validation text alone: how kept tokens are ranked, then the KL divergence to the teacher when
one layer alone sees less, for every layer and size; `placed` arms read it and spend the budget by the largest fall in
KL a byte. `arm_layers.py` says what each arm is. Each leaves `data/arm_NAME_SEED.json`: the log-likelihood of every
piece of 1k, 4k and 8k tokens, and the share of right answers in every item of association, copying and passkeys
(`recall_tasks.py`).
"""

import argparse
import gzip
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import state_arms
import torch
from arm_bench import Bench, perplexities, shares
from arm_layers import BUDGET, SIZES, arm_layers
from arm_training import finetune, transfer
from state_arms import See
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

LENGTHS = (1024, 4096, 8192)
SCORED = 65_536
"""Tokens of each text that are scored."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prepare", "survey", "train", "report", "check"])
    parser.add_argument("--model", help="a directory, or a .gguf file")
    parser.add_argument("--data", type=Path, default=Path("out/arms"))
    parser.add_argument("--train")
    parser.add_argument("--validation")
    parser.add_argument("--foreign", help="text files, with commas between")
    parser.add_argument("--train_tokens", type=int, default=6_500_000)
    parser.add_argument("--arms", default="teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transfer_steps", type=int, default=90)
    parser.add_argument("--finetune_steps", type=int, default=640)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--all_linear", action="store_true", help="LoRA on the MLP too")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--scored", type=int, default=SCORED)
    parser.add_argument("--recall", type=int, default=20, help="items of each task and length; 0: none")
    parser.add_argument("--window_arm", action="store_true", help="score without the memory too")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.lengths = [int(length) for length in args.lengths.split(",")]
    actions = {"prepare": prepare, "survey": survey, "train": train, "report": report, "check": check}
    actions[args.action](args)


def check(args) -> None:
    for name, error in state_arms.check().items():
        print(f"{name:35s} {error:.1e}")
        if error > 1e-5 and "rounding" not in name:  # the window's scores are float32
            raise SystemExit(f"{name}: the two forms differ")


def prepare(args) -> None:
    """Tokens of every text, end of text after each document."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {"train": (args.train, args.train_tokens), "validation": (args.validation, 10**9)}
    texts |= {Path(path).stem: (path, 10**9) for path in args.foreign.split(",")}
    args.data.mkdir(parents=True, exist_ok=True)
    tokens = {name: tokenize(tokenizer, path, limit) for name, (path, limit) in texts.items()}
    np.savez(args.data / "tokens.npz", **tokens)
    print({name: len(ids) for name, ids in tokens.items()})


def tokenize(tokenizer, path: str, limit: int) -> np.ndarray:
    lines = [Path(path).read_text()] if path.endswith(".txt") else None
    pieces, count = [], 0
    for text in lines or (json.loads(line)["text"] for line in gzip.open(path, "rt")):
        ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        pieces.append(np.array(ids, np.uint16))
        if (count := count + len(ids)) >= limit:
            break
    return np.concatenate(pieces)[:limit]


def survey(args) -> None:
    bench = Bench(args)
    layers, long = len(bench.arms), args.lengths[-1]
    report: dict = {"untrained": {}}

    def free(name: str, see: See, texts=("validation",)) -> float:
        bench.see([see] * layers)
        scores = bench.score([long], texts)
        report["untrained"][name] = {"see": asdict(see), "scores": scores}
        print(f"{name:40s} {perplexities(scores)}", flush=True)
        return sum(scores["validation"][long])

    free("window", See(BUDGET - 4))
    ranks = [
        See(BUDGET // 4, 4, 3 * BUDGET // 4 - 4, late, aged) for late in (False, True) for aged in (0.0, 0.2, 0.6)
    ]
    rank = min(ranks, key=lambda see: free(f"kept late={see.late} age={see.age_penalty}", see))
    splits = [replace(rank, window=w, kept=BUDGET - 4 - w) for w in (BUDGET // 7, BUDGET // 2)]
    best = min([rank, *splits], key=lambda see: free(f"kept {see.kept} window {see.window}", see))
    report["kept"] = asdict(best)
    share = best.kept / (best.kept + best.window)
    options = [See(size - 4) for size in SIZES]
    options += [replace(best, window=size - 4 - int(share * size), kept=int(share * size)) for size in SIZES[1:-1]]
    report["options"] = [asdict(option) for option in options]
    report["error"], report["divergence"] = layer_tables(bench, options, long)
    (args.data / "survey.json").write_text(json.dumps(report))
    for label, table in (("error", report["error"]), ("divergence", report["divergence"])):
        print(label)
        for row in table:
            print(" ".join(f"{value:.5f}" for value in row), flush=True)


@torch.no_grad()
def layer_tables(bench: Bench, options: list[See], length: int) -> tuple[list[list[float]], list[list[float]]]:
    """For every layer and option: the relative squared error of the layer's output, and the KL divergence of the
    model's when this layer alone sees so little; mean over two pieces of the validation text."""
    ids = bench.texts["validation"]
    ids = bench.batch(ids[-2 * length :].reshape(2, length))
    layers = len(bench.arms)
    bench.see([None] * layers)
    errors = [[0.0] * len(options) for _ in range(layers)]

    def observe(arm, hidden, query, key, value, raw_query, raw_key, output):
        row = errors[bench.arms.index(arm)]
        for i, option in enumerate(options):
            arm.see = option
            got = torch.cat([arm.attend(*(x[j : j + 1] for x in inputs)) for j in range(2)])
            row[i] = float((got.float() - output.float()).square().mean() / output.float().square().mean())
        arm.see = None

    for arm in bench.arms:
        arm.observer = lambda arm, *values: _observe(arm, observe, values)
    inputs: tuple = ()

    def _observe(arm, function, values):
        nonlocal inputs
        inputs = values[:6]
        function(arm, *values)

    teacher = bench.hidden(ids)
    for arm in bench.arms:
        arm.observer = None
    divergences = []
    for layer in range(layers):
        row = []
        for option in options:
            bench.see([option if i == layer else None for i in range(layers)])
            hidden = torch.cat([bench.hidden(ids[j : j + 1]) for j in range(2)])
            row.append(divergence(bench.model.lm_head, teacher, hidden))
        divergences.append(row)
    return errors, divergences


def divergence(head: nn.Module, teacher: Tensor, student: Tensor) -> float:
    """Mean KL(teacher, student) a token, from last hidden states."""
    total = 0.0
    for old, new in zip(teacher.flatten(0, 1).split(2048), student.flatten(0, 1).split(2048), strict=True):
        target, got = head(old).float().log_softmax(-1), head(new).float().log_softmax(-1)
        total += float(F.kl_div(got, target, reduction="sum", log_target=True))
    return total / teacher.shape[:2].numel()


def train(args) -> None:
    if args.device == "cuda":
        state_arms.mix_block = torch.compile(state_arms.mix_block, dynamic=False)
    for name in args.arms.split(","):
        bench = Bench(args)
        heads = bench.model.config.num_attention_heads
        layers = arm_layers(args.data, bench.shape, heads, len(bench.arms), name)
        sizes = [(see or See(0)).state_bytes(*bench.shape, LENGTHS[-1]) for see in layers]
        print(
            name, [asdict(see) if see else "softmax" for see in layers[:1]], "bytes a layer", sum(sizes) // len(sizes)
        )
        report = {"arm": name, "seed": args.seed, "layers": [see and asdict(see) for see in layers], "bytes": sizes}
        report |= {"rank": args.rank, "steps": [args.transfer_steps, args.finetune_steps], "rate": args.learning_rate}
        bench.see(layers)
        if any(see and see.memory for see in layers):
            report["transfer"] = transfer(args, bench, layers)
        report["start"] = bench.score(args.lengths[-1:], ["validation"])
        print(f"{name:20s} before LoRA   {perplexities(report['start'])}", flush=True)
        report["losses"] = finetune(args, bench)
        report["full"] = bench.score(args.lengths)
        print(f"{name:20s} full          {perplexities(report['full'])}", flush=True)
        if args.recall:
            report["recall"] = bench.recall([length for length in args.lengths if length >= 1024], args.recall)
            print(f"{name:20s} recall        {shares(report['recall'])}", flush=True)
        if "transfer" in report and args.window_arm:
            for arm in bench.arms:
                arm.with_memory = False
            report["window"] = bench.score(args.lengths)
            print(f"{name:20s} window        {perplexities(report['window'])}", flush=True)
        suffix = f"_r{args.rank}" if args.rank != 8 else ""
        (args.data / f"arm_{name}{suffix}_{args.seed}.json").write_text(json.dumps(report))
        del bench
        if args.device == "cuda":
            print(f"{name:20s} {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most", flush=True)
            torch.cuda.empty_cache()


def report(args) -> None:
    """A Markdown table: perplexity over the teacher's by text and length; 8k against `uniform`, the difference in nats
    a token over the pieces of all foreign texts with its paired 95% interval; recall in percent by length, and its
    difference to `uniform` at the longest over all items, paired."""
    arms = {path.stem[4:]: json.loads(path.read_text()) for path in sorted(args.data.glob("arm_*.json"))}
    teacher, control = arms["teacher_0"], arms["uniform_0"]
    tasks = list(control.get("recall", {}))
    columns = [*teacher["full"], "8k, nats less than uniform", *tasks, *(["8k, points over uniform"] if tasks else [])]
    print(f"| arm | bytes a layer | {' | '.join(columns)} |")
    print("| --- " * (len(columns) + 2) + "|")
    for name, arm in arms.items():
        for part in ("full", "window"):
            if part not in arm:
                continue
            cells = [
                " / ".join(
                    f"{math.exp(mean(values) - mean(teacher['full'][text][length])):.3f}"
                    for length, values in by.items()
                )
                for text, by in arm[part].items()
            ]
            foreign = [text for text in control["full"] if text != "validation"]
            cells.append("{:.4f} +- {:.4f}".format(*paired(arm[part], control["full"], foreign)))
            if part == "full" and tasks:
                cells += [" / ".join(f"{100 * mean(v):.0f}" for v in arm["recall"][task].values()) for task in tasks]
                points, half = paired(control["recall"], arm["recall"], tasks)
                cells.append(f"{100 * points:.1f} +- {100 * half:.1f}")
            size = sum(arm["bytes"]) / len(arm["bytes"]) / 1000
            print(f"| {name}, {part} | {size:.0f} kB | {' | '.join(cells)} |")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def paired(less: dict, more: dict, names: list[str]) -> tuple[float, float]:
    """Mean of `more - less` at the longest length over the items of these names, and half its 95% interval."""
    gains = [
        new - old
        for name in names
        for old, new in zip(list(less[name].values())[-1], list(more[name].values())[-1], strict=True)
    ]
    return float(np.mean(gains)), 1.96 * float(np.std(gains, ddof=1)) / math.sqrt(len(gains))


if __name__ == "__main__":
    main()
