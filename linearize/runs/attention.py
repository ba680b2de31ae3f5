"""The attention that a run's settings ask for: completed with every default, and checked against the model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from linearize.config.record import is_converted
from linearize.errors import UserError
from linearize.hardware.shape import Shape

if TYPE_CHECKING:
    from linearize.runs.settings import RunConfig


def complete(config: RunConfig) -> RunConfig:
    """The settings with every setting of the mechanism, checked, and the branch that attention transfer trains, so
    that `config.yaml` says what later defaults would change.

    Raises:
        UserError: unknown mechanism, unknown setting, or a value that it cannot take.
    """
    from linearize.stages.transfer import with_branch

    if config.mixers is not None:
        completed: dict[str, Any] = {"mixers": complete_mixers(config.mixers)}
        given = list(completed["mixers"].values())
    elif config.attention is not None:
        completed = {"attention": complete_mixer(config.attention)}
        given = [completed["attention"]]
    else:
        completed, given = {}, []
    if any(stage.kind == "transfer" and stage.branch is None for stage in config.stages.values()):
        mixers = _mixers_there(config) or given
        completed["stages"] = {
            name: with_branch(stage, mixers) if stage.kind == "transfer" else stage
            for name, stage in config.stages.items()
        }
    return dataclasses.replace(config, **completed)


def complete_mixers(mixers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same of the settings of mechanisms by name."""
    completed = {}
    for name, given in mixers.items():
        if not isinstance(given, dict) or "type" not in given:
            raise UserError(f"mixers.{name} must be a section with the type of a mechanism, not {given!r}.")
        completed[name] = complete_mixer(given, f"mixers.{name}")
    return completed


def _mixers_there(config: Any) -> list[dict[str, Any]]:
    """The settings of the mechanisms of the model that a run starts from, where it is a converted one."""
    source = config.model_name_or_path
    if source is None or (os.path.exists(source) and not is_converted(source)):
        return []
    with contextlib.suppress(UserError):  # the run says so where it needs the model
        return mixers_of(read_model(config))
    return []


def mixers_of(model: Any) -> list[dict[str, Any]]:
    """The settings of a converted model's mechanisms, from its config; none of another model."""
    return [dict(mixer) for mixer in getattr(model, "mixers", {}).values()]


def complete_mixer(settings: Mapping[str, Any], section: str = "attention") -> dict[str, Any]:
    """The same of the settings of one mechanism, `section` in messages."""
    from linearize.modeling.registry import mechanism

    with _one_sentence(section):
        typed_config: Any = mechanism(settings["type"]).config
        unknown = [name for name in settings if name not in typed_config.__dataclass_fields__]
        if unknown:
            known = ", ".join(typed_config.__dataclass_fields__)
            raise UserError(f"Unknown setting {section}.{unknown[0]}; known are {known}.")
        return dataclasses.asdict(typed_config(**settings))


@contextlib.contextmanager
def _one_sentence(subject: str) -> Iterator[None]:
    """Turn what a typed config raises into a sentence; @strict wraps it in errors of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"{subject}: {' '.join(str(cause).split())}") from error


def check_attention(config: RunConfig, teacher: Any) -> None:
    """Check the mechanism against the teacher before data and weights take their time."""
    from linearize.conversion.students import student_config
    from linearize.modeling import BACKBONES
    from linearize.modeling.registry import mechanism

    if teacher.model_type not in BACKBONES:
        raise UserError(
            f"{config.model_name_or_path} is a {teacher.model_type} model, which cannot be converted; known are "
            f"{', '.join(BACKBONES)}."
        )
    shape = Shape.of(teacher)
    if shape.heads % shape.key_heads:
        raise UserError(
            f"{config.model_name_or_path} has {shape.heads} attention heads that do not divide among "
            f"{shape.key_heads} key/value heads."
        )
    for settings in config.mechanisms:
        with _one_sentence("attention"):
            mechanism(settings["type"]).config(**settings).resolve(shape.head_dim)
    kept = config.softmax_layers if isinstance(config.softmax_layers, list) else []
    for index in kept:
        if not -shape.layers <= index < shape.layers:
            raise UserError(f"softmax_layers names layer {index}, but the teacher has layers 0 to {shape.layers - 1}.")
    kind = BACKBONES[teacher.model_type].config
    layers = (config.attention, config.mixer_types, config.mixers, kept)
    student_config(teacher, kind, *layers, config.sliding_window)


def read_model(config: RunConfig) -> Any:
    """The config of the model that a run starts from.

    Raises:
        UserError: it cannot be read, transformers knows no such architecture, or its weights are quantised.
    """
    from linearize.conversion.quantization import refuse_quantized
    from linearize.conversion.students import load_config
    from linearize.modeling import BACKBONES

    try:
        teacher = load_config(config.source, revision=config.revision)
    except UserError:
        raise
    except ValueError as error:
        known = ", ".join(BACKBONES)
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{config.model_name_or_path} cannot be converted: {reason} Known are {known}.") from error
    refuse_quantized(config.source, teacher)
    return teacher
