"""A repository on this disk and where it came from, and the directories that what is made of it may take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from linearize.errors import UserError


@dataclass(frozen=True)
class Origin:
    """Where one of the two models came from."""

    name: str
    """Hub id, or the last name of a local path."""
    on_hub: bool
    revision: str | None
    """Commit on the Hub."""


@dataclass(frozen=True)
class Source:
    """A repository that is on this disk."""

    name: str
    """As the user called it."""
    path: Path
    origin: Origin


def check_output(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse to replace what is there unless asked to."""
    path = Path(out)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not overwrite):
        raise UserError(f"{path} exists already: replace it with --overwrite, or name another directory")


def check_apart(out: str | os.PathLike[str], *sources: Source) -> None:
    """Refuse an output that replaces, holds or lies in what it is made of."""
    target = Path(out).resolve()
    for source in sources:
        path = source.path.resolve()
        if target == path or target in path.parents or path in target.parents:
            raise UserError(f"{out} overlaps with {source.name}, which is read: name another directory")
