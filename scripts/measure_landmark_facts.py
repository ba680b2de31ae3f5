"""Why a landmark model finds facts in natural text or does not: what selects blocks, beside the teacher.

    python scripts/measure_landmark_facts.py --model SMOLLM2 --text held_out.jsonl.gz --lengths 2k,4k --trials 200 \
        --variants teacher,all,mean,fitted,bounds,exact --train train.jsonl.gz --output facts.json
    python scripts/measure_landmark_facts.py --model RUN/final --text held_out.jsonl.gz --variants own,exact

The prompts of `linearize evaluate --natural`. For each variant: answers that are right, greedily decoded; and nats per
answer, what the model gives the right one, which tells variants apart on few prompts. `--mass` adds, for the last
token of each prompt in a model that reads everything, the share of the earlier blocks' attention that the best
`top_k` blocks by each score hold, and how often the fact's block is among them where a head looks at it.

A variant is a kind of score, then settings: `bounds,subs=4` ranks a block by the best of the bounds of its 4 parts;
`exact,top_k=30`. Scores: `own` (the model's landmark keys), `mean`, `bounds` (elementwise least and greatest key:
Tang et al. 2024, arXiv 2406.10774), `exact` (each token's score, the best), `sums` (their logsumexp), `all` (read
everything), and two models: `teacher`, `yarn` (the teacher's RoPE stretched to the longest text).
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.config.settings import DataConfig
from linearize.conversion.students import convert, load_model, load_student, load_tokenizer
from linearize.data import prepare_data
from linearize.evaluation import with_yarn
from linearize.evaluation.arms import is_student, measuring
from linearize.evaluation.context_lengths import Trials, parse_lengths, wilson
from linearize.evaluation.context_reading import end_tokens, read
from linearize.evaluation.natural import NEW_TOKENS, natural_prompts, read_documents
from linearize.evaluation.passkey import encode
from linearize.evaluation.retrieval import Prompt, is_hit
from linearize.modeling import op_landmark_retrieval as op
from linearize.stages.calibration import calibrate

SETTINGS = {"type": "landmark", "selection": "head", "block_weight": "tokens", "top_k": 14, "block_size": 64}
SCORE_ELEMENTS = 2**28  # scores of tokens that are held at once
MASS_BATCH = 4  # prompts
LOOKS = 0.5  # of a head's attention, on the fact's blocks: it looks at the fact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a softmax model, or a landmark repository")
    parser.add_argument("--text", required=True, help="where facts are hidden")
    parser.add_argument("--train", help="text that keys are fitted to, for variants with fit=64")
    parser.add_argument("--lengths", default="2k")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--items", help="of the trials, as in 0:100, to split a long run; default all")
    parser.add_argument("--variants", nargs="+", default=["teacher", "all", "own", "bounds", "exact"])
    parser.add_argument("--mass", action="store_true")
    parser.add_argument("--batch_tokens", type=int, default=131_072, help="of prompts read together")
    parser.add_argument("--output", type=Path, default=Path("facts.json"))
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    args.lengths = parse_lengths(args.lengths, "--lengths")
    tokenizer = load_tokenizer(args.model)
    documents = read_documents([args.text])
    prompts = natural_prompts(tokenizer, args.lengths, documents, trials=Trials(args.trials))
    if args.items:
        begin, end = map(int, args.items.split(":"))
        prompts = {length: asked[begin:end] for length, asked in prompts.items()}
    rows: list[dict[str, Any]] = []
    for variant in args.variants:
        score, settings = parse_variant(variant)
        model = load(args, score, settings, tokenizer)
        for length, asked in prompts.items():
            begun = time.time()
            found = measure(model, tokenizer, asked, args, ranking(score, settings))
            rows.append({"variant": variant, "length": length, **found, "seconds": time.time() - begun})
            print(line(rows[-1]), *paired(rows), sep="\n  ", flush=True)
            if args.mass and score == "all":
                rows[-1]["mass"] = measure_mass(model, tokenizer, asked[: args.trials // 4 or 1], args)
            args.output.write_text(json.dumps(rows, indent=1) + "\n")


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """Score and settings."""
    score, *pairs = text.split(",")
    values = dict(pair.split("=") for pair in pairs)
    return score, {name: int(x) if x.isdigit() else x for name, x in values.items()}


def load(args, score: str, settings: dict[str, Any], tokenizer: Any) -> Any:
    """The model of a variant, to be measured."""
    if score == "teacher":
        return load_model(args.model, dtype=args.dtype).to(args.device).eval()
    if score == "yarn":
        model = load_model(args.model, dtype=args.dtype)
        context = model.config.max_position_embeddings
        config = with_yarn(model.config, max(1.0, max(args.lengths) / context), args.model)
        return type(model).from_pretrained(args.model, config=config, dtype=args.dtype).to(args.device).eval()
    chosen = {name: x for name, x in settings.items() if name not in ("subs", "fit")}
    if score == "all":
        chosen["top_k"] = max(args.lengths) // 63 + 2
    if "mixers" in json.loads((Path(args.model) / "config.json").read_text()):
        model = load_student(args.model, dtype=args.dtype).to(args.device)
        for attention in model.mixer_attentions():
            attention.mixer.config = copy.copy(attention.mixer.config)
            for name, x in chosen.items():
                setattr(attention.mixer.config, name, x)
        model.base_model.landmarks.reach = attention.mixer.config.reach
        return model.eval()
    model = convert(args.model, {**SETTINGS, **chosen}, dtype="float32").to(args.device)
    if settings.get("fit"):
        tokens = 2 * settings["fit"] * 1008
        data = DataConfig(dataset=args.train, validation=args.text, sequence_length=1008, max_tokens=tokens)
        print(calibrate(model, prepare_data(data, tokenizer)[0], settings["fit"]).sentence(), flush=True)
    return model.to(args.dtype).eval()


# ---- scores of blocks


def ranking(score: str, settings: dict[str, Any]) -> Callable | None:
    """What takes the place of the op's score of a block; None for the op's own."""
    kinds = {
        "mean": lambda keys: parts(keys, settings).mean(-2),
        "bounds": lambda keys: torch.cat([parts(keys, settings).amax(-2), parts(keys, settings).amin(-2)], -1),
        "exact": lambda keys: keys[..., :-1, :],
        "sums": lambda keys: keys[..., :-1, :],
    }
    if score not in kinds:
        return None
    lift = (lambda x: torch.cat([x.clamp(min=0), x.clamp(max=0)], -1)) if score == "bounds" else (lambda x: x)
    reduce = (lambda x: x.logsumexp(-1)) if score == "sums" else (lambda x: x.amax(-1))
    return lambda *call: block_scores(*call, kinds[score], lift, reduce)


def parts(keys: Tensor, settings: dict[str, Any]) -> Tensor:
    """`(..., P, D)` to `(..., parts, tokens, D)`, the landmark left out; the last tokens are in two parts."""
    count, tokens = settings.get("subs", 1), keys.shape[-2] - 1
    size = -(-tokens // count)
    starts = [min(size * number, tokens - size) for number in range(count)]
    return torch.stack([keys[..., start : start + size, :] for start in starts], -3)


def block_scores(call, turned, age, open_, found, summary, lift, reduce) -> Tensor:
    """As `op_landmark_retrieval._landmark_scores`, by another summary of a block than its landmark's key.

    summary: keys `(..., P, D)` to `(..., C, E)`. lift: a query `(..., D)` to `(..., E)`. reduce: scores over C.
    """
    keys = summary(call.blocks.key)
    heads, groups, count = turned.shape[1], keys.shape[1], keys.shape[3]
    each, (u, w) = heads // groups, turned.shape[2:4]
    far = op._at(turned, (found + 1)[:, None, :, None, None].expand(-1, heads, -1, w, 1))[..., 0, :]
    far = lift(far).unflatten(1, (groups, each)).flatten(2, 4)
    some = max(1, SCORE_ELEMENTS // (far.shape[:3].numel() * count))
    scores = [
        reduce((op.product(far, x.flatten(2, 3).transpose(-1, -2)) * call.scaling).unflatten(-1, (-1, count)))
        for x in keys.split(some, dim=2)
    ]
    scores = torch.cat(scores, -1).unflatten(2, (each, u, w)).flatten(1, 2)  # (B, H, u, w, N)
    # The last K blocks lie where they are: their slots (B, u, K) by age, from 1.
    ages = torch.arange(1, call.top_k + 1, device=age.device)
    match = (age[:, :, None] == ages[:, None]) & open_[:, :, None] & (ages <= found[..., None])[..., None]
    there, slot = match.any(-1)[:, None, :, None], match.int().argmax(-1)
    index = slot.flatten(1)[:, None, :, None, None].expand(-1, groups, -1, *keys.shape[3:])
    own = keys.gather(2, index).unflatten(2, slot.shape[1:]).repeat_interleave(each, dim=1)  # (B, H, u, K, C, E)
    near = lift(turned[..., 1:-1, :]).transpose(3, 4)  # (B, H, u, K, w, E)
    near = reduce(op.product(near, own.transpose(-1, -2)) * call.scaling).transpose(3, 4)
    index = slot[:, None, :, None].expand_as(near)
    scores = scores.scatter_add(-1, index, (near - scores.gather(-1, index)) * there)
    return scores.masked_fill(~open_[:, None, :, None], op.HIDDEN)


class Ranked:
    """Within it the op ranks blocks by another score."""

    def __init__(self, score: Callable | None):
        self.score, self.before = score, op._landmark_scores

    def __enter__(self) -> None:
        op._landmark_scores = self.score or self.before

    def __exit__(self, *error: Any) -> None:
        op._landmark_scores = self.before


# ---- measures


@torch.no_grad()
def measure(model: Any, tokenizer: Any, asked: Sequence[Prompt], args, score: Callable | None) -> dict[str, Any]:
    """Right answers, and nats of the right answer's tokens."""
    nats, texts = [], []
    size = max(1, args.batch_tokens // len(asked[0].input_ids))
    with measuring(model, "mixed" if is_student(model) else None) as base, Ranked(score):
        ends = torch.tensor(sorted(end_tokens(base, tokenizer)), device=args.device)
        for start in range(0, len(asked), size):
            batch = asked[start : start + size]
            ids = torch.stack([prompt.input_ids for prompt in batch]).to(args.device)
            _, cache = read(base, ids[:, :-1])
            nats += answer_nats(base, tokenizer, batch, ids[:, -1:], copy.deepcopy(cache))
            rows = decode(base, ids[:, -1:], cache, ends)
            texts += [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    hits = [is_hit(text, prompt.answer, prompt.kind) for text, prompt in zip(texts, asked, strict=True)]
    low, high = wilson(sum(hits), len(hits))
    kinds = {kind: sum(h for h, p in zip(hits, asked, strict=True) if p.kind == kind) for kind in ("number", "name")}
    answers = [
        {"question": p.question, "answer": p.answer, "generated": text, "hit": hit, "nats": nat, "depth": p.depth}
        for p, text, hit, nat in zip(asked, texts, hits, nats, strict=True)
    ]
    mean = sum(nats) / len(nats)
    return {
        "hits": sum(hits),
        "trials": len(hits),
        "low": low,
        "high": high,
        "nats": mean,
        **kinds,
        "answers": answers,
    }


def decode(base: Any, token: Tensor, cache: Any, ends: Tensor) -> list[list[int]]:
    """Greedily, cut at the end of the answer."""
    tokens, over = [], torch.zeros(len(token), dtype=torch.bool, device=token.device)
    while len(tokens) < NEW_TOKENS and not bool(over.all()):
        token = base(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        over = over | torch.isin(token[:, 0], ends)
        tokens.append(token[:, 0].masked_fill(over, int(ends[0])))
    return torch.stack(tokens, 1).tolist()


def answer_nats(base: Any, tokenizer: Any, batch: Sequence[Prompt], last: Tensor, cache: Any) -> list[float]:
    """Of the whole right answer, token by token as in decoding."""
    answers = [encode(tokenizer, f" {prompt.answer}") for prompt in batch]
    longest = max(map(len, answers))
    given = torch.tensor([[*x, *[-1] * (longest - len(x))] for x in answers], device=last.device)
    total, token = torch.zeros(len(batch), device=last.device), last
    for place in range(longest):
        logits = base(token, past_key_values=cache, use_cache=True).logits[:, -1].float()
        real, token = given[:, place] >= 0, given[:, place : place + 1].clamp(min=0)
        total -= logits.log_softmax(-1).gather(-1, token)[:, 0] * real
    return total.tolist()


@torch.no_grad()
def measure_mass(model: Any, tokenizer: Any, asked: Sequence[Prompt], args, top_k: int = 14) -> dict[str, Any]:
    """What each score would select for the last token of a prompt, against the attention of reading everything."""
    kinds = {
        "own": None,
        "mean": ranking("mean", {}),
        "mean of 4 parts": ranking("mean", {"subs": 4}),
        "bounds": ranking("bounds", {}),
        "bounds of 4 parts": ranking("bounds", {"subs": 4}),
        "exact": ranking("exact", {}),
    }
    own, found = op._landmark_scores, []
    size = model.mixer_attentions()[0].mixer.config.block_size
    facts: list[set[int]] = []

    def watch(call, turned, age, open_, count):
        few = min(top_k, call.top_k)  # of a short text all
        narrow, near, turns = call._replace(top_k=few), count.clamp(max=few), turned[..., : few + 2, :]
        truth = true_sums(call, turned, age).masked_fill(~open_[:, None, :, None], op.HIDDEN).softmax(-1)[:, :, 0, 0]
        rows = zip(call.blocks.index, facts, strict=True)
        held = torch.stack([torch.isin(row, torch.tensor(sorted(fact), device=row.device)) for row, fact in rows])
        fact = (truth * held[:, None]).sum(-1)
        row: dict[str, tuple[Tensor, Tensor]] = {}
        for name, score in kinds.items():
            best = (score or own)(narrow, turns, age, open_, near)[:, :, 0, 0].topk(few, dim=-1).indices
            row[name] = truth.gather(-1, best).sum(-1), held[:, None].expand_as(truth).gather(-1, best).any(-1)
        found.append((fact, row, truth.topk(few, dim=-1).values.sum(-1)))
        return own(call, turned, age, open_, count)

    with measuring(model, "mixed") as base:
        for start in range(0, len(asked), MASS_BATCH):
            batch = asked[start : start + MASS_BATCH]
            ids = torch.stack([prompt.input_ids for prompt in batch]).to(args.device)
            facts[:] = [fact_blocks(tokenizer, prompt, size) for prompt in batch]
            _, cache = read(base, ids[:, :-1])
            with Ranked(watch):
                base(ids[:, -1:], past_key_values=cache, use_cache=True)
    looks = torch.cat([fact.flatten() for fact, _, _ in found]) > LOOKS
    summary: dict[str, Any] = {"looking heads": looks.float().mean().item()}
    summary["best possible"] = torch.cat([best.flatten() for _, _, best in found]).mean().item()
    for name in kinds:
        mass = torch.cat([row[name][0].flatten() for _, row, _ in found])
        there = torch.cat([row[name][1].flatten() for _, row, _ in found])[looks]
        summary[name] = {"mass": mass.mean().item(), "fact found": there.float().mean().item()}
    print(json.dumps(summary, indent=1), flush=True)
    return summary


def true_sums(call, turned: Tensor, age: Tensor) -> Tensor:
    """Logsumexp of the blocks' scores `(B, H, 1, 1, N)` where every block is read at its own place."""
    keys = call.blocks.key[..., :-1, :].repeat_interleave(turned.shape[1] // call.blocks.key.shape[1], dim=1)
    back = age.clamp(0, turned.shape[4] - 1)[:, None, :, None].expand(-1, turned.shape[1], -1, 1, -1)
    query = op._at(turned, back)[:, :, 0, 0]  # (B, H, N, D)
    return ((query[..., None, :].float() * keys.float()).sum(-1) * call.scaling).logsumexp(-1)[:, :, None, None]


def fact_blocks(tokenizer: Any, prompt: Prompt, size: int) -> set[int]:
    """Blocks in which the fact stands."""
    end = prompt.position + len(encode(tokenizer, f" {prompt.fact}"))
    return {token // (size - 1) for token in range(prompt.position, end)}


def paired(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The last row against the softmax models measured before it on the same prompts, with 95% intervals."""
    last, lines = rows[-1], []
    for row in rows[:-1]:
        if row["variant"] in ("teacher", "yarn") and row["length"] == last["length"]:
            pairs = zip(last["answers"], row["answers"], strict=True)
            change = torch.tensor([100.0 * (mine["hit"] - its["hit"]) for mine, its in pairs])
            margin = 1.96 * change.std().item() / len(change) ** 0.5
            lines.append(f"against {row['variant']}: {change.mean().item():+.1f} +- {margin:.1f} points")
    return lines


def line(row: dict[str, Any]) -> str:
    share = 100 * row["hits"] / row["trials"]
    return (
        f"{row['variant']:32} {row['length']:6} {share:5.1f}% ({100 * row['low']:.0f} to {100 * row['high']:.0f}) "
        f"numbers {row['number']}, names {row['name']}, {row['nats']:.2f} nats, {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
