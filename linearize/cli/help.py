"""The help of a command: one screen with its examples and main flags, or with `--help-all` every setting.

Plain text, whose names are never cut, however narrow the terminal.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from typer.core import TyperCommand

ALL = "--help-all"
MAIN = (
    *("model_name_or_path", "revision", "output_dir", "resume_from_checkpoint", "overwrite", "seed"),
    *("dtype", "device", "load_in_4bit", "attention", "softmax_layers", "state_budget", "yardstick", "push_to_hub"),
    *("data.dataset", "data.sequence_length", "models", "tasks", "seeds"),
)
"""Settings of the short help, beside those of a stage."""
ABBREVIATED = ("e.g", "i.e")
OF_A_STAGE = ("tokens", "max_steps", "learning_rate", "batch_size", "sequences")
"""Settings of a stage in the short help."""


def is_main(name: str, stages: Any) -> bool:
    """Whether a flag is in the short help.

    Args:
        name: Dotted, of the setting.
        stages: Names of the stages.
    """
    section, _, key = name.partition(".")
    return name in MAIN or (section in stages and (not key or key in OF_A_STAGE))


def clause(text: str) -> str:
    """The first clause of a setting's help, with its default, which the short help shows."""
    body, bracket, default = text.partition(" [default: ")
    depth, end = 0, len(body)
    for place, (sign, following) in enumerate(zip(body, [*body[1:], " "], strict=True)):
        depth += (sign in "([") - (sign in ")]")
        if depth == 0 and sign in ".;:" and following == " " and body[:place].rpartition(" ")[2] not in ABBREVIATED:
            end = place
            break
    return body[:end] + "." + bracket + default


class Command(TyperCommand):
    """A command whose flags are listed by section, without a frame."""

    def format_options(self, context: Any, formatter: Any) -> None:
        """Write the arguments, then the flags of each section."""
        shown = [(parameter, parameter.get_help_record(context)) for parameter in self.get_params(context)]
        records = [(_panel(parameter), record) for parameter, record in shown if record is not None]
        order = list(dict.fromkeys(panel for panel, _ in records))
        records.sort(key=lambda pair: order.index(pair[0]))
        for panel, group in groupby(records, key=lambda pair: pair[0]):
            with formatter.section(panel):
                formatter.write_dl([record for _, record in group])
        if self.hides:
            formatter.write_paragraph()
            formatter.write_text(f"All settings: {context.command_path} {ALL}")

    @property
    def hides(self) -> bool:
        """Whether the short help leaves flags out."""
        return any(getattr(parameter, "hidden", False) for parameter in self.params)


def _panel(parameter: Any) -> str:
    """The section that a parameter is listed in."""
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or "Options"
