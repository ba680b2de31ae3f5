"""How sizes of memory, numbers of tokens and shares are written: `7MB`, `240KB/layer`, `20M`, `1k`, `10%`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from linearize.errors import UserError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
PER_LAYER = "/layer"
_UNIT = {name.lower(): size for name, size in UNITS.items()}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.IGNORECASE)
KILO = 1024
TOKENS = {"": 1, "k": KILO, "m": 10**6, "b": 10**9}
"""Units of a number of tokens: k as in lengths, which are powers of two; M and B as texts are counted."""
_TOKENS = re.compile(r"([0-9]{1,15}(?:\.[0-9]+(?=[mb]))?)([kmb]?)", re.IGNORECASE)
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class StateBudget:
    """Bytes that the states of one sequence may hold: of all layers, or of one on average."""

    size: float
    per_layer: bool

    def total(self, layers: int) -> int:
        """Bytes of so many layers together."""
        return int(self.size * layers if self.per_layer else self.size)


def parse_bytes(text: str, name: str) -> float:
    """`1.5MB` -> 1 500 000.0; powers of 1000, with an i (`MiB`) of 1024; capitals or not.

    Args:
        name: of the setting, for the message.

    Raises:
        UserError: no number with a unit.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[2].lower() not in _UNIT:
        raise UserError(f"{name} is {text!r}, but a size is a number with a unit ({', '.join(UNITS)}), such as 7MB.")
    return float(found[1]) * _UNIT[found[2].lower()]


def parse_budget(text: str, name: str = "state_budget") -> StateBudget:
    """`7MB` for the model, or `240KB/layer` for a layer on average.

    Raises:
        UserError: of another form, or nothing at all.
    """
    size, per_layer = text.strip(), text.strip().lower().endswith(PER_LAYER)
    bytes_ = parse_bytes(size[: -len(PER_LAYER)] if per_layer else size, name)
    if bytes_ < 1:
        raise UserError(f"{name} is {text!r}, but it must be at least one byte.")
    return StateBudget(bytes_, per_layer)


def parse_tokens(text: str) -> int | None:
    """`20M` -> 20 000 000, `1.5b`, `1k` -> 1024, `512` -> 512; None for what is no whole number of tokens."""
    found = _TOKENS.fullmatch(text.strip())
    tokens = Decimal(found[1]) * TOKENS[found[2].lower()] if found else None
    return int(tokens) if tokens is not None and tokens == int(tokens) else None


def parse_share(text: str) -> float | None:
    """`10%` -> 0.1; None for what is no share between 0 and 100%."""
    found = _SHARE.fullmatch(text.strip())
    return float(found[1]) / 100 if found and float(found[1]) <= 100 else None
