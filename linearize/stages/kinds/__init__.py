"""The kinds of stage that a run is made of: settings, what each does, and what it adds to the record.

calibrate.py          numbers of the mechanism fitted, no gradients
transfer.py           attention transfer, layer by layer
adapt.py              another setting of the same mechanism, by statistics
train_lora.py         of kind train: a LoRA
train_all.py          all weights or the mechanism, by the model's own loss
train_embeddings.py   an encoder's, by the teacher's embeddings
base.py               what all of them are

A new kind: a file with a subclass of `Stage`, and its name here. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from linearize.config.values import choices, field_types, require
from linearize.errors import UserError
from linearize.stages.kinds.adapt import Adapt
from linearize.stages.kinds.base import Stage
from linearize.stages.kinds.calibrate import Calibrate
from linearize.stages.kinds.train_all import TrainAll
from linearize.stages.kinds.train_embeddings import TrainEmbeddings
from linearize.stages.kinds.train_lora import TrainLora
from linearize.stages.kinds.transfer import Transfer

KINDS: tuple[type[Stage], ...] = (Calibrate, Transfer, Adapt, TrainLora, TrainAll, TrainEmbeddings)
SELECTORS = ("kind", "weights", "objective")
"""Settings by which the class is found, in this order."""


def _choices(kind: type[Stage], name: str) -> tuple[str, ...]:
    """Values of a selector that a class takes; none where its settings have no such field."""
    annotation = field_types(kind.settings).get(name)
    return choices(annotation) if annotation is not None else ()


def find_kind(values: Mapping[str, Any]) -> type[Stage] | None:
    """The class of a stage with these settings; None where there is none."""
    given = {name: values[name] for name in SELECTORS if values.get(name) is not None}
    fitting = [kind for kind in KINDS if all(asked in _choices(kind, name) for name, asked in given.items())]
    for name, usual in DEFAULTS.items():
        if name not in given:
            fitting = [kind for kind in fitting if _default(kind, name) == usual] or fitting
    return fitting[0] if fitting and values.get("kind") is not None else None


DEFAULTS = {"weights": "lora", "objective": "next_token"}
"""What a stage of kind train does where it does not say."""


def _default(kind: type[Stage], name: str) -> Any:
    found = [item for item in dataclasses.fields(kind.settings) if item.name == name]
    return found[0].default if found else None


def settings_type(values: Mapping[str, Any]) -> Any:
    """The dataclass of a stage's settings; None where no kind fits."""
    kind = find_kind(values)
    return None if kind is None else kind.settings


def make_settings(name: str, values: Any) -> Any:
    """Settings of a stage, which its messages call by its name.

    Args:
        name: Of the stage.
        values: A mapping, or settings that are made already.

    Raises:
        UserError: No such kind, a setting that it does not have, or a value that it cannot take.
    """
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        if getattr(values, "section", None) == name:
            return values
        values = dataclasses.asdict(values)
    require(isinstance(values, Mapping), f"stages.{name} must be a section (names with values), not {values!r}.")
    kind = find_kind(values)
    if kind is None:
        raise UserError(_unknown(name, values))
    known = [item.name for item in dataclasses.fields(kind.settings)]
    unknown = [str(key) for key in values if key not in known]
    require(not unknown, f"Unknown setting {', '.join(unknown)} in stage {name}; known are {', '.join(known)}.")
    settings = kind.settings.__new__(kind.settings)
    settings.section = name
    settings.__init__(**values)
    if kind.trains and values.get("tokens") is None and values.get("max_steps") is None:
        raise UserError(
            f"Stage {name} does not say how long it trains: give {name}.tokens, such as 20M, or {name}.max_steps, or "
            "take a preset (`linearize presets`)."
        )
    return settings


def make_stage(name: str, settings: Any) -> Stage:
    """The stage of these settings."""
    kind = next(kind for kind in KINDS if type(settings) is kind.settings)
    return kind(name, settings)


def _unknown(name: str, values: Mapping[str, Any]) -> str:
    kinds = list(dict.fromkeys(choice for kind in KINDS for choice in _choices(kind, "kind")))
    given = values.get("kind")
    if given not in kinds:
        what = "has no kind" if given is None else f"is of kind {given!r}"
        return f"Stage {name} {what}; known are {', '.join(kinds)}."
    of_kind = [kind for kind in KINDS if given in _choices(kind, "kind")]
    shown = "; ".join(
        ", ".join(f"{key} {' or '.join(_choices(kind, key))}" for key in SELECTORS[1:] if _choices(kind, key))
        for kind in of_kind
    )
    if not shown:
        extra = " and ".join(key for key in SELECTORS[1:] if values.get(key) is not None)
        return f"Stage {name} is of kind {given}, which has no {extra}: leave it out."
    asked = ", ".join(f"{key} {values[key]}" for key in SELECTORS[1:] if values.get(key) is not None)
    return f"Stage {name} is of kind {given} with {asked}; there is {shown}."
