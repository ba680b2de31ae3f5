"""What a run was made of, and what may differ when it goes on.

A stage's checkpoints hold its facts: the data and the base model by a digest, and what else decides what a step means.
Settings are compared by `changed_settings` alone, stage by stage.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import UserError
from linearize.processes import from_main_process

if TYPE_CHECKING:
    from torch import nn

    from linearize.config.settings import RunSettings
    from linearize.training.checkpointing import Checkpoint

ROWS_AT_ONCE = 1024
COLUMNS = ("input_ids", "labels", "lengths")
"""What `TokenBlocks` and `TextRows` hold."""
BASE = "identity_of_the_base"
"""Attribute of a model that says what its run began with."""
DIGESTS = {
    "data": "other training data",
    "validation": "other validation data",
    "base": "another base model (its weights or its config differ)",
    "teacher": "another teacher to distil from (its weights or its config differ)",
}
"""Facts that say nothing to a person -> how a sentence names a difference."""


# ---- digests


def data_identity(rows: Any) -> str:
    """What tells training rows from others: the key of their entry in the cache, else a digest of all of them.

    Args:
        rows: `TokenBlocks`, `TextRows`, or any rows of tensors by name.
    """
    if known := getattr(rows, "identity", ""):
        return known
    import numpy as np

    digest = hashlib.sha256(str(len(rows)).encode())
    columns = [column for name in COLUMNS if (column := getattr(rows, name, None)) is not None]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        for column in columns:
            digest.update(np.asarray(column[part], dtype=np.int64).tobytes())
    for index in range(0 if columns else len(rows)):
        for name, tensor in sorted(rows[index].items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def base_identity(model: Any) -> str:
    """What tells the weights that a model was loaded from from others, whatever type or bits it has in memory.

    Of a Hub repository its commit; of a directory or a file a digest of its contents; of a model that was made in
    memory a digest of its tensors, those of the mechanism left out. Of a run's model what the run began with
    (`mark_base`). Every process calls it.
    """
    if known := vars(model).get(BASE):
        return known
    from linearize.config.record import loaded_commit

    source = getattr(model, "name_or_path", "")
    if source and Path(source).exists():
        return source_identity(source)
    commit = getattr(model.config, "_commit_hash", None) or (loaded_commit(source) if source else None)
    return _tensors_identity(model) if commit is None else f"commit {commit}"


def mark_base(model: Any, identity: str) -> None:
    """Make a model one that began with other weights: a stage's, whose repository a resumed run loads in place of the
    stages before it."""
    vars(model)[BASE] = identity


def source_identity(source: str, revision: str | None = None) -> str:
    """As `base_identity`, of what a model is loaded from."""
    from linearize.conversion.importers.checkpoint_files import checkpoint_digest

    return from_main_process(lambda: checkpoint_digest(source, revision))


def _tensors_identity(model: nn.Module) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".mixer." in name:
            continue
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(f"{name} {tuple(whole.shape)}".encode())
        digest.update(whole.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return f"tensors {digest.hexdigest()[:32]}"


# ---- the facts of a run and of a stage


def require_same_inputs(noted: Mapping[str, Any], inputs: Mapping[str, Any], directory: Path) -> None:
    """Refuses to go on with a run that was made of something else.

    Args:
        noted: digests of the run in the directory. inputs: those of now, by the names in `DIGESTS`.

    Raises:
        UserError: a sentence with what differs.
    """
    others = [DIGESTS[name] for name, value in inputs.items() if name in noted and noted[name] != value]
    if others:
        raise UserError(
            f"{directory} holds a run with {' and '.join(others)}, though the names are the same: put back what it "
            "began with, or name another output_dir."
        )


def require_same_run(checkpoint: Checkpoint, expected: Mapping[str, Any], steps: int | None = None) -> None:
    """Refuses to continue a stage as another one.

    Args:
        checkpoint: its `state["run"]` holds the values it was trained with.
        expected: name -> value of this run, such as `sequence_length`, `tokens_per_step`, `data`, `seed`.
        steps: that the stage has now; more than before may follow.

    Raises:
        UserError: a sentence with what differs.
    """
    trained = checkpoint.state.get("run", {})
    differing = [name for name, value in expected.items() if trained.get(name) != value]
    if differing:
        named = [f"{name} {trained.get(name)} (now {expected[name]})" for name in differing if name not in DIGESTS]
        what = [*named, *(DIGESTS[name] for name in differing if name in DIGESTS)]
        raise UserError(
            f"cannot resume from {checkpoint.path}: it was trained with {', '.join(what)}; "
            "set the values back, or start a new run in another output directory"
        )
    if steps is not None and checkpoint.step > steps:
        raise UserError(
            f"cannot resume from {checkpoint.path}: {checkpoint.step} steps are done, and the settings ask for "
            f"{steps} in all; ask for as many at least"
        )


# ---- the settings of a run


class StageState(enum.Enum):
    """How far a stage of a run is."""

    WAITING = "no step is done: its settings are free"
    OPEN = "steps are done, and nothing was made from them yet: more may follow, at another rate"
    SETTLED = "its length is another stage's too, which has begun: at another rate"
    CLOSED = "a later stage has begun from what it left"


ANYTIME = ("logging_steps", "save_steps", "save_total_limit", "eval_steps")
"""Names of settings, in any section, that have no part in the result."""
GEOMETRY = ("batch_size", "micro_batch_size", "eval_batch_size")
"""How a step's sequences are cut; the step itself is `tokens_per_step`."""
MEMORY = (
    "gradient_checkpointing",
    "logits_chunk",
    "load_in_4bit",
    "load_in_8bit",
    "dtype",
    "precision",
    "compile",
)
"""How frozen weights are held and products are computed. What trains is float32 always."""
STEPS = ("tokens", "max_steps", "epochs")
"""How long a stage is; `require_same_run` sees to it that it is not shorter than what is done."""
RATES = (
    "learning_rate",
    "mixer_learning_rate",
    "window_learning_rate",
    "gate_learning_rate",
    "warmup_steps",
    "warmup_ratio",
    "max_grad_norm",
)
"""What is lowered after a loss that is not finite."""
FIXED_SECTIONS = ("attention", "mixers", "architecture", "tokenizer", "data")
"""Where a setting of one of these names means something else."""


def changed_settings(
    old: RunSettings,
    new: RunSettings,
    stages: Mapping[str, StageState],
    free: Collection[str] = (),
    fixed: Collection[str] = (),
) -> list[str]:
    """The settings of a run that may not be what they are now when it goes on.

    Args:
        old: what the run was started with. new: what it is to go on with.
        stages: section of the settings -> how far that stage is.
        free: dotted names of settings of this kind of run that are always free. fixed: that never are.

    Returns:
        Dotted names.
    """
    from linearize.config.yaml_io import differences

    return [name for name in differences(old, new) if name in fixed or not _may_change(name, stages, free)]


def _may_change(name: str, stages: Mapping[str, StageState], free: Collection[str]) -> bool:
    section, _, key = name.rpartition(".")
    if name in free or (section or name) == "evaluation":
        return True
    if section not in FIXED_SECTIONS and key in ANYTIME + GEOMETRY + MEMORY:
        return True
    state = stages.get(section or name)
    allowed = {StageState.OPEN: STEPS + RATES, StageState.SETTLED: RATES}.get(state, ()) if state else ()
    return state is StageState.WAITING or key in allowed
