"""What a run is refused for before anything is loaded: its surroundings, and lengths that the model cannot read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from linearize.errors import UserError
from linearize.hardware import memory

if TYPE_CHECKING:
    from linearize.runs.plan import RunPlan
    from linearize.runs.settings import RunConfig
    from linearize.stages.kinds.base import Start


def check_lengths(start: Start) -> None:
    """Refuse sequences that the model has never seen the positions of, landmarks' own among them."""
    from linearize.evaluation.arms import context_tokens

    config = start.config
    limit = context_tokens(start.student)
    room = "" if limit == context_tokens(start.model, "teacher") else " with its landmarks"
    lengths = {"data.sequence_length": config.data.sequence_length}
    if config.evaluation is not None and config.evaluation.sequence_length is not None:
        lengths["evaluation.sequence_length"] = config.evaluation.sequence_length
    for name, stage in config.stages.items():
        if hasattr(stage, "lengths"):
            lengths[f"{name}.sequence_length"] = max(stage.lengths(config.data.sequence_length))
    for name, length in lengths.items():
        if limit is not None and length > limit:
            raise UserError(
                f"{name} is {length}, but the teacher's context is {limit} tokens{room}: set it to {limit} or lower."
            )


def check_yardstick(start: Start) -> None:
    """Refuse to train all weights of a teacher that is not there."""
    settings = start.config.yardstick_settings() if start.config.yardstick is not None else None
    if settings is not None and settings.weights != "lora" and start.converted:
        raise UserError(
            f"yardstick trains the teacher, and {start.config.model_name_or_path} is converted: leave it out, or "
            "start from the teacher."
        )


def check_data(start: Start) -> None:
    """Refuse rows that an encoder cannot have."""
    data = start.config.data
    if start.encoder and (data.packing != "stream" or data.isolate_documents):
        raise UserError(
            "data.packing and data.isolate_documents are for decoders: an encoder's row is a text of its own, so "
            "leave them out."
        )


def check_device(name: str) -> None:
    """Refuse a GPU that is asked for and not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but no GPU is visible: set device to auto or cpu.")


def check_environment(config: RunConfig) -> None:
    """Refuse now what would fail after hours: a missing package, device, folder or token."""
    from linearize.conversion.quantization import require_bitsandbytes
    from linearize.training.launcher import check_launcher
    from linearize.training.log import tracker_names

    check_launcher(config.device)
    tracker_names(config.report_to)
    if config.load_in_4bit or config.load_in_8bit:
        require_bitsandbytes()
    check_device(config.device)
    if config.op_backend == "triton":
        check_triton()
    evaluation = config.evaluation
    if evaluation is not None:
        texts = [evaluation.texts] if isinstance(evaluation.texts, str) else evaluation.texts or []
        for path in [*texts, *([evaluation.include_path] if evaluation.include_path else [])]:
            if not os.path.exists(path):
                raise UserError(f"evaluation: there is no file or folder {path}; check the path.")
        if evaluation.tasks:
            from linearize.evaluation.tasks import check_tasks

            check_tasks(evaluation.tasks, evaluation.include_path)


def check_triton_takes(teacher: Any, config: RunConfig) -> None:
    """Refuse the fused backend on a GPU where its kernels take no linear attention of these settings."""
    import torch

    linear = config.attention is not None and config.attention["type"] == "linear"
    if config.op_backend != "triton" or not linear or not torch.cuda.is_available():
        return
    if reason := memory.why_not_fused(teacher, config):
        raise UserError(f"op_backend is triton, but {reason}: set op_backend to auto or chunked.")


def check_triton() -> None:
    """Refuse the fused backend where its kernels cannot run."""
    import torch

    from linearize.kernels.triton_support import unavailable
    from linearize.modeling.op_dispatch import find_kernel
    from linearize.modeling.op_hybrid_linear import CONTRACT

    kernel, reason = find_kernel("hybrid_linear", CONTRACT)
    if kernel is not None:
        reason = unavailable(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")) or ""
    if reason:
        raise UserError(f"op_backend is triton, but {reason}: set op_backend to auto or chunked.")


def check_memory(plan: RunPlan, state: Any) -> None:
    """Refuse training of all weights that cannot fit, before the first stage."""
    from linearize.conversion.quantization import refuse_quantized
    from linearize.conversion.students import load_config
    from linearize.hardware.memory_full import check_full_training

    start, config = plan.start, plan.config
    name = config.model_name_or_path or f"this {config.architecture.type}"  # type: ignore[union-attr]
    for current in plan.stages:
        if current.what not in ("all", "mechanism") or current.values.kind != "train":
            continue
        taught = "base" if current.values.objective == "embeddings" else current.values.teacher
        teacher = None
        if taught is not None:
            own = taught in ("base", "yardstick") or taught in config.stages
            teacher = start.model if own else load_config(taught)
            if not own:
                refuse_quantized(taught, teacher)
        check_full_training(name, start.student, state, teacher=teacher, trains_all=current.what == "all")
