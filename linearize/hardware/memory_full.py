"""The memory that training all weights takes at the very least, against what there is: a run that cannot fit is
refused by its model's config, before weights and text are fetched.

Held by each process all the time, in float32: weights, their gradients, two Adam moments; over several processes the
buckets in which gradients are averaged; the teacher of a distillation. Activations come on top of it and are not
counted, so nothing is refused that would have fitted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from linearize.errors import UserError
from linearize.hardware.memory import ADAM_STATES, format_bytes

CHECK = "LINEARIZE_MEMORY_CHECK"
"""Environment variable; `off` leaves the check out."""
FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class FullTraining:
    """What one process holds, bytes."""

    parameters: int
    """Of the model, a number."""
    model: int
    """Weights, and of those that train gradients and moments."""
    buckets: int
    """Gradients on their way between the processes."""
    teacher: int

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return self.model + self.buckets + self.teacher

    def parts(self) -> dict[str, int]:
        """Bytes by what holds them, those of nothing left out."""
        parts = {
            "weights": FLOAT32 * self.parameters,
            "gradients and moments": self.model - FLOAT32 * self.parameters,
            "gradients between processes": self.buckets,
            "teacher": self.teacher,
        }
        return {name: count for name, count in parts.items() if count}


def parameter_count(config: Any) -> int:
    """Parameters of a model with its head, tied ones once, from its config; no weight is made."""
    from transformers import AutoModelForCausalLM

    from linearize.modeling import backbone_of, is_encoder

    kind: Any = backbone_of(config).auto_class(config.architectures) if is_encoder(config) else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config).num_parameters()


def full_training(config: Any, *, teacher: Any = None, trains_all: bool = True, processes: int = 1) -> FullTraining:
    """What training a model holds.

    Args:
        config: The model's.
        teacher: Config of the model to learn from, if there is one.
        trains_all: False where only the few scalers of a mechanism train.
        processes: Data-parallel ones.
    """
    parameters = parameter_count(config)
    states = ADAM_STATES if trains_all else 1
    return FullTraining(
        parameters=parameters,
        model=states * FLOAT32 * parameters,
        buckets=FLOAT32 * parameters if trains_all and processes > 1 else 0,
        teacher=0 if teacher is None else FLOAT32 * parameter_count(teacher),
    )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in the machine's memory, with those that this process holds: an earlier stage
    leaves them to the next one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    import psutil

    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def fits(model: Any, device: torch.device) -> bool:
    """Whether a model that lies on the CPU can be moved to a device and run there, with a tenth of it to spare."""
    return device.type == "cpu" or 1.1 * model.get_memory_footprint() <= free_memory(device)


def check_full_training(name: str, config: Any, state: Any, *, teacher: Any = None, trains_all: bool = True) -> None:
    """Refuse a training whose weights, gradients and optimiser alone are more than there is memory.

    Args:
        name: The model's, for the sentence.
        state: accelerate's `PartialState`.
        config, teacher, trains_all: As in `full_training`.

    Raises:
        UserError: It cannot fit; `LINEARIZE_MEMORY_CHECK=off` leaves the check out.
    """
    if os.environ.get(CHECK, "").lower() == "off":
        return
    needed = full_training(config, teacher=teacher, trains_all=trains_all, processes=state.num_processes)
    on_gpu = state.device.type == "cuda"
    free = free_memory(state.device) // (1 if on_gpu else state.num_processes)  # processes share a machine's memory
    if needed.total <= free:
        return
    parts = [f"weights, gradients and Adam's moments {format_bytes(needed.model)}"]
    parts += [f"gradients between processes {format_bytes(needed.buckets)}"] if needed.buckets else []
    parts += [f"the teacher {format_bytes(needed.teacher)}"] if needed.teacher else []
    raise UserError(
        f"Training all {needed.parameters:,} weights of {name} takes at least {format_bytes(needed.total)} in each "
        f"process ({', '.join(parts)}; activations come on top), and {format_bytes(free)} of "
        f"{'the GPU' if on_gpu else 'memory'} are free: {_advice(config, needed, free)}; more processes do not help, "
        f"for each holds all of it ({CHECK}=off skips this check)."
    )


def _advice(config: Any, needed: FullTraining, free: int) -> str:
    """What would fit."""
    from linearize.modeling import is_encoder

    ways = []
    if needed.teacher and needed.total - needed.teacher <= free:
        ways.append("leave the teacher out")
    if not is_encoder(config):
        half = format_bytes(BFLOAT16 * needed.parameters)
        ways.append(f"train adapters (weights: lora, on {half} of weights, a quarter with load_in_4bit)")
    most = int(free / (needed.total / needed.parameters))
    ways.append(f"take a model of at most {most:,} weights")
    return ", or ".join(ways)
