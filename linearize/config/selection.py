"""What a run measures to place windows and softmax layers, and which layers keep softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from linearize.config.sizes import parse_budget, parse_share
from linearize.config.values import convert_fields, require
from linearize.errors import UserError

TABLES, CONFIG, PLOT = FILES = ("selection.json", "selection.yaml", "selection.png")
"""What a selection leaves in a run's directory; the plot also lies in a converted repository."""
Ranking = Literal["divergence", "error"]
OF_THE_CONVERSION = (
    *("attention", "softmax_layers", "state_budget", "select", "mixer_types", "mixers"),
    "sliding_window",
)
"""Settings that a model has from its conversion, whatever a later run says."""


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
    kept_share: float | int = 0.5
    """For salient-token attention: every window is also offered with so large a share of its tokens given to kept
    ones; 0 offers windows alone."""
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
        require(
            0 <= self.kept_share < 1,
            f"select.kept_share is {self.kept_share}, but it must be at least 0 and below 1.",
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


class LayerChoice:
    """What a run's settings say of its layers, which they declare as these fields."""

    attention: dict[str, Any] | None
    softmax_layers: int | list[int] | str
    state_budget: int | str | None
    mixer_types: list[str] | None
    mixers: dict[str, Any] | None

    def _check_layers(self) -> None:
        self.softmax_layers = softmax_choice(self.softmax_layers)
        if self.state_budget is not None:
            parse_budget(str(self.state_budget))
        layered = self.mixer_types is not None or self.mixers is not None
        require(
            not layered or (self.mixer_types is not None and self.mixers is not None),
            "mixer_types and mixers belong together: give both, or attention and softmax_layers.",
        )
        plain = (
            self.attention in (None, {"type": "linear"}) and self.softmax_layers == [] and self.state_budget is None
        )
        require(
            not layered or plain,
            "mixer_types says what the layers have: leave attention, softmax_layers and state_budget out.",
        )

    @property
    def kept_layers(self) -> list[int]:
        """`softmax_layers` where they are listed.

        Raises:
            UserError: they are yet to be chosen.
        """
        if not isinstance(self.softmax_layers, list):
            raise UserError(
                f"softmax_layers is {self.softmax_layers}, as many layers as measuring is to choose: do that with "
                "`linearize select` or `linearize run`, or list the layers, such as [4]."
            )
        return self.softmax_layers

    def layers(self) -> dict[str, Any]:
        """Which layer gets which attention, as `linearize.convert` takes it.

        Raises:
            UserError: layers are yet to be chosen.
        """
        if self.mixers is not None:
            return {"mixer_types": self.mixer_types, "mixers": self.mixers}
        if self.state_budget is not None:
            raise UserError(
                "state_budget is set, and windows are placed by measuring: do that with `linearize select` or "
                "`linearize run`, or leave it out."
            )
        return {"attention": self.attention, "softmax_layers": self.kept_layers}

    @property
    def mechanism(self) -> dict[str, Any]:
        """`attention` where there is one."""
        assert self.attention is not None, "softmax alone"
        return self.attention

    @property
    def mechanisms(self) -> list[dict[str, Any]]:
        """The settings of every mechanism in use."""
        if self.mixers is not None:
            return list(self.mixers.values())
        return [] if self.attention is None else [self.attention]
