"""Stage 2: LoRA on the projections, the mechanism trained along, with cross-entropy and distillation to the model's
own teacher.

    model = linearize.convert("meta-llama/Meta-Llama-3-8B")
    transfer_attention(model, train, TransferConfig(), output_dir="out")
    result = finetune(model, train, FinetuneConfig(), output_dir="out")
    plain = merge(result.model)

The teacher is never a second model: the adapters and the mechanism are switched off for its pass. The steps are those
of LoLCATs (Zhang et al. 2024, https://arxiv.org/abs/2410.10254, section 3.2): low-rank adapters of rank 8 on q, k, v
and o, next-token cross-entropy.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState
from transformers import set_seed

from linearize.conversion.students import refuse_encoder
from linearize.errors import UserError
from linearize.evaluation.arms import context_tokens
from linearize.stages.adapters import (
    AdaptedModel,
    add_adapters,
    check_targets,
    default_targets,
    merge,
    merge_into_unquantized,
    save_adapter,
)
from linearize.stages.finetune_lengths import JoinedRows, check_state_passing, training_rows
from linearize.stages.finetuning_trainer import FinetuningTrainer
from linearize.stages.identity import data_identity
from linearize.stages.opening import OpenStage, open_stage
from linearize.training.log import has_matplotlib, read_log, write_figure
from linearize.training.loop import Interrupt, PeakMemory, readable_memory_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.config.settings import FinetuneConfig
    from linearize.data.sequences import TokenBlocks

__all__ = ["FinetuneResult", "finetune", "merge", "merge_into_unquantized", "save_adapter"]

logger = logging.getLogger(__name__)

YARDSTICK, ADAPTER = "yardstick", "adapter"


def smaller(section: str) -> tuple[str, ...]:
    """What takes less memory, beside smaller micro-batches."""
    return f"lower {section}.logits_chunk", f"set {section}.gradient_checkpointing", "set load_in_4bit"


@dataclass
class FinetuneResult:
    """What stage 2 leaves."""

    model: Any = field(repr=False)
    """An `AdaptedModel`: adapters on the converted model (the same object that came in); `merge` makes it plain,
    `.unload()` gives the base back untouched. None once a whole run has merged it into full weights."""
    losses: list[float]
    """Loss of each step that this call ran."""
    steps: int
    """Steps of the whole stage, those before a resume included."""
    tokens: int
    """Tokens of the whole stage."""
    seconds: float
    """Duration of this call's training."""
    peak_memory_bytes: int | None
    """Highest number of bytes that tensors held on the GPU; None on a CPU."""
    log_path: Path
    """JSON lines: mean losses every `logging_steps`."""
    adapter_path: Path
    """The adapter in peft's format."""


def finetune(
    model: PreTrainedModel,
    train: TokenBlocks,
    config: FinetuneConfig,
    *,
    output_dir: str | os.PathLike[str],
    seed: int = 0,
    resume: bool | str | os.PathLike[str] = False,
    report_to: str | Sequence[str] = ("none",),
    arm: Literal["mixed", "teacher"] = "mixed",
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: str | None = None,
) -> FinetuneResult:
    """Trains adapters (and the mechanism) of a converted model, in place.

    Writes `checkpoints/NAME/step-N`, `logs/NAME.jsonl`, `plots/NAME_loss.png` and `adapter` (`yardstick` of the
    teacher's arm) under the output directory, by the name of the stage (`config.section`). Ctrl-C ends the step, saves
    a checkpoint and raises `KeyboardInterrupt`.

    Args:
        model: A converted model; half precision and 4- or 8-bit bases keep their dtype, what trains is float32.
        train: Packed sequences with labels.
        config: Settings of the stage.
        output_dir: The run directory.
        seed: Of the adapters, the order of the data and the dropout.
        resume: True goes on from the latest checkpoint of this stage, if there is one; a path from that one.
        report_to: Trackers of accelerate.
        arm: "teacher" trains the yardstick: the same adapters and steps on the softmax teacher, the mechanism
            untouched.
        tokenizer: Saved beside the adapter.
        base_model: The converted repository that the adapter belongs on; default: where the model was loaded from.
        revision: Of that repository on the Hub.
        device: "cpu" keeps to the CPU; None takes the process's GPU where there is one.

    Raises:
        UserError: Settings that do not fit the model, the data or the processes; not finite losses; out of memory; a
            full disk.
        KeyboardInterrupt: After Ctrl-C, with a checkpoint left.
    """
    rows = _checked_rows(model, train, config)
    facts = {**_facts(config), "arm": arm, "data": data_identity(train)}
    where: dict[str, Any] = {"seed": seed, "resume": resume, "report_to": report_to, "device": device}
    # Mixed precision stays off: the base computes in the dtype that it was loaded in, what trains in float32. A
    # sequence within the window leaves the feature maps without a gradient.
    opened = open_stage(config, rows, model, output_dir, **where, facts=facts, ddp_find_unused_parameters=True)
    set_seed(seed)
    belongs: dict[str, Any] = {"base_model": base_model, "revision": revision}
    adapted = add_adapters(model, config, train_mixers=config.train_mixers and arm != "teacher", **belongs)
    memory, start = PeakMemory(opened.arguments.device), time.perf_counter()
    losses = _train(adapted, opened)
    seconds = time.perf_counter() - start
    adapter = opened.output / (YARDSTICK if arm == "teacher" else ADAPTER)
    if opened.is_main:
        _plot(opened)
        save_adapter(adapted, adapter, tokenizer=tokenizer)
    PartialState().wait_for_everyone()
    steps, peak = opened.plan.steps, memory.bytes()
    return FinetuneResult(adapted, losses, steps, opened.tokens, seconds, peak, opened.log_path, adapter)


def _facts(config: FinetuneConfig) -> dict[str, Any]:
    """Settings that decide what a step means; None is what an absent fact is: a run without them goes on from
    checkpoints that do not know them."""
    return {
        "pieces": config.lengths(0) if isinstance(config.sequence_length, list) else None,
        "length_shares": config.length_shares,
        "state_passing": config.state_passing or None,
    }


def _checked_rows(model: Any, train: TokenBlocks, config: FinetuneConfig) -> TokenBlocks | JoinedRows:
    """The rows to train on, where they and the settings fit the model."""
    refuse_encoder(model.name_or_path or type(model).__name__, model.config)
    if len(train) == 0:
        raise UserError("the training data has no whole sequence: lower data.sequence_length or give more text")
    if model.dtype == torch.float16:
        raise UserError("finetuning in float16 would lose small gradients: set dtype to bfloat16 or float32.")
    check_targets(model, config.lora_targets or default_targets(model), config.section)
    rows = training_rows(train, config)
    if config.state_passing:
        kinds = [settings["type"] for settings in model.config.mixers.values()]
        check_state_passing(config, kinds, context_tokens(model.config), max(config.lengths(train.sequence_length)))
    return rows


def _train(adapted: AdaptedModel, opened: OpenStage) -> list[float]:
    """Runs the Trainer; the loss of each step."""
    base: Any = adapted.get_base_model()
    config = opened.config
    with Interrupt() as interrupt:
        trainer = opened.trainer(FinetuningTrainer, adapted, interrupt)
        others, length = smaller(config.section), opened.rows.sequence_length
        memory_errors = readable_memory_errors("finetuning", config.section, config, length, *others)
        arm = base.use_arm(opened.run["arm"])
        with memory_errors, arm, gradient_checkpointing(base, config.gradient_checkpointing):
            return trainer.run_stage(opened.checkpoint)


def _plot(opened: OpenStage) -> None:
    path = opened.output / "plots" / f"{opened.config.section}_loss.png"
    what = "Yardstick, LoRA on the softmax teacher" if opened.run["arm"] == "teacher" else "LoRA"
    plot_losses(read_log(opened.log_path), path, title=what, with_kl=bool(opened.config.kl_weight))


@contextmanager
def gradient_checkpointing(base: Any, enabled: bool) -> Iterator[None]:
    """Recomputes each layer in the backward pass. Non-reentrant: the frozen embeddings give no gradient to start
    from."""
    if not enabled:
        yield
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):  # transformers 5.23; the older name warns there
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        disable = base.activation_checkpointing_disable
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        disable = base.gradient_checkpointing_disable
    try:
        yield
    finally:
        disable()


def plot_losses(records: Sequence[Mapping[str, Any]], path: Path, *, title: str, with_kl: bool) -> None:
    """Draws the loss over the steps, and beside it the divergence, which is much smaller.

    Args:
        records: The log, as `read_log` gives it.
        path: The PNG.
        title: What was trained.
        with_kl: Whether the teacher had a part in the loss.
    """
    if not records or not has_matplotlib():
        return
    from matplotlib.figure import Figure

    panels = [{"loss": "loss"}]
    if with_kl:
        panels = [{"loss": "weighted sum", "cross_entropy": "cross-entropy"}, {"kl": "KL to the teacher"}]
    figure = Figure(figsize=(7 if len(panels) == 1 else 11, 4.2), layout="constrained")
    steps = [record["step"] for record in records]
    for axes, curves in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key, label in curves.items():
            axes.plot(steps, [record[key] for record in records], label=label, marker="." if len(steps) == 1 else "")
        axes.set(title=title, xlabel="step", ylabel="nats per supervised token")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    write_figure(figure, path)
