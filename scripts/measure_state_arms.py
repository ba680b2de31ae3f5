"""Where the bytes of a bounded state are worth most: arms of one size, surveyed, trained with LoRA, scored by length.

    python scripts/measure_state_arms.py prepare --model .cache/smollm2-135m-instruct --train train.jsonl.gz \
        --validation validation.jsonl.gz --foreign a.txt,b.txt --data out/arms
    python scripts/measure_state_arms.py survey --model MODEL --data out/arms    # windows, kept tokens; untrained
    python scripts/measure_state_arms.py train --model MODEL --data out/arms --arms teacher,uniform,placed
    python scripts/measure_state_arms.py report --data docs/results/state_arms

`survey` chooses on the validation text alone: how kept tokens are ranked, then the KL divergence to the teacher when
one layer alone sees less, for every layer and size; `placed` arms read it and spend the budget by the largest fall in
KL a byte. Each arm leaves `data/arm_NAME_SEED.json`: the log-likelihood of every piece of 1k, 4k and 8k tokens.
"""

import argparse
import gzip
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import state_arms
import torch
from state_arms import ArmAttention, Memory, See, visible_pairs
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTHS = (1024, 4096, 8192)
SCORED = 65_536
"""Tokens of each text that are scored."""
BUDGET = 448
"""Tokens of exact bf16 keys and values whose bytes an average layer may hold."""
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
MAPS = 32
"""Width of the memory's maps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prepare", "survey", "train", "report"])
    parser.add_argument("--model", help="a directory, or a .gguf file")
    parser.add_argument("--data", type=Path, required=True)
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
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.lengths = [int(length) for length in args.lengths.split(",")]
    {"prepare": prepare, "survey": survey, "train": train, "report": report}[args.action](args)


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


class Bench:
    """A model whose attentions are arms, the texts, and the measures."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.args, self.device = args, args.device
        path = Path(args.model)
        where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        source = path.parent if where else path
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa", **where)
        self.model = model.to(args.device).requires_grad_(False)
        for layer in self.model.model.layers:
            layer.self_attn = ArmAttention(layer.self_attn)
        self.arms: list[ArmAttention] = [layer.self_attn for layer in self.model.model.layers]
        self.texts = dict(np.load(args.data / "tokens.npz"))
        self.shape = (self.model.config.num_key_value_heads, self.arms[0].stock.head_dim)

    def see(self, layers: list[See | None]) -> None:
        for arm, layer in zip(self.arms, layers, strict=True):
            arm.see = layer

    def batch(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self.device)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.model.model(input_ids=ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def score(self, lengths, texts=None, tokens: int | None = None) -> dict:
        """Mean log-likelihood a token of every whole piece: text -> length -> list."""
        results: dict[str, dict[int, list[float]]] = {}
        for name in texts or [name for name in self.texts if name != "train"]:
            ids = self.texts[name]
            ids = ids[: min(len(ids), tokens or self.args.scored)]
            for length in lengths:
                pieces = ids[: len(ids) // length * length].reshape(-1, length)
                together = max(1, 4096 // length)
                values = [
                    value
                    for i in range(0, len(pieces), together)
                    for value in self.likelihoods(self.batch(pieces[i : i + together]))
                ]
                results.setdefault(name, {})[length] = values
        return results

    def likelihoods(self, ids: Tensor) -> list[float]:
        hidden = self.hidden(ids)[:, :-1]
        losses = [
            F.cross_entropy(self.model.lm_head(part).float().flatten(0, 1), target.flatten(), reduction="none")
            .view(target.shape)
            .double()
            for part, target in zip(hidden.split(1024, 1), ids[:, 1:].split(1024, 1), strict=True)
        ]
        return torch.cat(losses, 1).mean(1).tolist()


def perplexities(scores: dict) -> str:
    cells = []
    for name, lengths in scores.items():
        values = " ".join(f"{math.exp(sum(v) / len(v)):.2f}" for v in lengths.values())
        cells.append(f"{name[:12]} {values}")
    return " | ".join(cells)


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


def place(args, bench: Bench, table: str, kinds: str, budget: int, memory: See | None = None) -> list[See]:
    """Spend `budget` bytes on all layers: from the least option of each, always the step of the largest fall of
    `table` a byte (along the lower convex hull of its options); with `memory`, every layer pays for one besides."""
    report = json.loads((args.data / "survey.json").read_text())
    options = [See(**option) for option in report["options"]]
    extra = memory.state_bytes(*bench.shape, 0) if memory else 0
    sizes = [option.state_bytes(*bench.shape, 10**9) for option in options]
    allowed = [i for i, option in enumerate(options) if kinds == "both" or option.kept == 0]
    costs = report[table]
    chosen = [min(allowed, key=lambda i: sizes[i])] * len(costs)
    left = budget - sum(sizes[i] + extra for i in chosen)
    while True:
        steps = [
            ((row[now] - row[i]) / (sizes[i] - sizes[now]), layer, i)
            for layer, (row, now) in enumerate(zip(costs, chosen, strict=True))
            for i in allowed
            if sizes[i] > sizes[now] and sizes[i] - sizes[now] <= left and row[i] < row[now]
        ]
        if not steps:
            break
        _, layer, i = max(steps)
        left -= sizes[i] - sizes[chosen[layer]]
        chosen[layer] = i
    placed = [options[i] for i in chosen]
    return (
        [replace(see, memory=memory.memory, memory_bytes=memory.memory_bytes) for see in placed] if memory else placed
    )


def arm_layers(args, bench: Bench, name: str) -> list[See | None]:
    layers = len(bench.arms)
    budget = layers * See(BUDGET - 4).state_bytes(*bench.shape, 10**9)
    report = json.loads((args.data / "survey.json").read_text()) if (args.data / "survey.json").exists() else {}
    kept = See(**report["kept"]) if report else See()
    thin = See(memory=MAPS)
    exact = bench.shape[0] * bench.shape[1] * 4
    paid = -(-(thin.state_bytes(*bench.shape, 0)) // exact)
    uniform = {
        "teacher": None,
        "uniform": See(BUDGET - 4),
        "memory": replace(thin, window=BUDGET - 4 - paid),
        "kept": kept,
        "kept_memory": replace(kept, window=kept.window - paid, memory=MAPS),
    }
    if name in uniform:
        return [uniform[name]] * layers
    if name.startswith("soft"):  # soft4, soft4_memory: the layers of the largest divergence at 256 tokens stay softmax
        return hybrid(
            report, layers, int(name[4:].split("_")[0]), replace(thin, window=252) if "_" in name else See(252)
        )
    placements = {
        "placed": ("divergence", "window", None),
        "placed_error": ("error", "window", None),
        "placed_memory": ("divergence", "window", thin),
        "placed_kept": ("divergence", "both", None),
        "placed_kept_memory": ("divergence", "both", thin),
    }
    table, kinds, memory = placements[name]
    return place(args, bench, table, kinds, budget, memory)


def hybrid(report: dict, layers: int, softmax: int, others: See) -> list[See | None]:
    column = SIZES.index(256)
    worst = sorted(range(layers), key=lambda i: report["divergence"][i][column])[-softmax:]
    return [None if i in worst else others for i in range(layers)]


def train(args) -> None:
    if args.device == "cuda":
        state_arms.mix_block = torch.compile(state_arms.mix_block, dynamic=False)
    for name in args.arms.split(","):
        bench = Bench(args)
        layers = arm_layers(args, bench, name)
        sizes = [(see or See(0)).state_bytes(*bench.shape, LENGTHS[-1]) for see in layers]
        print(
            name, [asdict(see) if see else "softmax" for see in layers[:1]], "bytes a layer", sum(sizes) // len(sizes)
        )
        report = {"arm": name, "seed": args.seed, "layers": [see and asdict(see) for see in layers], "bytes": sizes}
        report |= {"rank": args.rank, "steps": [args.transfer_steps, args.finetune_steps], "rate": args.learning_rate}
        bench.see(layers)
        if any(see and see.memory for see in layers):
            report["transfer"] = transfer(args, bench, layers)
        report["start"] = bench.score(args.lengths, ["validation"])
        print(f"{name:20s} before LoRA   {perplexities(report['start'])}", flush=True)
        report["losses"] = finetune(args, bench)
        report["full"] = bench.score(args.lengths)
        print(f"{name:20s} full          {perplexities(report['full'])}", flush=True)
        if "transfer" in report:
            for arm in bench.arms:
                arm.with_memory = False
            report["window"] = bench.score(args.lengths)
            print(f"{name:20s} window        {perplexities(report['window'])}", flush=True)
        suffix = f"_r{args.rank}" if args.rank != 8 else ""
        (args.data / f"arm_{name}{suffix}_{args.seed}.json").write_text(json.dumps(report))
        del bench
        torch.cuda.empty_cache() if args.device == "cuda" else None


def rows(args, bench: Bench, seed: int):
    """Batches of `(batch_size, 1024)`: a new order of the training text each time it ends."""
    length, order = LENGTHS[0], np.random.default_rng(seed)
    pieces = bench.texts["train"]
    pieces = pieces[: len(pieces) // length * length].reshape(-1, length)
    while True:
        places = order.permutation(len(pieces))
        for i in range(0, len(places) - args.batch_size + 1, args.batch_size):
            yield bench.batch(pieces[np.sort(places[i : i + args.batch_size])])


def transfer(args, bench: Bench, layers: list[See | None]) -> list[float]:
    """Attention transfer of the memories: relative error of the mixed output plus that of the memory alone."""
    hidden = bench.model.config.hidden_size
    heads = bench.model.config.num_attention_heads
    for arm, see in zip(bench.arms, layers, strict=True):
        if see and see.memory:
            arm.memory = Memory(heads, *bench.shape, see.memory, hidden).to(bench.device)
    memories = [arm.memory for arm in bench.arms if arm.memory is not None]
    groups = [
        {"params": [getattr(m, n) for m in memories for n in names], "lr": rate, "start": rate}
        for names, rate in (
            (("query_map", "key_map", "query_magnitude", "key_magnitude"), 1e-2),
            (("log_weight", "shift", "gate_bias"), 3e-2),
            (("gate_weight",), 1e-3),
        )
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses: list[float] = []

    def observe(arm, hidden, query, key, value, raw_query, raw_key, output):
        if arm.memory is None:
            return
        see = wanted[arm]
        target = output.float()
        with torch.enable_grad():
            visible = visible_pairs(see, query, key)
            arm.see = see
            call = (query, key, value, raw_query, raw_key, hidden, visible)
            relative = [
                (arm.mixed(*call, linear_only=alone).float() - target).square().mean() / target.square().mean()
                for alone in (False, True)
            ]
            (sum(relative) / len(memories)).backward()
            arm.see = None
        losses.append(float(relative[0]))

    wanted = dict(zip(bench.arms, layers, strict=True))
    bench.see([None] * len(layers))
    for arm in bench.arms:
        arm.observer = observe
    means = []
    start = time.time()
    for step, ids in zip(range(args.transfer_steps), rows(args, bench, args.seed + 1), strict=False):
        losses.clear()
        with torch.no_grad():
            bench.hidden(ids)
        for group in optimizer.param_groups:
            group["lr"] = group["start"] * max(0.05, 1 - step / args.transfer_steps)
        optimizer.step()
        optimizer.zero_grad()
        means.append(sum(losses) / len(losses))
    for arm in bench.arms:
        arm.observer = None
    bench.see(layers)
    print(f"  transfer: {means[0]:.4f} to {means[-1]:.4f} in {time.time() - start:.0f} s", flush=True)
    return means


def finetune(args, bench: Bench) -> list[float]:
    """LoRA (and the memories along) on next tokens."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] + ["gate_proj", "up_proj", "down_proj"] * args.all_linear
    model = get_peft_model(bench.model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets))
    memory = [p for arm in bench.arms if arm.memory is not None for p in arm.memory.parameters()]
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    for parameter in memory:
        parameter.requires_grad_(True)
    groups = [{"params": adapters, "start": args.learning_rate}]
    groups += [{"params": memory, "start": 1e-3}] if memory else []
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=0.0)
    losses, start, steps = [], time.time(), args.finetune_steps
    for step, ids in zip(range(steps), rows(args, bench, args.seed + 2), strict=False):
        rate = min(1, (step + 1) / 20) * max(0.05, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["start"] * rate
        with torch.autocast(bench.device, torch.bfloat16):
            hidden = bench.hidden(ids)[:, :-1]
            logits = bench.model.lm_head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(adapters + memory, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            losses.append(float(loss.detach()))
    print(f"  LoRA: {losses[0]:.4f} to {losses[-1]:.4f} in {time.time() - start:.0f} s", flush=True)
    return losses


def report(args) -> None:
    """A Markdown table: perplexity over the teacher's by text and length; the last column is 8k against `uniform`, the
    difference in nats a token over the pieces of all foreign texts with its paired 95% interval."""
    arms = {path.stem[4:]: json.loads(path.read_text()) for path in sorted(args.data.glob("arm_*.json"))}
    teacher, control = arms["teacher_0"]["full"], arms["uniform_0"]["full"]
    print("| arm | bytes a layer | " + " | ".join(teacher) + " | 8k, nats less than uniform |")
    for name, arm in arms.items():
        for part in ("full", "window"):
            if part not in arm:
                continue
            cells = [
                " / ".join(
                    f"{math.exp(mean(values) - mean(teacher[text][length])):.3f}" for length, values in by.items()
                )
                for text, by in arm[part].items()
            ]
            difference, half = paired(control, arm[part])
            size = sum(arm["bytes"]) / len(arm["bytes"]) / 1000
            print(f"| {name}, {part} | {size:.0f} kB | {' | '.join(cells)} | {difference:.4f} +- {half:.4f} |")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def paired(control: dict, arm: dict) -> tuple[float, float]:
    """Mean gain over the control at the longest length on the foreign texts, and half its 95% interval."""
    foreign = [text for text in control if text != "validation"]
    gains = [
        old - new
        for text in foreign
        for old, new in zip(list(control[text].values())[-1], list(arm[text].values())[-1], strict=True)
    ]
    return float(np.mean(gains)), 1.96 * float(np.std(gains, ddof=1)) / math.sqrt(len(gains))


if __name__ == "__main__":
    main()
