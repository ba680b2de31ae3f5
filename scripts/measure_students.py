"""Students of bounded state by length, with the library's own code: placed, trained with LoRA, scored beside controls.

    python scripts/measure_state_arms.py prepare ...           # tokens.npz, as that script's first lines say
    python scripts/measure_students.py select --model MODEL --data out/arms
    python scripts/measure_students.py train --model MODEL --data out/arms --arms teacher,constant,window --seed 0
    python scripts/measure_students.py report --data docs/results/students

`select` measures layers on the training text (`linearize.stages.select`). `train` converts, finetunes and scores
(`linearize.stages.finetuning`): each arm leaves `DATA/student_ARM_SEED.json` with the mean log-likelihood of every
whole piece of 1k, 4k, 8k and 32k tokens of each text (the teacher's positions end at 8k), for all of the attention and
for its window alone, of the buckets of an 8k piece by position and of every 1k of a 32k piece; and what it recalls
(`recall_tasks.py`).
"""

import argparse
import gc
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recall_tasks import accuracy, tasks
from students_report import report
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from linearize.config.settings import FinetuneConfig, TransferConfig
from linearize.conversion import convert
from linearize.conversion.students import load_model
from linearize.data.sequences import TokenBlocks
from linearize.evaluation import state_bytes
from linearize.runs.attention import complete, read_model
from linearize.runs.settings import resolve_run
from linearize.stages.calibration import calibrate
from linearize.stages.finetuning import finetune
from linearize.stages.select import Selection, placed, select
from linearize.stages.select_plan import plan_selection
from linearize.stages.transfer import transfer_attention

LENGTH, BUCKETS = 1024, (0, 1024, 2048, 4096, 8192)
BUDGET, SMALL = "344KB/layer", "200KB/layer"
UNIFORM = {"type": "salient", "sinks": 4}
COSINE = {"type": "cosine", "sinks": 4, "directions": "projections", "gate": "token"}
LANDMARK = {"type": "landmark", "top_k": 14, "selection": "head", "block_weight": "tokens"}
LEARNED: dict[str, dict[str, Any]] = {
    "lolcats": {
        **{"type": "linear", "window": 64, "sinks": 0, "magnitude": False, "initialization": "identity_first"},
        **{"window_reference": "max", "window_weight_form": "sigmoid", "window_weight": 0.1, "window_shift": None},
    },
    "memory": {
        **{"type": "linear", "window": 250, "sinks": 4, "feature_dim": 32, "share_key_map": True},
        **{"map_input": "projections", "gate": "token"},
    },
    "cosine": {**COSINE, "window": 250},
    "cosine_wide": {**COSINE, "window": 448},
    "cosine_pure": {**COSINE, "window": 0, "sinks": 0},
    "cosine_rotated": {"type": "cosine", "window": 250, "sinks": 4},
    "cosine_pure_rotated": {"type": "cosine", "window": 0, "sinks": 0},
    "gain_cell": {"type": "gain_cell", "window": 1024, "cell_kind": "linear"},
    "landmark": LANDMARK,
    "landmark_exact": {**LANDMARK, "landmark_key": "bounds", "key_parts": 63},
}
"""Arms whose mechanism learns or is fitted before LoRA."""
GROWING = ("landmark", "landmark_exact")
"""Of these, those without a bounded state: attention transfer has nothing to teach it, and past the teacher's
positions it reads with a cache (`linearize evaluate --passkey`), not in one call."""
TRAINING: dict[str, dict[str, Any]] = {
    "longer": {"sequence_length": 4 * LENGTH, "batch_size": 2},
    "mixed_lengths": {"sequence_length": [LENGTH, 4 * LENGTH], "batch_size": 2},
    "passing": {"state_passing": 0.5},
    "memory_longer": {"sequence_length": 4 * LENGTH, "batch_size": 2},
    "memory_passing": {"state_passing": 0.5},
}
"""What an arm trains with, where it is not rows of 1024 tokens on their own; by the end of their names they are
`constant` or `memory`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["select", "train", "report"])
    parser.add_argument("--model", help="a directory, or a .gguf file")
    parser.add_argument("--tokenizer", help="a directory; default: that of the model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arms", default="teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=560)
    parser.add_argument("--transfer_steps", type=int, default=90)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--calibrated", type=int, default=64, help="sequences of a calibration")
    parser.add_argument("--recalled", type=int, default=64, help="prompts of each recall task and length; 0: none")
    parser.add_argument("--lengths", default="1024,4096,8192,32768")
    parser.add_argument("--scored", type=int, default=65_536)
    parser.add_argument("--select_tokens", type=int, default=16_384)
    parser.add_argument("--save", type=Path, help="where trained students go, a directory each")
    args = parser.parse_args()
    args.lengths = [int(length) for length in args.lengths.split(",")]
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    {"select": select_layers, "train": train, "report": lambda args: report(args.data)}[args.action](args)


def texts(args) -> dict[str, np.ndarray]:
    return dict(np.load(args.data / "tokens.npz"))


def blocks(args) -> TokenBlocks:
    ids = texts(args)["train"]
    ids = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64)
    return TokenBlocks(ids, ids)


# ---- placement


def plan(args, attention: dict, budget: str | None, softmax: Any = ()):
    """Of a selection on 8k pieces of the training text."""
    choice = {"tokens": args.select_tokens, "sequence_length": 8192}
    options = {"attention": attention, "state_budget": budget, "softmax_layers": softmax or [], "select": choice}
    data = {"dataset": "none", "sequence_length": LENGTH}
    dtype = str(args.dtype).removeprefix("torch.")
    run = {"model_name_or_path": str(args.model), "data": data, "dtype": dtype, "stages": {}, **options}
    settings = complete(resolve_run(run))
    return plan_selection(settings, read_model(settings))


def place(args, attention: dict, budget: str | None, softmax: Any = ()):
    """A selection, measured once for all budgets."""
    load = lambda settings: convert(args.model, settings, dtype=args.dtype).to(args.device)  # noqa: E731
    return select(plan(args, attention, budget, softmax), blocks(args), load, args.data)


def select_layers(args) -> None:
    chosen = place(args, UNIFORM, BUDGET)
    chosen.save(args.data)
    chosen.show()


def windows_alone(args) -> Selection:
    """The placement of windows without kept tokens, from the same tables."""
    full = place(args, UNIFORM, BUDGET)
    own = [option for option, kept in enumerate(full.plan.kept) if kept == 0]
    lists = {name: [getattr(full.plan, name)[i] for i in own] for name in ("windows", "kept", "sizes")}
    narrow = replace(full.plan, **lists)
    tables = replace(full.tables, divergence=[[row[i] for i in own] for row in full.tables.divergence])
    return Selection(narrow, tables, full.identity, placed(narrow, tables.divergence))


def by_error(chosen: Selection) -> Selection:
    """The same measurements, layers ranked by the error of their own output."""
    return replace(chosen, options=placed(chosen.plan, chosen.tables.error))


def attention_of(name: str) -> str:
    """The arm whose attention an arm of other training has."""
    return name if name not in TRAINING else "memory" if name.startswith("memory") else "constant"


def arm_layers(args, name: str) -> dict[str, Any]:
    """What `convert` takes."""
    uniform = {
        "teacher": UNIFORM,
        "window": {**UNIFORM, "window": 440, "kept_tokens": 0},
        "kept": {**UNIFORM, "window": 220, "kept_tokens": 220},
        "small_kept": {**UNIFORM, "window": 126, "kept_tokens": 126},
        **LEARNED,
    }
    if name in uniform:
        return {"attention": uniform[name]}
    spread = [3, 11, 18, 26]
    chosen = {
        "constant": lambda: place(args, UNIFORM, BUDGET),
        "window_placed": lambda: windows_alone(args),
        "small": lambda: place(args, UNIFORM, SMALL),
        "hybrid": lambda: place(args, UNIFORM, BUDGET, 4),
        "constant_error": lambda: by_error(place(args, UNIFORM, BUDGET)),
        "hybrid_error": lambda: by_error(place(args, UNIFORM, BUDGET, 4)),
        "spread": lambda: place(args, UNIFORM, BUDGET, spread),
    }[name]()
    return {"mixer_types": chosen.mixer_types, "mixers": chosen.mixers}


# ---- training and scoring


def train(args) -> None:
    for name in args.arms.split(","):
        begun = time.time()
        attention = attention_of(name)
        model: Any = convert(args.model, **arm_layers(args, attention), dtype=args.dtype).to(args.device)
        found: dict[str, Any] = {"arm": name, "seed": args.seed, "steps": args.steps, "device": _device(args)}
        if attention in LEARNED:
            learn(args, model, name, LEARNED[attention]["type"])
        arm: Any = "teacher" if name == "teacher" else "mixed"
        out = args.data / f"run_{name}_{args.seed}"
        rows, config = blocks(args), finetune_settings(args, name)
        result = finetune(model, rows, config, output_dir=out, seed=args.seed, arm=arm, device=args.device)
        found |= {"seconds": round(result.seconds), "loss": result.losses[-20:]}
        student = result.model.merge_and_unload().eval().requires_grad_(False)
        if args.save:
            save(args, student, name, arm)
        found["bytes"] = {x.tokens: x.student for x in state_bytes(student.config, args.lengths, torch.bfloat16)}
        arms = ("teacher",) if arm == "teacher" else [x for x in ("mixed", "softmax") if x in student.arms()]
        for part in arms:
            far = part != "teacher" and attention not in GROWING
            lengths = [n for n in args.lengths if n <= 8192 or far]
            found[part] = score(args, student, part, lengths)
            print(f"{name:10s} {args.seed} {part:8s} {perplexities(found[part])}", flush=True)
            if part != "softmax" and args.recalled:
                found["recall"] = recall(args, student, part)
                print(f"{name:10s} {args.seed} {found['recall']}", flush=True)
        found["total_seconds"] = round(time.time() - begun)
        (args.data / f"student_{name}_{args.seed}.json").write_text(json.dumps(found))
        del model, result, student
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def finetune_settings(args, name: str) -> FinetuneConfig:
    settings: dict[str, Any] = {"max_steps": args.steps, "batch_size": 8, "warmup_steps": 20, "logging_steps": 20}
    settings |= {"tokens_per_step": 8 * LENGTH, "learning_rate": args.learning_rate, "save_steps": 10**6}
    return FinetuneConfig(**{**settings, **TRAINING.get(name, {})})


def learn(args, model: Any, name: str, kind: str) -> None:
    """Calibration and attention transfer, as the mechanism has them."""
    if kind == "cosine" or name == "landmark":
        calibrate(model, blocks(args), args.calibrated, 8)
    if name in GROWING:
        return
    steps = args.transfer_steps
    stage = {"max_steps": steps, "batch_size": 8, "tokens_per_step": 8 * LENGTH, "save_steps": 10**6}
    config = TransferConfig(**stage, branch="both" if kind == "linear" else "mixed")
    transfer_attention(model, blocks(args), config, output_dir=args.data / f"run_{name}_{args.seed}")


def save(args, student: Any, name: str, arm: str) -> None:
    """The trained student with its tokenizer; of the teacher's arm the softmax model."""
    trained = student.state_dict()
    if arm == "teacher":
        student = load_model(args.model, dtype=args.dtype)
        student.load_state_dict({key: trained[key] for key in student.state_dict()})
    student.save_pretrained(args.save / f"{name}_{args.seed}")
    AutoTokenizer.from_pretrained(args.tokenizer or args.model).save_pretrained(args.save / f"{name}_{args.seed}")


def _device(args) -> str:
    return torch.cuda.get_device_name() if args.device == "cuda" else "CPU"


@torch.no_grad()
def score(args, model: Any, arm: str, lengths: list[int]) -> dict:
    """text -> length -> mean loss of each whole piece; of 8k pieces also each bucket's; of 8k and longer ones that of
    the last half of every 8k span (`same_LENGTH`): the same tokens, read with more context."""
    found: dict[str, Any] = {}
    with model.use_arm(arm):
        for name, ids in texts(args).items():
            if name == "train":
                continue
            ids = ids[: args.scored].astype(np.int64)
            of: dict[str, Any] = found.setdefault(name, {})
            for length in lengths:
                pieces = torch.from_numpy(ids[: len(ids) // length * length].reshape(-1, length))
                losses = [piece_losses(model, x.to(args.device)) for x in pieces.split(max(1, 8192 // length))]
                losses = torch.cat(losses) if losses else torch.zeros(0, length - 1)
                of[str(length)] = losses.mean(1).tolist()
                if length == 8192:
                    spans = zip(BUCKETS, BUCKETS[1:], strict=False)
                    of["buckets"] = [losses[:, max(a - 1, 0) : b - 1].mean(1).tolist() for a, b in spans]
                if length > 8192:
                    pairs = [losses[:, max(a - 1, 0) : a + 1023] for a in range(0, length, 1024)]
                    of[f"each_1024_of_{length}"] = torch.stack([x.mean(1) for x in pairs], 1).tolist()
                if length >= 8192:  # the same tokens: the last half of every 8k span
                    halves = [losses[:, s + 4096 - 1 : s + 8192 - 1] for s in range(0, length, 8192)]
                    of[f"same_{length}"] = torch.stack([h.mean(1) for h in halves], 1).flatten().tolist()
    return found


@torch.no_grad()
def recall(args, model: Any, arm: str) -> dict[str, dict[str, list[float]]]:
    """task -> length -> of each prompt, the share of the answer's tokens that are the most likely one."""
    tokenizer, text = AutoTokenizer.from_pretrained(args.tokenizer or args.model), texts(args)["validation"]
    found: dict[str, dict[str, list[float]]] = {}
    with model.use_arm(arm):
        for length in (n for n in args.lengths if n <= 8192):
            together = max(1, 16384 // length)
            for task, (ids, answers) in tasks(tokenizer, text, length, args.recalled).items():
                best = torch.cat([predictions(model, x.to(args.device)) for x in ids.split(together)])
                found.setdefault(task, {})[str(length)] = accuracy(best, ids, answers).tolist()
    return found


def predictions(model: Any, ids: Tensor) -> Tensor:
    """`(B, T)` -> the most likely token after each, `(B, T)`, on the CPU."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.cat([model.lm_head(part).argmax(-1).cpu() for part in hidden.split(2048, 1)], 1)


def piece_losses(model: Any, ids: Tensor) -> Tensor:
    """`(B, T)` -> `(B, T - 1)`, float64 on the CPU."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    parts = [
        functional.cross_entropy(model.lm_head(part).float().flatten(0, 1), target.flatten(), reduction="none")
        .view(target.shape)
        .double()
        .cpu()
        for part, target in zip(hidden.split(2048, 1), ids[:, 1:].split(2048, 1), strict=True)
    ]
    return torch.cat(parts, 1)


def perplexities(scores: dict) -> str:
    def cell(values):
        return f"{math.exp(sum(values) / len(values)):.2f}" if values else "-"

    return " | ".join(
        f"{name[:12]} " + " ".join(cell(v) for length, v in of.items() if length.isdigit())
        for name, of in scores.items()
    )


if __name__ == "__main__":
    main()
