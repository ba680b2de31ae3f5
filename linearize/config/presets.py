"""The presets that the package carries: YAML files, each with a comment that says for whom, on what, and how well."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from linearize.errors import UserError

PRESETS = Path(__file__).parents[1] / "configs"
"""The YAML files of `recipes/configs`, which the wheel carries under this name."""


@dataclass(frozen=True)
class Preset:
    """A preset and what its file says of it."""

    path: Path

    @property
    def name(self) -> str:
        """What stands for its path on the command line."""
        return self.path.stem

    @property
    def command(self) -> str:
        """The command that runs it."""
        return "glue" if "models" in self.values() else "run"

    def text(self) -> str:
        """The file."""
        return self.path.read_text(encoding="utf-8")

    def values(self) -> Mapping[str, Any]:
        """The settings, unchecked."""
        return yaml.safe_load(self.text())

    def remark(self, name: str) -> str:
        """What the comment at the top has behind `# Hardware: ` or `# Measured: `, without the full stop."""
        lines = (line for line in self.text().splitlines() if line.startswith(f"# {name}: "))
        return next(lines).partition(": ")[2].removesuffix(".")

    def model(self) -> str:
        """The models that it starts from, or the shape that it gives random weights."""
        values = self.values()
        if "models" in values:
            return ", ".join(values["models"])
        return values.get("model_name_or_path") or f"{values['architecture']['type']} from random weights"

    def mechanism(self) -> str:
        """The attention that it trains; softmax where it says none."""
        values = self.values()
        if self.command == "run" and "attention" not in values:
            return "as converted"
        attention = values.get("attention")
        return attention.get("type", "linear") if isinstance(attention, Mapping) else "softmax"


def all_presets() -> list[Preset]:
    """All of them, those of a command together."""
    return sorted((Preset(path) for path in PRESETS.glob("*.yaml")), key=lambda preset: (preset.command, preset.name))


def find_preset(name: str) -> Preset | None:
    """The preset of that name."""
    return next((preset for preset in all_presets() if preset.name == name), None)


def unknown_preset(name: str, what: str) -> UserError:
    """The error about a name that no preset has.

    Args:
        name: What was asked for.
        what: What it should have been, as a person would call it.
    """
    names = [preset.name for preset in all_presets()]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    meant = f" did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"There is no {what} {name!r}:{meant} `linearize presets` lists the presets.")
