"""Turns what YAML files, flags and Python callers give for a settings field into the type that the field declares.

YAML reads ``1e-4`` as a string and ``2e7`` as well, flags are all strings, and ``none`` is how a person switches a
section off. One function settles all three, so that a value means the same wherever it was written.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from functools import cache
from os import PathLike
from typing import Any, Literal, Union

import yaml

from linearize.config.sizes import parse_tokens
from linearize.errors import UserError
from linearize.paths import user_path

NOTHING = ("none", "null", "")
TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
COUNTS_TOKENS = re.compile(r"(.*[._])?(tokens|length|window)(_.*)?")
"""Names of settings that are numbers of tokens, which may be written as 20M or 1k."""


@cache
def field_types(settings: Any) -> dict[str, Any]:
    """The resolved annotation of every field of a settings dataclass."""
    hints = typing.get_type_hints(settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}


def options(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union annotation, or the annotation alone."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def section_type(annotation: Any) -> Any:
    """The settings dataclass that an annotation names (alone or with ``None``), or ``None`` for a plain field."""
    return next((option for option in options(annotation) if dataclasses.is_dataclass(option)), None)


def convert_value(annotation: Any, value: Any, name: str) -> Any:
    """Convert ``value`` to ``annotation``.

    Args:
        annotation: The declared type of the field.
        value: What a YAML file, a flag or a caller gave.
        name: Dotted name of the field, for the message.

    Raises:
        UserError: No alternative of the annotation takes the value.
    """
    choices = options(annotation)
    if type(None) in choices and (value is None or (isinstance(value, str) and value.strip().lower() in NOTHING)):
        return None
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _convert(choice, value, name)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
    sizes = " (of tokens, such as 20M or 1k)" if int in choices and COUNTS_TOKENS.fullmatch(name) else ""
    raise UserError(f"{name} is {value!r}, but it must be {describe(annotation)}{sizes}.")


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values that a field of a few literals takes; none of another field."""
    return tuple(
        choice
        for option in options(annotation)
        if typing.get_origin(option) is Literal
        for choice in typing.get_args(option)
    )


def describe(annotation: Any) -> str:
    """How a person would name the type: ``an integer``, ``one of text, chat``, ``a list of strings or none``."""
    parts = []
    for choice in options(annotation):
        if choice is type(None):
            parts.append("none")
        elif typing.get_origin(choice) is Literal:
            parts.append("one of " + ", ".join(str(option) for option in typing.get_args(choice)))
        elif typing.get_origin(choice) is list:
            parts.append("a list of " + describe(typing.get_args(choice)[0]).split(" ", 1)[1] + "s")
        elif dataclasses.is_dataclass(choice) or choice is dict or typing.get_origin(choice) is dict:
            parts.append("a section (names with values)")
        else:
            parts.append({int: "an integer", float: "a number", bool: "a boolean", str: "a string"}[choice])
    return " or ".join(parts)


def _convert(choice: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(choice)
    if origin is Literal:
        if value not in typing.get_args(choice):
            raise ValueError
        return value
    if origin is list:
        if isinstance(value, str) and value.strip().startswith("["):
            value = yaml.safe_load(value)
        elif isinstance(value, str):
            value = [] if value.strip().lower() in NOTHING else [part.strip() for part in value.split(",")]
        elif not isinstance(value, (list, tuple)):
            value = [value]
        return [_convert(typing.get_args(choice)[0], item, name) for item in value]
    if choice is dict or origin is dict:
        value = yaml.safe_load(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise TypeError
        return dict(value)
    if dataclasses.is_dataclass(choice):
        if isinstance(value, choice):  # type: ignore[arg-type]
            return value
        return build(choice, value, name)  # type: ignore[arg-type]
    if choice is bool:
        return _to_bool(value)
    if choice is int:
        return _to_int(value, name)
    if choice is float:
        if isinstance(value, bool):
            raise TypeError
        if not math.isfinite(number := float(value)):
            raise ValueError
        return number
    if isinstance(value, (str, PathLike)):
        return user_path(value)
    raise TypeError


def _to_bool(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in TRUE + FALSE:
        return value.strip().lower() in TRUE
    if isinstance(value, bool):
        return value
    raise TypeError


def _to_int(value: Any, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str):
        if COUNTS_TOKENS.fullmatch(name) and (tokens := parse_tokens(value)) is not None:
            return tokens
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if value != int(value):
        raise ValueError
    return int(value)


def build(settings: type, values: Any, name: str = "") -> Any:
    """Build a settings dataclass from a mapping; a name that it does not have is an error that lists those it has."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{name or 'the settings'} must be a section (names with values), not {values!r}.")
    known = [field.name for field in dataclasses.fields(settings)]
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        where = f" in section {name}" if name else ""
        raise UserError(f"Unknown setting {', '.join(unknown)}{where}; known are {', '.join(known)}.")
    return settings(**values)


def convert_fields(settings: Any, section: str) -> None:
    """Convert every field of a settings object in place: the first step of each ``__post_init__``."""
    kind: Any = type(settings)
    for name, annotation in field_types(kind).items():
        dotted = f"{section}.{name}" if section else name
        setattr(settings, name, convert_value(annotation, getattr(settings, name), dotted))


def require(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)
