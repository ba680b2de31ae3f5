"""Runs training stages on a tiny model and writes their losses: what test_distributed.py starts, once or twice.

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 \\
        tests/runs/distributed_worker.py OUT transfer

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

from linearize.config.settings import FinetuneConfig, TransferConfig
from linearize.data.sequences import TokenBlocks

STEPS = 8
LENGTH = 16
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def transfer(model, blocks, output_dir):
    """Losses by step and layer. Window dropout is on, so that the processes must agree on it."""
    from linearize.stages.transfer import transfer_attention

    config = TransferConfig(max_steps=STEPS, tokens_per_step=2 * LENGTH, logging_steps=1, window_dropout=0.2)
    result = transfer_attention(model, blocks, config, output_dir=output_dir, seed=3, validation=blocks)
    return result.losses_per_layer


def sharded_transfer(model, blocks, output_dir):
    """Stage 1 with the frozen base sharded over the processes."""
    from linearize.training.loop import make_accelerator, shard_frozen_base

    shard_frozen_base(model, make_accelerator(None).device)
    return transfer(model, blocks, output_dir)


def finetune(model, blocks, output_dir, **changes):
    """Losses by step: total, cross-entropy, KL. The sequences have different numbers of labels."""
    from linearize.stages.finetuning import finetune

    labels = torch.where(torch.arange(LENGTH) < torch.arange(len(blocks))[:, None] * 2, -100, blocks.input_ids)
    config = FinetuneConfig(
        **{"max_steps": STEPS, "tokens_per_step": 2 * LENGTH, "logging_steps": 1, "learning_rate": 1e-2},
        **{"kl_weight": 0.5, "logits_chunk": 8, **changes},
    )
    result = finetune(model, TokenBlocks(blocks.input_ids, labels), config, output_dir=output_dir, seed=3)
    records = [json.loads(line) for line in result.log_path.read_text().splitlines()]
    assert [record["loss"] for record in records] == result.losses
    assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    return [[record[name] for name in ("loss", "cross_entropy", "kl")] for record in records]


def finetune_for_length(model, blocks, output_dir):
    """As `finetune`, on sequences of two lengths, in every other step from the state of the piece before."""
    lengths = {"sequence_length": [LENGTH // 2, LENGTH], "state_passing": 0.5}
    return finetune(model, blocks, output_dir, **lengths)


STAGES = {
    "transfer": transfer,
    "sharded_transfer": sharded_transfer,
    "finetune": finetune,
    "finetune_for_length": finetune_for_length,
}


def statistics(output_dir):
    """Moments after the scalers of gain cells, over the first 5 of 7 sequences: by scaler, mean and deviation."""
    from linearize.stages.adaptation import collect_statistics, share_of

    mixer = {"type": "gain_cell", "window": 8, "cell": {"tile": 8}, "cell_kind": "linear"}
    model = make_student(make_teacher(), {"gain_cell": mixer})
    found = collect_statistics(model.double(), share_of(token_blocks(), 5, PartialState()))
    return {name: [x.tolist() for x in moments] for name, moments in found.items()}


def disagreement(output_dir):
    """The step that all resume from, and what each says where another process sees no checkpoint there."""
    from linearize.errors import UserError
    from linearize.training import checkpointing

    state, root, load = PartialState(), output_dir / "checkpoints", checkpointing.load_checkpoint
    if state.is_main_process:
        for step in (1, 2):
            checkpointing.save_checkpoint(root, step, tensors={}, optimizer={}, state={})
    state.wait_for_everyone()
    step = checkpointing.checkpoint_to_resume(root, True).step
    if not state.is_main_process:  # as on a machine with a disk of its own
        checkpointing.load_checkpoint = lambda path, **options: load(path.with_name("step-7"), **options)
    try:
        checkpointing.checkpoint_to_resume(root, True)
        said = ""
    except UserError as error:
        said = str(error)
    checkpointing.load_checkpoint = load
    (output_dir / f"said-{state.process_index}").write_text(said)
    state.wait_for_everyone()
    return {"step": step, "said": [path.read_text() for path in sorted(output_dir.glob("said-*"))]}


def selection(output_dir):
    """What every layer loses with two windows; each process measures a share of the layers."""
    from linearize.stages.select_measure import layer_tables

    student = make_student(make_teacher(), {"linear": {"type": "linear", "sinks": 1}}).double()
    tables = layer_tables(student, token_blocks().input_ids, [2, 5], batch_size=3)
    return {"error": tables.error, "divergence": tables.divergence}


CHECKS = {"statistics": statistics, "disagreement": disagreement, "selection": selection}


def token_blocks():
    return TokenBlocks(torch.randint(3, 97, (7, LENGTH), generator=torch.Generator().manual_seed(5)))


def run(output_dir, stages, dtypes=tuple(DTYPES)):
    """Runs each stage in each dtype; returns `{stage: {dtype: losses}}`."""
    blocks = token_blocks()
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
    checks = {name: check(Path(output)) for name, check in CHECKS.items()}
    if int(os.environ.get("RANK", "0")) == 0:
        (Path(output) / "losses.json").write_text(json.dumps(result))
        (Path(output) / "checks.json").write_text(json.dumps(checks))
