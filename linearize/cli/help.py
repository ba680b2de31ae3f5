"""The help of a command: one screen with its examples and main flags, or with `--help-all` every setting.

Plain text, whose names are never cut, however narrow the terminal.
"""

from __future__ import annotations

import re
import textwrap
from itertools import groupby
from typing import Any

from typer.core import TyperCommand

ALL = "--help-all"
MAIN = (
    *("model_name_or_path", "revision", "output_dir", "resume_from_checkpoint", "overwrite", "device"),
    *("load_in_4bit", "attention", "softmax_layers", "state_budget", "push_to_hub"),
    *("data.dataset", "data.sequence_length", "models", "tasks", "seeds"),
)
"""Settings of the short help, beside those of a stage."""
SHORTER = {"model_name_or_path": "model", "data.dataset": "data"}
"""Setting -> the command's own parameter that says the same."""
VALUE = "VALUE"
NAME_COLUMN = 30
"""Characters of a name that has its meaning beside it."""
ABBREVIATED = ("e.g", "i.e")
ASIDE = re.compile(r" \([^()]*\)")
OF_A_STAGE = ("tokens", "sequences", "learning_rate")
"""Settings of a stage in the short help."""


def is_main(name: str, stages: Any) -> bool:
    """Whether a flag is in the short help.

    Args:
        name: Dotted, of the setting.
        stages: Names of the stages.
    """
    section, _, key = name.partition(".")
    return name in MAIN or (section in stages and key in OF_A_STAGE)


def clause(text: str) -> str:
    """The first clause of a setting's help without its asides, with its default, which the short help shows."""
    body, bracket, default = text.partition(" [default: ")
    body = ASIDE.sub("", body)
    depth, end = 0, len(body)
    for place, (sign, following) in enumerate(zip(body, [*body[1:], " "], strict=True)):
        depth += (sign in "([") - (sign in ")]")
        if depth == 0 and sign in ".;:" and following == " " and body[:place].rpartition(" ")[2] not in ABBREVIATED:
            end = place
            break
    return body[:end] + "." + bracket + default


class Command(TyperCommand):
    """A command whose flags are listed by section, without a frame."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments by their names, those that may be left out in brackets."""
        arguments = [parameter for parameter in self.get_params(ctx) if parameter.param_type_name == "argument"]
        named = [(_argument(argument), argument.required) for argument in arguments]
        return ["[OPTIONS]", *(name if required else f"[{name}]" for name, required in named)]

    def format_options(self, context: Any, formatter: Any) -> None:
        """Write the arguments, then the flags of each section."""
        shown = [(parameter, parameter.get_help_record(context)) for parameter in self.get_params(context)]
        records = [
            (_panel(parameter), (self._names(parameter, record[0]), record[1].replace("[required]", "")))
            for parameter, record in shown
            if record is not None
        ]
        order = list(dict.fromkeys(panel for panel, _ in records))
        records.sort(key=lambda pair: order.index(pair[0]))
        for panel, group in groupby(records, key=lambda pair: pair[0]):
            with formatter.section(panel):
                _write_rows(formatter, [record for _, record in group])
        if self.hides:
            formatter.write_paragraph()
            formatter.write_text(f"All settings: {context.command_path} {ALL}")

    def _names(self, parameter: Any, named: str) -> str:
        """A parameter as the help names it; the short help leaves out how a switch is turned off.

        Args:
            named: As typer names it.
        """
        if parameter.param_type_name == "argument":
            return _argument(parameter)
        if parameter.is_flag:
            return named.partition(" / ")[0] if self.hides else named
        return f"{', '.join(parameter.opts)} {VALUE}"

    @property
    def hides(self) -> bool:
        """Whether the short help leaves flags out."""
        return any(getattr(parameter, "hidden", False) for parameter in self.params)


def _write_rows(formatter: Any, rows: list[tuple[str, str]]) -> None:
    """Names and what they mean in two columns; unlike typer's, a name with hyphens stays on its line."""
    column = max((len(name) for name, _ in rows if len(name) <= NAME_COLUMN), default=NAME_COLUMN) + 2
    margin, indent = " " * formatter.current_indent, " " * (formatter.current_indent + column)
    wrapper = textwrap.TextWrapper(formatter.width - len(indent), break_on_hyphens=False, break_long_words=False)
    for name, text in rows:
        lines = wrapper.wrap(" ".join(text.split()))
        first = name.ljust(column) + lines.pop(0) if lines and len(name) <= NAME_COLUMN else name
        formatter.write("".join(f"{line}\n" for line in (margin + first, *(indent + line for line in lines))))


def _argument(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _panel(parameter: Any) -> str:
    """The section that a parameter is listed in."""
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or "Options"
