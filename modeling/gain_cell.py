"""The analog cell as data: what a gain cell does with a voltage, and how real cells differ from that.

Source: Leroux et al. 2025 (Nature Computational Science 5, 813; arXiv 2409.19315), whose silicon-CMOS cell is the
default. A cell stores a voltage w; its deviation from the middle, u = w - offset, is the signed weight. Read with a
pulse of width x, it gives a charge x P(u), P a cubic. The stored deviation leaks: u e^(-leak age), age in tokens.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .counter_draws import draw_words, shift

PUBLISHED_SLOPE = 19.3
OUTPUT_GRIDS = ("symmetric", "published")
DRAWS = ("key mismatch", "value mismatch", "key leak", "value leak", "key write", "value write", "read")


@dataclass(frozen=True)
class GainCell:
    """One kind of cell with its converters; the default is the paper's silicon-CMOS cell."""

    polynomial: tuple[float, float, float, float] = (0.52136361391, 13.612260634, -2.620445619, 46.05483778)
    """C0 to C3 of the charge P(u) = C0 + C1 u + C2 u^2 + C3 u^3, in units of the converters' inputs."""
    input_range: tuple[float, float] = (0.0, 1.0)
    """Pulse widths, relative to the longest: what a scaled query is clamped to."""
    weight_range: tuple[float, float] = (0.0, 0.9)
    """Stored voltages, volt: what a scaled key or value is clamped to."""
    offset: float = 0.45
    """Voltage of weight zero, volt."""
    score_saturation: float = 80.0
    """Charge at which the first converter's pulse is as long as it gets."""
    output_saturation: float = 40.0
    """Charge at which the second converter reads 1."""
    tile: int = 64
    """Cells that share a converter along the tokens: saturation and output levels come once per tile."""
    leak: float = 1.6e-4
    """Rate per token at which a stored deviation decays: e^(-leak age)."""
    token_time: float = 7.8e-7
    """Time base of the leak: seconds from one token to the next (12 layers of 65 ns)."""
    input_levels: int | None = 16
    """Levels of a pulse width; None leaves it continuous."""
    weight_levels: int | None = 8
    """Levels of a stored voltage; None leaves it continuous."""
    output_levels: int | None = 32
    """Codes of a tile's output, even; None leaves it continuous."""
    output_grid: str = "symmetric"
    """`symmetric`: sign and magnitude, k / (levels / 2 - 1), 0 and the extremes exact; `published`: multiples of
    2 / (levels - 1), one value more than levels, the extremes beyond 1."""
    surrogate_slope: float | None = PUBLISHED_SLOPE
    """Slope of the linear cell that stands in for this one in the published gradient and in the first training stage;
    None takes the least-squares line over the weight range."""

    def __post_init__(self) -> None:
        for name, length in (("polynomial", 4), ("input_range", 2), ("weight_range", 2)):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != length:
                raise ValueError(f"{name} is {values!r}: it holds {length} numbers")
            object.__setattr__(self, name, tuple(float(_number(name, value)) for value in values))
        for name in ("input_range", "weight_range"):
            low, high = getattr(self, name)
            if low >= high:
                raise ValueError(f"{name} is {low:g} to {high:g}: the lower end comes first and below the upper one")
        _number("offset", self.offset)
        for name in ("score_saturation", "output_saturation", "token_time"):
            if not _number(name, getattr(self, name)) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if not _number("leak", self.leak) >= 0:
            raise ValueError(
                f"leak is {self.leak} per token: cells only lose charge, so rate and time constant are at least 0"
            )
        if not isinstance(self.tile, int) or self.tile < 1:
            raise ValueError(f"tile is {self.tile!r}: it counts cells and must be at least 1")
        for name in ("input_levels", "weight_levels"):
            levels = getattr(self, name)
            if levels is not None and (not isinstance(levels, int) or levels < 2):
                raise ValueError(f"{name} is {levels!r}: a quantiser has at least 2 levels; null switches it off")
        levels = self.output_levels
        if levels is not None and (not isinstance(levels, int) or levels < 4 or levels % 2):
            raise ValueError(f"output_levels is {levels!r}: it must be even and at least 4; null switches it off")
        if self.output_grid not in OUTPUT_GRIDS:
            raise ValueError(f"output_grid is {self.output_grid!r}: choose one of {', '.join(OUTPUT_GRIDS)}")
        if self.surrogate_slope is not None and _number("surrogate_slope", self.surrogate_slope) == 0:
            raise ValueError("surrogate_slope is 0: a linear cell of slope 0 stores nothing")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "GainCell":
        """A cell from plain data, such as a YAML file's.

        Raises:
            ValueError: unknown keys or impossible values; one sentence.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(
                f"unknown key {', '.join(map(str, unknown))} of a gain cell: known are {', '.join(known)}"
            )
        return cls(**settings)

    def replace(self, **changes: Any) -> "GainCell":
        """The same cell with other values."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

    @property
    def slope(self) -> float:
        """Slope of the linear cell that stands in for this one."""
        if self.surrogate_slope is not None:
            return self.surrogate_slope
        # Least squares over an interval of half-width h around m: the line's slope is the mean of P' weighted by
        # 1 - t^2, t from -1 to 1; for a cubic, P'(m) + 3/5 C3 h^2.
        low, high = (end - self.offset for end in self.weight_range)
        middle, half = (low + high) / 2, (high - low) / 2
        _, c1, c2, c3 = self.polynomial
        return c1 + 2 * c2 * middle + 3 * c3 * middle**2 + 0.6 * c3 * half**2

    @property
    def time_constant(self) -> float:
        """Seconds after which a deviation has fallen to 1/e; infinite without leak."""
        return self.token_time / self.leak if self.leak else float("inf")

    def linear(self) -> "GainCell":
        """The linear cell that training starts with: the same converters, P(u) = slope u."""
        return self.replace(polynomial=(0.0, self.slope, 0.0, 0.0))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"{name} is {value!r}: it must be a number")
    return value


@dataclass(frozen=True)
class GainCellNoise:
    """How cells and converters differ from the ideal; every draw is a fixed function of the seed and its place.

    The draws are standard normal. Mismatch and leak spread belong to a device: (seed, head, slot, dimension), for the
    key and the value array each. Write noise belongs to a token: (seed, head, key token, dimension). Read noise
    belongs to a readout: (seed, head, query token, tile, dimension).
    """

    read: float = 0.0
    """Deviation of a tile's output before its levels, in full scales."""
    mismatch: float = 0.0
    """Relative deviation of a cell's charge."""
    write: float = 0.0
    """Deviation of a stored voltage, as a share of the weight range."""
    leak_spread: float = 0.0
    """Relative deviation of a cell's leak; a leak below 0 counts as 0."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("read", "mismatch", "write", "leak_spread"):
            if not _number(name, getattr(self, name)) >= 0:
                raise ValueError(f"noise {name} is {getattr(self, name)}: a deviation is at least 0")
        if not isinstance(self.seed, int):
            raise ValueError(f"the noise seed is {self.seed!r}: it must be a whole number")

    def replace(self, **changes: Any) -> "GainCellNoise":
        """The same noise with other values."""
        return replace(self, **changes)

    def draw(self, kind: str, *counters: Tensor) -> Tensor:
        """Standard normal numbers in float64, one for each broadcast tuple of integer counters.

        Each is a hash of the seed, the kind (one of `DRAWS`) and its counters, turned normal by Box and Muller: the
        same whatever the batch, the call, or the device.
        """
        first = torch.as_tensor(self.seed, dtype=torch.int64, device=counters[0].device)
        word = draw_words(first, DRAWS.index(kind), *counters)
        radius = (-2 * ((shift(word, 32).double() + 1) / 2**32).log()).sqrt()
        return radius * (2 * math.pi * (word & 0xFFFFFFFF).double() / 2**32).cos()
