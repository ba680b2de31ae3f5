"""What a selection is to measure and to spend, checked before any weight is loaded."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearize.config.selection import softmax_count
from linearize.config.sizes import parse_budget
from linearize.errors import UserError

if TYPE_CHECKING:
    from linearize.runs.settings import RunConfig

KEPT = "kept_tokens"
"""The setting of mechanisms that keep tokens beside their window."""
SHORTEST = 64
"""Tokens of the least window that is offered where none are named."""


def selects(config: RunConfig) -> bool:
    """Whether the settings leave windows or softmax layers to a selection."""
    return config.state_budget is not None or not isinstance(config.softmax_layers, list)


@dataclass(frozen=True)
class SelectionPlan:
    """What a selection measures and spends, checked before anything is loaded."""

    config: RunConfig
    """The settings, `attention` complete."""
    layers: int
    sequence_length: int
    """Tokens of a measured piece."""
    windows: list[int]
    """To choose from, with `kept`; in the order of their tokens."""
    kept: list[int]
    """Tokens kept beside each window."""
    sizes: list[int]
    """Bytes of a layer's state with each of them."""
    softmax: list[int] | int
    """Layers that keep softmax, or how many are to be chosen."""
    budget: int | None
    """Bytes of all other layers together; None: they have the one window that there is."""

    @property
    def bounded(self) -> int:
        """Layers that get a window."""
        return self.layers - (self.softmax if isinstance(self.softmax, int) else len(self.softmax))

    @property
    def uniform(self) -> int:
        """The option that every bounded layer could have; of equal ones that with kept tokens."""
        spent = self.sizes[0] if self.budget is None else self.budget // self.bounded
        return max(option for option, size in enumerate(self.sizes) if size <= spent)

    def forecast_settings(self) -> RunConfig:
        """Settings of one window for the forecast of memory: the largest, with as many softmax layers."""
        softmax = list(range(self.softmax)) if isinstance(self.softmax, int) else self.softmax
        attention = with_option(self.config.mechanism, self.windows[-1], self.kept[-1])
        return dataclasses.replace(self.config, attention=attention, softmax_layers=softmax, state_budget=None)

    def describe(self) -> str:
        """One cell of the run's plan."""
        ranking = self.config.select.ranking
        if self.budget is None:
            return f"{self.layers - self.bounded} softmax layers by their {ranking}"
        windows = ", ".join(option_label(*option) for option in zip(self.windows, self.kept, strict=True))
        return (
            f"{self.budget:,} bytes in {self.bounded} layers, {self.layers - self.bounded} with softmax; windows of "
            f"{windows}, by {ranking} on pieces of {self.sequence_length:,} tokens"
        )


def plan_selection(config: RunConfig, teacher: Any) -> SelectionPlan:
    """Check a selection against the teacher's config.

    Args:
        config: settings that `selects`, `attention` complete.
        teacher: of a stock decoder that `softmax_layers`, where it is a list, fits.

    Raises:
        UserError: the mechanism has no window, or no placement meets the budget.
    """
    from linearize.hardware.state_bytes import layer_bytes

    _check_mechanism(config)
    layers, dtype = teacher.num_hidden_layers, _dtype(config)
    softmax = _softmax_layers(config.softmax_layers, layers)
    length = _piece_length(config, teacher)
    windows, kept = _options(config, _windows(config, length))
    students = [_uniform_student(config, teacher, *option) for option in zip(windows, kept, strict=True)]
    sizes = [layer_bytes(student, 0, length, dtype=dtype) for student in students]
    plan = SelectionPlan(config, layers, length, windows, kept, sizes, softmax, None)
    if config.state_budget is None:
        return plan
    budget = parse_budget(str(config.state_budget)).total(plan.bounded)
    _check_budget(plan, budget, layer_bytes(teacher, 0, length, dtype=dtype))
    return dataclasses.replace(plan, budget=budget)


def _check_mechanism(config: RunConfig) -> None:
    from linearize.modeling.registry import ATTENTIONS

    windowed = [name for name, entry in ATTENTIONS.items() if hasattr(entry.config, "sinks")]
    if config.mechanism["type"] not in windowed:
        raise UserError(
            f"{config.mechanism['type']} attention has no softmax window, by which layers are measured and placed: "
            f"leave state_budget out and list softmax_layers, or choose one of {', '.join(windowed)}."
        )


def _softmax_layers(value: Any, layers: int) -> list[int] | int:
    """The layers that keep softmax, or how many; at least one layer is left to convert."""
    if not isinstance(value, list):
        value = softmax_count(value, layers)
        if value >= layers:
            raise UserError(
                f"softmax_layers asks for {value} layers, but of layers 0 to {layers - 1} one at least must be "
                f"converted: ask for fewer, or list the layers, such as [{value}]."
            )
        return value
    kept = sorted({index % layers for index in value})
    if len(kept) == layers:
        raise UserError("softmax_layers names every layer: leave some to place windows in.")
    return kept


def _piece_length(config: RunConfig, teacher: Any) -> int:
    from linearize.evaluation.arms import context_tokens

    limit = context_tokens(teacher, "teacher")
    asked = config.select.sequence_length
    if asked is not None and limit is not None and asked > limit:
        raise UserError(
            f"select.sequence_length is {asked}, but the teacher's context is {limit} tokens: set it to {limit} or "
            "lower."
        )
    length = asked or 4 * config.data.sequence_length
    return length if limit is None else min(length, limit)


def _windows(config: RunConfig, length: int) -> list[int]:
    """The windows to choose from; where nothing is to be placed, the one of all layers."""
    if config.state_budget is None:
        windows = [config.mechanism["window"]]
        if windows == [0]:
            raise UserError("attention.window is 0, but layers are measured by their window: give one, or a list.")
    elif config.select.windows is not None:
        windows = config.select.windows
    else:
        windows = list(itertools.takewhile(lambda size: size < length, (SHORTEST << i for i in itertools.count())))
    if not windows or windows[-1] >= length:
        what = f"a window of {windows[-1]}" if windows else f"the least window, {SHORTEST}"
        raise UserError(
            f"Pieces of {length} tokens cannot tell {what} from the whole text: raise select.sequence_length, or give "
            "shorter select.windows."
        )
    return windows


def _options(config: RunConfig, windows: list[int]) -> tuple[list[int], list[int]]:
    """Windows and the tokens that are kept beside them: of every size the window alone, then shared with kept ones."""
    if KEPT not in config.mechanism:
        return windows, [0] * len(windows)
    if config.state_budget is None:
        return windows, [config.mechanism[KEPT]]
    shares = [round(window * config.select.kept_share) for window in windows]
    pairs = zip(windows, shares, strict=True)
    options = [(size - kept, kept) for size, share in pairs for kept in dict.fromkeys((0, min(share, size - 1)))]
    return [window for window, _ in options], [kept for _, kept in options]


def with_option(attention: dict[str, Any], window: int, kept: int) -> dict[str, Any]:
    """A mechanism's settings with an option in place of its own window."""
    return {**attention, "window": window, **({KEPT: kept} if KEPT in attention else {})}


def option_label(window: int, kept: int, between: str = " + ") -> str:
    """`64`, or with kept tokens `32 + 32`."""
    return f"{window}{between}{kept}" if kept else str(window)


def _check_budget(plan: SelectionPlan, budget: int, full: int) -> None:
    """Refuse a budget that no placement meets, or that softmax attention meets too.

    Args:
        full: bytes of a layer's KV cache for a measured piece.
    """
    asked, least, bounded = plan.config.state_budget, plan.sizes[0], plan.bounded
    if budget < bounded * least:
        raise UserError(
            f"state_budget is {asked}, but {bounded} layers with a window of {plan.windows[0]} keep "
            f"{bounded * least:,} bytes, {least:,} a layer: raise it, keep more softmax_layers, or offer shorter "
            "select.windows."
        )
    if budget >= bounded * full:
        raise UserError(
            f"state_budget is {asked}, but softmax attention itself keeps {bounded * full:,} bytes in {bounded} "
            f"layers for a text of {plan.sequence_length:,} tokens: lower it, or leave the layers softmax."
        )


def _uniform_student(config: RunConfig, teacher: Any, window: int, kept: int) -> Any:
    from linearize.conversion.students import student_config
    from linearize.modeling import BACKBONES

    kind = BACKBONES[teacher.model_type].config
    attention = with_option(config.mechanism, window, kept)
    return student_config(teacher, kind, attention, None, None, (), config.sliding_window)


def _dtype(config: RunConfig) -> Any:
    import torch

    return getattr(torch, config.dtype)
