"""Command-line flags made from the settings: one for each field, named as in YAML, with dots (`--data.split`).

`with_settings` gives a function that takes a dictionary of overrides the flags as a signature that typer reads, so
that the names, the choices and the help are written once, where the settings are.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, get_args

import typer

from linearize.cli.help import SHORTER, clause, is_main
from linearize.config.values import FALSE, NOTHING, TRUE, choices, field_types, options, section_type
from linearize.runs.settings import RunConfig

NO = "no_"
KEYWORD = inspect.Parameter.KEYWORD_ONLY
FLAGS = "flags_of_settings"
"""Where a command keeps what makes its flags."""
OWN = "parameters_of_its_own"
"""Where it keeps those that it declares."""
MAIN_FLAGS = "flags_of_the_short_help"
"""Where it keeps the names of those that its short help shows, where it has a list of its own."""
OF_THE_KIND = ("kind", "weights", "objective")
"""Settings of a stage that say what it is: flags where its class leaves a choice."""


@functools.cache
def field_help(settings: type) -> dict[str, str]:
    """The docstring under each field of a settings dataclass, its own or the one it inherits."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in settings.__bases__ if dataclasses.is_dataclass(base)]):
        texts |= field_help(base)
    body = ast.parse(textwrap.dedent(inspect.getsource(settings))).body[0].body  # type: ignore[attr-defined]
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            texts[statement.target.id] = " ".join(following.value.value.split())  # type: ignore
    return texts


def is_flag(annotation: Any) -> bool:
    """Whether a field is switched by its bare flag."""
    return bool in options(annotation)


def is_list(annotation: Any) -> bool:
    """Whether a field takes several values."""
    return any(typing.get_origin(option) is list for option in options(annotation))


def shown_default(settings: type, name: str) -> str:
    """The default as the help shows it; empty where there is none worth showing."""
    field = next(field for field in dataclasses.fields(settings) if field.name == name)
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None or isinstance(value, (bool, dict)) or dataclasses.is_dataclass(value):
        return ""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def mechanism_fields() -> dict[str, str]:
    """Setting -> help of every mechanism's configuration, for the `--attention.` flags."""
    from linearize.modeling.registry import ATTENTIONS

    texts: dict[str, str] = {"type": "The mechanism: " + ", ".join(ATTENTIONS) + "."}
    for mechanism, entry in ATTENTIONS.items():
        described = field_help(entry.config)
        for field in dataclasses.fields(entry.config):
            if field.name not in ("type", "contract"):
                text = described.get(field.name, f"Setting of {mechanism} attention.")
                texts.setdefault(field.name, f"{text} [default: {field.default}]")
    return texts


def _parameter(name: str, annotation: Any, help_text: str, default: str, panel: str) -> inspect.Parameter:
    identifier = name.replace(".", "__dot__")
    section, _, key = name.rpartition(".")
    prefix = f"{section}." if section else ""
    kind: Any
    if is_flag(annotation):
        declaration, kind = f"--{name}/--{prefix}{NO}{key}", bool | None
    else:
        declaration, kind = f"--{name}", list[str] | None if is_list(annotation) else str | None
    allowed = choices(annotation)
    listed = not allowed or len(allowed) > 6 or all(choice in help_text for choice in allowed)
    shown = help_text + ("" if listed else f" One of {', '.join(allowed)}.")
    shown += f" [default: {default}]" if default else ""
    option = typer.Option(
        None,
        declaration,
        help=shown,
        rich_help_panel=panel,
        show_default=False,
    )
    return inspect.Parameter(identifier, KEYWORD, default=option, annotation=kind)


def stage_parameters(stages: Mapping[str, type], values: Mapping[str, Any]) -> list[inspect.Parameter]:
    """One typer parameter for each setting of each stage, and one that leaves the stage out.

    Args:
        stages: Name -> class of its settings.
        values: Name -> what the config gives of them, which the help shows as defaults.
    """
    parameters = []
    for name, kind in stages.items():
        help_text = f"none leaves stage {name} out."
        parameters.append(_parameter(name, dict[str, Any] | None, help_text, "", name))
        parameters += [
            _parameter(f"{name}.{key}", inner, field_help(kind)[key], _stage_default(kind, key, values[name]), name)
            for key, inner in field_types(kind).items()
            if key not in OF_THE_KIND or len(choices(inner)) > 1
        ]
    return parameters


def _stage_default(kind: type, key: str, given: Mapping[str, Any]) -> str:
    """What a setting of a stage is without its flag; a length has no default."""
    if key in given:
        value = given[key]
        return ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    return "" if key == "tokens" else shown_default(kind, key)


def setting_parameters(names: Sequence[str], settings: type, mechanisms: bool = True) -> list[inspect.Parameter]:
    """One typer parameter for each field of the named sections and top-level settings.

    Args:
        names: Of the settings.
        settings: The class that has them.
        mechanisms: With the settings of every mechanism, for which the models are imported.
    """
    parameters = []
    for name in names:
        annotation = field_types(settings)[name]
        section = section_type(annotation)
        if section is None or type(None) in options(
            annotation
        ):  # of a section only "none", which switches it off, is a value
            parameters.append(
                _parameter(name, annotation, field_help(settings)[name], shown_default(settings, name), "run")
            )
        if section is not None:
            parameters += [
                _parameter(f"{name}.{key}", inner, field_help(section)[key], shown_default(section, key), name)
                for key, inner in field_types(section).items()
            ]
        if name == "attention" and mechanisms:
            parameters += [
                _parameter(f"attention.{key}", str, text, "", "attention") for key, text in mechanism_fields().items()
            ]
    return parameters


def with_settings(
    *names: str, settings: type = RunConfig, stages: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of the named settings (a section's name brings all its fields).

    The command must take a keyword `overrides`: dotted name -> value for every flag that was given. Its signature has
    the flags after `complete`, which imports the models for those of `attention`: only the command that is called
    needs them.

    Args:
        names: Of the settings.
        settings: The class that has them.
        stages: Whether the stages of the run that is asked for have flags too.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "overrides"
        ]
        taken = {parameter.name for parameter in own}

        @functools.wraps(command)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = {key.replace("__dot__", "."): kwargs.pop(key) for key in list(kwargs) if key not in taken}
            overrides = {name: _value(name, value) for name, value in given.items() if value not in (None, [])}
            return command(*args, overrides=overrides, **kwargs)

        _sign(call, own)
        vars(call)[OWN] = own
        vars(call)[FLAGS] = lambda kinds, values, mechanisms: [
            *setting_parameters(names, settings, mechanisms),
            *(stage_parameters(kinds, values) if stages else ()),
        ]
        return call

    return decorate


def with_options(kind: type, main: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command a flag for each field of a dataclass, as its annotation says (`Annotated[..., typer.Option()]`).

    The command must take a keyword `options`: a value of the dataclass. Its own parameters keep their flags.

    Args:
        kind: The dataclass.
        main: Fields of the short help.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        taken = inspect.signature(command, eval_str=True).parameters.values()
        own = [parameter for parameter in taken if parameter.name != "options"]
        hints = typing.get_type_hints(kind, include_extras=True)
        fields = dataclasses.fields(kind)

        def flags() -> list[inspect.Parameter]:
            kinds = {name: Annotated[get_args(hint)[0], copy.copy(get_args(hint)[1])] for name, hint in hints.items()}
            return [inspect.Parameter(f.name, KEYWORD, default=f.default, annotation=kinds[f.name]) for f in fields]

        @functools.wraps(command)
        def call(*args: Any, **kwargs: Any) -> Any:
            options = kind(**{field.name: kwargs.pop(field.name) for field in fields})
            return command(*args, options=options, **kwargs)

        _sign(call, [*own, *flags()])
        vars(call).update({OWN: own, MAIN_FLAGS: main, FLAGS: lambda *_: flags()})
        return call

    return decorate


def complete(
    command: Callable[..., Any], stages: Mapping[str, type], values: Mapping[str, Any], *, short: bool = False
) -> None:
    """Give a command's signature the flags that `with_settings` has for it.

    Args:
        stages: Those of the run that is asked for: name -> class of its settings.
        values: Name -> what its config gives of them.
        short: For a help of one screen: its main flags show, and nothing is imported for the others.
    """
    flags = vars(command).get(FLAGS)
    if flags is None:
        return
    parameters = flags(stages, values, not short)
    own = {parameter.name for parameter in vars(command)[OWN]}
    chosen = vars(command).get(MAIN_FLAGS)
    for parameter in parameters if short else ():
        name = parameter.name.replace("__dot__", ".")
        option = parameter.default if chosen is None else get_args(parameter.annotation)[1]
        shown = is_main(name, stages) and SHORTER.get(name) not in own if chosen is None else name in chosen
        option.hidden, option.help = not shown, clause(option.help)
    _sign(command, [*vars(command)[OWN], *parameters])


def _sign(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> None:
    """Set the signature that typer reads."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _value(name: str, value: Any) -> Any:
    """What a flag gave, as YAML would have given it."""
    import yaml

    if name.startswith("attention."):
        return yaml.safe_load(value)
    if name == "attention" and isinstance(value, str) and not value.strip().startswith("{"):
        return value if value.strip().lower() in NOTHING else {"type": value}
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def normalise(argv: Sequence[str], names: Mapping[str, Any]) -> list[str]:
    """Write `--overwrite true` and `--overwrite=false` as `--overwrite` and `--no_overwrite`: both styles are in
    common use.

    Args:
        argv: The words.
        names: Dotted name of each setting -> its annotation.
    """
    switches = {f"--{name}" for name, annotation in names.items() if is_flag(annotation)}
    result: list[str] = []
    for word in argv:
        flag, _, value = word.partition("=")
        flag = underscored(flag)
        if flag in switches and value.lower() in TRUE + FALSE and value:
            result.append(flag if value.lower() in TRUE else _negated(flag))
        elif result and underscored(result[-1]) in switches and word.lower() in TRUE[:3] + FALSE[:3]:
            result[-1] = result[-1] if word.lower() in TRUE else _negated(underscored(result[-1]))
        else:
            result.append(word)
    return result


def underscored(flag: str) -> str:
    """A flag as it is declared: `--dry-run` is `--dry_run`."""
    return "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag.replace("-", "_")


def _negated(flag: str) -> str:
    section, dot, key = flag[2:].rpartition(".")
    return f"--{section}{dot}{NO}{key}"
