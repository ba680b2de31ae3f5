"""Training of an arm of `measure_state_arms.py`: attention transfer of its memories, then LoRA on next tokens."""

import time

import numpy as np
import torch
from arm_bench import Bench
from memory_arms import RATES, DeltaMemory
from state_arms import See, visible_pairs
from torch import nn
from torch.nn import functional as F

LENGTH = 1024
"""Tokens of a training row."""
DROPOUT_END = 0.75
"""Share of the LoRA steps after which the window is never left out."""


def rows(args, bench: Bench, seed: int):
    """Batches of `(batch_size, 1024)`: a new order of the training text each time it ends."""
    length, order = LENGTH, np.random.default_rng(seed)
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
            arm.remember(see, heads, bench.shape[0], hidden)
    memories = [arm.memory for arm in bench.arms if arm.memory is not None]
    named = [(name, parameter) for memory in memories for name, parameter in memory.named_parameters()]
    groups = [
        {"params": [parameter for name, parameter in named if RATES[name] == rate], "lr": rate, "start": rate}
        for rate in sorted({RATES[name] for name, _ in named})
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses: list[float] = []
    means: list[float] = []

    def observe(arm, hidden, query, key, value, raw_query, raw_key, output):
        if arm.memory is None:
            return
        see = wanted[arm]
        target = output.float()
        if not means and isinstance(arm.memory, DeltaMemory):
            arm.memory.start(raw_query, raw_key, value, hidden, target)
        with torch.enable_grad():
            visible = visible_pairs(see, query, key) if see.kept else None
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
        for arm in bench.arms:
            arm.dropout = arm.see.window_dropout * max(0, 1 - step / (DROPOUT_END * steps)) if arm.see else 0.0
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
