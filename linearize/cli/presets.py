"""`linearize presets`: what the package carries, and for whom."""

from __future__ import annotations

import shutil
import textwrap
from itertools import groupby
from typing import Annotated

import typer

from linearize.config.presets import Preset, all_presets, find_preset, unknown_preset
from linearize.failures import command

INDENT = " " * 4


@command
def presets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this one, as a file to start from.")
    ] = None,
) -> None:
    """List the shipped presets, or print one.

    Model, mechanism, hardware and time, and whether each is measured.
    """
    if name is None:
        print("\n".join(_listing()))
        return
    preset = find_preset(name)
    if preset is None:
        raise unknown_preset(name, "preset")
    print(preset.text(), end="")


def _listing() -> list[str]:
    """The lines of the list; no name is cut, however narrow the terminal."""
    width = max(60, shutil.get_terminal_size().columns)
    lines = []
    for name, group in groupby(all_presets(), key=lambda preset: preset.command):
        lines.append(f"linearize {name}")
        for preset in group:
            lines += _entry(preset, width)
        lines.append("")
    return [
        *lines,
        "Print one: linearize presets NAME",
        "Run one:   linearize run NAME --data.dataset FILE --output_dir DIR",
    ]


def _entry(preset: Preset, width: int) -> list[str]:
    facts = [f"{preset.model()}, {preset.mechanism()}"]
    facts += [f"{name.lower()}: {preset.remark(name)}" for name in ("Hardware", "Measured")]
    lines = [f"  {preset.name}"]
    for fact in facts:
        lines += textwrap.wrap(
            fact, width, initial_indent=INDENT, subsequent_indent=INDENT + "  ", break_on_hyphens=False
        )
    return lines
