"""What a launcher or the environment says beside the settings: the settings decide, or the conflict is refused.

`accelerate launch` and `accelerate config` speak through variables of the environment, which accelerate and
transformers read after the settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from linearize.errors import UserError

PRECISION = "ACCELERATE_MIXED_PRECISION"
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""Switches of what would split the model over the processes."""
COMPILER = "ACCELERATE_DYNAMO_BACKEND"
CPU, DEVICE = "ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"


def check_launcher(device: str | None = None) -> None:
    """Refuse a launcher's choices that would change what the settings of a run mean.

    Args:
        device: Of the settings.

    Raises:
        UserError: The model would be split over the processes or compiled, or would not be on the device that the
            settings ask for.
    """
    for variable, name in SHARDING.items():
        if _is_on(variable):
            raise UserError(
                f"The launcher sets up {name} ({variable}), but a run is data parallel and each process holds the "
                "whole model: switch it off in `accelerate config`, or launch without it."
            )
    compiler = os.environ.get(COMPILER, "no")
    if compiler.lower() not in ("", "no"):
        raise UserError(
            f"The launcher compiles the model with {compiler} ({COMPILER}), which would change the type of its "
            "products: set it to no, or launch without --dynamo_backend."
        )
    if device == "cuda" and _is_on(CPU):
        raise UserError(f"device is cuda, but the launcher keeps to the CPU ({CPU}): unset it, or set device to cpu.")
    chosen = os.environ.get(DEVICE)
    if chosen and device in ("cpu", "cuda") and not chosen.startswith(device):
        raise UserError(f"device is {device}, but {DEVICE} is {chosen}: unset it, or set device to auto.")


@contextmanager
def settings_decide_precision() -> Iterator[None]:
    """Within the block accelerate and transformers read no mixed precision from the environment."""
    found = os.environ.pop(PRECISION, None)
    try:
        yield
    finally:
        if found is not None:
            os.environ[PRECISION] = found


def in_bfloat16(precision: str, *, on_cpu: bool) -> bool:
    """Whether a stage multiplies matrices in bfloat16, by its setting: `auto` does on a GPU.

    Raises:
        UserError: The setting is float32, and the process was told to use TF32.
    """
    if precision == "float32" and not on_cpu and torch.get_float32_matmul_precision() != "highest":
        raise UserError(
            "precision is float32, but float32 products of this process are in TF32 "
            "(TORCH_ALLOW_TF32_CUBLAS_OVERRIDE or torch.set_float32_matmul_precision): unset it, or set precision to "
            "bfloat16."
        )
    return precision == "bfloat16" or (precision == "auto" and not on_cpu)


def check_precision(found: str, wanted: str) -> None:
    """Refuse a mixed precision that something else has chosen.

    Args:
        found: The accelerator's, such as `bf16`; `no` for none.
        wanted: What the settings amount to.

    Raises:
        UserError: They differ.
    """
    if found != wanted:
        raise UserError(
            f"accelerate computes in mixed precision {found}, but the settings of this stage amount to {wanted}: "
            f"unset {PRECISION}, and make no Accelerator of another precision in this process."
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")
