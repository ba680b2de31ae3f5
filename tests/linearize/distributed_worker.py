"""Runs training stages on a tiny model and writes their losses: what test_distributed.py starts, once or twice.

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 \\
        tests/linearize/distributed_worker.py OUT transfer

To add a stage: a function `(model, blocks, output_dir) -> losses by step` and its name in `STAGES`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_student, make_teacher

from linearize.data import TokenBlocks
from linearize.settings import FinetuneConfig, TransferConfig

STEPS = 20
LENGTH = 16
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def transfer(model, blocks, output_dir):
    """Losses by step and layer. Window dropout is on, so that the processes must agree on it."""
    from linearize.transfer import transfer_attention

    config = TransferConfig(max_steps=STEPS, tokens_per_step=2 * LENGTH, logging_steps=1, window_dropout=0.2)
    result = transfer_attention(model, blocks, config, output_dir=output_dir, seed=3, validation=blocks)
    return result.losses_per_layer


def sharded_transfer(model, blocks, output_dir):
    """Stage 1 with the frozen base sharded over the processes."""
    from linearize.training_loop import make_accelerator, shard_frozen_base

    shard_frozen_base(model, make_accelerator(None, "none", output_dir).device)
    return transfer(model, blocks, output_dir)


def finetune(model, blocks, output_dir):
    """Losses by step: total, cross-entropy, KL. The sequences have different numbers of labels."""
    from linearize.finetuning import finetune

    labels = torch.where(torch.arange(LENGTH) < torch.arange(len(blocks))[:, None] * 2, -100, blocks.input_ids)
    config = FinetuneConfig(
        max_steps=STEPS, tokens_per_step=2 * LENGTH, logging_steps=1, learning_rate=1e-2, kl_weight=0.5, logits_chunk=8
    )
    result = finetune(model, TokenBlocks(blocks.input_ids, labels), config, output_dir=output_dir, seed=3)
    records = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    assert [record["loss"] for record in records] == result.losses
    assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    return [[record[name] for name in ("loss", "cross_entropy", "kl")] for record in records]


STAGES = {"transfer": transfer, "sharded_transfer": sharded_transfer, "finetune": finetune}


def run(output_dir, stages, dtypes=tuple(DTYPES)):
    """Runs each stage in each dtype; returns `{stage: {dtype: losses}}`."""
    ids = torch.randint(3, 97, (7, LENGTH), generator=torch.Generator().manual_seed(5))
    blocks = TokenBlocks(ids)
    losses = {}
    for stage in stages:
        for name in dtypes:
            model = make_student(make_teacher(), {"linear": {"type": "linear", "window": 4, "sinks": 1}})
            model.to(DTYPES[name])
            losses.setdefault(stage, {})[name] = STAGES[stage](model, blocks, Path(output_dir) / stage / name)
    return losses


if __name__ == "__main__":
    output, *names = sys.argv[1:]
    result = run(output, names or list(STAGES))
    if int(os.environ.get("RANK", "0")) == 0:
        (Path(output) / "losses.json").write_text(json.dumps(result))
