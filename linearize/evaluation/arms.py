"""Run a model for measurement: eval mode, no gradients, one arm, adapters on or off.

A student is any model with `use_arm` (duck typing: a checkpoint's own copy of the code and the package define
different classes of one name); everything else is a stock model, which has only the teacher's attention.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from linearize.errors import UserError

ARMS = ("mixed", "teacher", "softmax", "linear")


def unwrap(model: Any) -> Any:
    """The transformers model inside a peft wrapper; adapters stay in place and active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_student(model: Any) -> bool:
    return hasattr(unwrap(model), "use_arm")


def adapters_off(model: Any) -> contextlib.AbstractContextManager:
    """Switch LoRA and the trained copies of modules off; nothing to do on a model without adapters."""
    return model.disable_adapter() if hasattr(model, "get_base_model") else contextlib.nullcontext()


@contextlib.contextmanager
def measuring(model: Any, arm: str | None) -> Iterator[Any]:
    """Yield the unwrapped model, ready to be measured in one arm.

    Args:
        model: student, stock model, or peft wrapper of either.
        arm: one of `ARMS`; None or "teacher" for a stock model.

    Raises:
        UserError: a stock model is asked for an arm that it does not have.
    """
    base = unwrap(model)
    if arm is not None and arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: use one of {', '.join(ARMS)}")
    if not is_student(model) and arm not in (None, "teacher"):
        raise UserError(
            f"The arm {arm!r} needs a converted model, and {type(base).__name__} is a stock one: convert it first, "
            "or measure it with arm 'teacher'."
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), base.use_arm(arm) if is_student(model) and arm else contextlib.nullcontext():
            yield base
    finally:
        model.train(was_training)


def input_device(base: Any) -> torch.device:
    """Where the token ids go: the device of the input embeddings, also under a device map."""
    return base.get_input_embeddings().weight.device
