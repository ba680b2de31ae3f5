"""What a run measures to place windows and softmax layers, and which layers keep softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from linearize.config.sizes import parse_share
from linearize.settings_values import convert_fields, require

Ranking = Literal["divergence", "error"]


@dataclass
class SelectConfig:
    """The measured pass that places windows and softmax layers, where `state_budget` or a number of softmax layers
    asks for it."""

    ranking: Ranking = "divergence"
    """What ranks layers and windows: the divergence of the model's output from the teacher's when one layer alone has
    the window (measured better, docs/results.md), or the error of that layer's own output."""
    tokens: int = 65_536
    """Tokens of training text to measure on at most; every layer and window reads them once."""
    sequence_length: int | None = None
    """Tokens in one measured piece; none: 4 times data.sequence_length, at most the teacher's context."""
    windows: list[int] | None = None
    """Windows to choose from, tokens; none: 64, 128, 256 and so on, shorter than a measured piece."""
    batch_size: int = 1
    """Pieces measured together."""

    def __post_init__(self) -> None:
        convert_fields(self, "select")
        for key in ("tokens", "batch_size"):
            require(getattr(self, key) >= 1, f"select.{key} is {getattr(self, key)}, but it must be at least 1.")
        require(
            self.sequence_length is None or self.sequence_length >= 2,
            f"select.sequence_length is {self.sequence_length}, but it must be none or at least 2.",
        )
        if self.windows is not None:
            self.windows = sorted(set(self.windows))
            require(
                bool(self.windows) and self.windows[0] >= 1,
                f"select.windows is {self.windows}, but it must name windows of at least 1 token.",
            )


def softmax_choice(value: Any) -> Any:
    """`softmax_layers` as it is kept: a list of layers, a number of them above 0, or a share such as `10%`.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(value, list):
        return value
    if isinstance(value, int) and value < 0:  # -1 is the last layer, as in a list
        return [value]
    require(value != 0, "softmax_layers is 0: write [] for no layer, [0] for the first one, or how many to choose.")
    require(
        isinstance(value, int) or bool(parse_share(value)),
        f"softmax_layers is {value!r}, but it must be a number of layers, a share of them such as 10%, or a list such "
        "as 0,5.",
    )
    return value


def softmax_count(value: int | str, layers: int) -> int:
    """How many layers a number or a share of `layers` is; a share that is not 0 is one layer at least."""
    if isinstance(value, int):
        return value
    share = parse_share(value)
    assert share is not None, "softmax_choice refuses others"
    return max(1, round(share * layers))
