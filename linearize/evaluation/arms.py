"""Run a model for measurement: eval mode, no gradients, outside mixed precision, one arm, adapters on or off.

A student is any model with `use_arm` (duck typing: a checkpoint's own copy of the code and the package define
different classes of one name); everything else is a stock model, which has only the teacher's attention.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from linearize.errors import UserError
from linearize.training.mixed_precision import outside_mixed_precision

ARMS = ("mixed", "teacher", "softmax", "linear")
TEACHER = "teacher"
OWN_WEIGHTS = "its weights with softmax attention"
STUDENT = "student"
CONVERTED = "student after conversion"
SOFTMAX_ARM = "student, softmax arm alone"
LINEAR_ARM = "student, linear arm alone"
ROW_NAMES = {"mixed": STUDENT, "softmax": SOFTMAX_ARM, "linear": LINEAR_ARM}
"""Arm -> what a report calls it."""


def unwrap(model: Any) -> Any:
    """The transformers model inside a peft wrapper; adapters stay in place and active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_student(model: Any) -> bool:
    return hasattr(unwrap(model), "use_arm")


def arms_of(model: Any) -> tuple[str, ...]:
    """The arms that can be measured: a stock model has only the teacher's."""
    return tuple(unwrap(model).arms()) if is_student(model) else ("teacher",)


def has_branches(model: Any) -> bool:
    """Whether every converted layer mixes a softmax window and a linear branch, each of which can run alone."""
    return {"softmax", "linear"} <= set(arms_of(model))


def gain_cell_layers(model: Any, purpose: str) -> dict[int, Any]:
    """Layer index -> mechanism of the layers that are made of gain cells.

    Args:
        model: any model; of a peft wrapper the adapters must be merged, for it hides the mechanisms behind its own.
        purpose: what they are needed for, the subject of the error's sentence.

    Raises:
        UserError: there is no such layer.
    """
    layers = {}
    if is_student(model) and unwrap(model) is model:
        for attention in model.mixer_attentions():
            if model.config.mixer(attention.layer_idx).type == "gain_cell":
                layers[attention.layer_idx] = attention.mixer
    if not layers:
        raise UserError(
            f"{purpose} needs a model with gain-cell layers, and this one has none: make one with "
            "`linearize convert MODEL OUT --attention.type gain_cell`."
        )
    return layers


def adapters_off(model: Any) -> contextlib.AbstractContextManager:
    """Switch LoRA and the trained copies of modules off; nothing to do on a model without adapters."""
    return model.disable_adapter() if hasattr(model, "get_base_model") else contextlib.nullcontext()


@contextlib.contextmanager
def measuring(model: Any, arm: str | None) -> Iterator[Any]:
    """Yield the unwrapped model, ready to be measured in one arm, in the type of its weights.

    Args:
        model: student, stock model, or peft wrapper of either.
        arm: one of `ARMS`; None or "teacher" for a stock model.

    Raises:
        UserError: the model does not have the arm.
    """
    base = unwrap(model)
    if arm is not None and arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: use one of {', '.join(ARMS)}")
    if not is_student(model) and arm not in (None, "teacher"):
        raise UserError(
            f"The arm {arm!r} needs a converted model, and {type(base).__name__} is a stock one: convert it first, "
            "or measure it with arm 'teacher'."
        )
    if is_student(model) and arm is not None and arm not in (known := base.arms()):
        raise UserError(f"This model's attention has no arm {arm!r}: measure one of {', '.join(known)}.")
    was_training = model.training
    model.eval()
    try:
        chosen = base.use_arm(arm) if is_student(model) and arm else contextlib.nullcontext()
        with torch.no_grad(), outside_mixed_precision(base), chosen:
            yield base
    finally:
        model.train(was_training)


def context_tokens(config: Any, arm: str | None = None) -> int | None:
    """Tokens of a text that a model was made for; None where its config names no context.

    Where positions are learned, landmarks take some of them (but not in the teacher arm); computed ones go on.
    """
    longest = None if arm == "teacher" else getattr(config, "longest_text", None)
    return getattr(config, "max_position_embeddings", None) if longest is None else longest


def input_device(base: Any) -> torch.device:
    """Where the token ids go: the device of the input embeddings, also under a device map."""
    return base.get_input_embeddings().weight.device
