"""Settings as YAML files: the shipped presets, a person's own file, and the resolved `config.yaml` of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import yaml

from linearize.config.presets import find_preset, unknown_preset
from linearize.config.settings import RunSettings
from linearize.config.values import NOTHING, build, field_types, section_type
from linearize.errors import UserError
from linearize.paths import user_path

Settings = TypeVar("Settings", bound=RunSettings)

OF_ITS_DATASET = ("dataset_config", "split", "revision", "validation")
"""Settings of section data that mean something for one dataset alone."""


def find_config(path_or_preset: str | PathLike[str]) -> Path:
    """The YAML file that a path or the bare name of a shipped preset stands for."""
    path = Path(user_path(path_or_preset))
    if path.is_file():
        return path
    preset = find_preset(str(path_or_preset))
    if preset is None:
        raise unknown_preset(str(path_or_preset), "YAML file or preset")
    return preset.path


def read_values(path_or_preset: str | PathLike[str]) -> dict[str, Any]:
    """The settings that a preset or a YAML file gives, unchecked."""
    return read_mapping(find_config(path_or_preset))


def read_mapping(path: Path) -> dict[str, Any]:
    """The names and values of a YAML file; none of an empty one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a valid YAML file: {' '.join(str(error).split())}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold settings as names with values, but it holds a {type(values).__name__}.")
    return values


def merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `overrides` (dotted names, as the flags give them) over nested `values`; `values` stay untouched.

    A section that is switched off (`transfer: none`) comes back with its defaults when one of its fields is set.
    """
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        if not key:
            merged[section] = value
            continue
        inside = merged.get(section)
        if inside is None or (isinstance(inside, str) and inside.lower() in NOTHING):
            inside = merged[section] = {}
        if not isinstance(inside, dict):
            raise UserError(f"{section} must be a section (names with values), not {inside!r}.")
        inside[key] = value
    return merged


def left_behind(values: Mapping[str, Any], overrides: Mapping[str, Any], settings: type) -> list[str]:
    """Settings of section data that a config has for its own dataset, where the overrides name another one.

    What is a default, what the overrides give too, and validation text in a file of its own stay.

    Args:
        values: Of the config.
        overrides: Dotted names, as the flags give them.
        settings: The kind of settings.
    """
    data, dataset = values.get("data"), overrides.get("data.dataset")
    if dataset is None or not isinstance(data, Mapping) or data.get("dataset") in (None, dataset):
        return []
    kind: Any = settings  # as field_types, which is cached, takes it
    section: Any = section_type(field_types(kind)["data"])
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    return [
        name
        for name in OF_ITS_DATASET
        if name in defaults
        and data.get(name, defaults[name]) != defaults[name]
        and f"data.{name}" not in overrides
        and not (name == "validation" and _is_file(str(data[name])))
    ]


def _is_file(validation: str) -> bool:
    """Whether validation text is named by the path of a file, not by a split."""
    return "/" in validation or bool(Path(validation.removesuffix(".gz")).suffix)


def resolve(
    config: Settings | Mapping[str, Any] | str | PathLike[str] | None,
    overrides: Mapping[str, Any] | None = None,
    *,
    settings: type[Settings],
) -> Settings:
    """Settings from a path, a preset's name, a mapping or settings, with `overrides` (dotted names) laid over them.

    Another dataset does not take over what the config says of its own one (`left_behind`).

    Args:
        config: None for the defaults.
        overrides: As the flags give them.
        settings: The kind of settings to make.
    """
    if isinstance(config, RunSettings):
        config = to_values(config)
    values: Mapping[str, Any] = (
        {} if config is None else config if isinstance(config, Mapping) else read_values(config)
    )
    dropped = left_behind(values, overrides or {}, settings)
    if dropped:
        values = {**values, "data": {key: value for key, value in values["data"].items() if key not in dropped}}
    return build(settings, merge(values, overrides or {}))


def to_values(settings: Any) -> dict[str, Any]:
    """Settings as plain nested values, for YAML or JSON."""
    return dataclasses.asdict(settings)


def write_config(config: RunSettings, path: str | PathLike[str]) -> None:
    """Write every setting, defaults included, so that a later default never changes what this run was."""
    from linearize.files import write_file

    text = yaml.safe_dump(to_values(config), sort_keys=False, allow_unicode=True, width=119)
    write_file(path, text.encode("utf-8"))


def flat_names(settings: type) -> dict[str, Any]:
    """Dotted name -> annotation of every plain field, sections' fields included."""
    names: dict[str, Any] = {}
    for name, annotation in field_types(settings).items():
        section = section_type(annotation)
        names[name] = annotation
        if section is not None:
            names |= {f"{name}.{key}": inner for key, inner in field_types(section).items()}
    return names


def _stage_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The same of the settings of stages, each named by its stage alone; `stages` where their order differs."""
    common = [name for name in first if name in second]
    found = [] if common == [name for name in second if name in first] else ["stages"]
    for name in {**first, **second}:
        if name in common:
            values, others = first[name], second[name]
            found += [f"{name}.{key}" for key in {**values, **others} if values.get(key) != others.get(key)]
        else:
            found.append(name)
    return found


def differences(old: RunSettings, new: RunSettings) -> list[str]:
    """Dotted names of the settings whose values differ."""
    first, second = to_values(old), to_values(new)
    found = []
    for name, value in first.items():
        other = second[name]
        if name == "stages":
            found += _stage_differences(value, other)
        elif isinstance(value, dict) and isinstance(other, dict):
            found += [f"{name}.{key}" for key in {**value, **other} if value.get(key) != other.get(key)]
        elif value != other:
            found.append(name)
    return found
