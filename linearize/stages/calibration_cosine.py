"""The calibration of cosine attention: least squares against the teacher's attention outputs, without gradients.

Cosine attention gives `a softmax(window) + g cosine(s)`: for an exponent s the window's weight a and the gain g have a
closed form, so that the exponent alone is searched for, each head for itself. All layers see the teacher's hidden
states, as in attention transfer, and every round of the search is one pass over a few sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.errors import UserError
from linearize.evaluation.arms import input_device, measuring
from linearize.stages.adaptation import over_processes
from linearize.stages.calibration_report import CalibrationReport, batched

MEASURE = "squared error of the attention's output, over the teacher's square,"
FIRST_ROUND = 17
"""Exponents from 0 to 1 that every head tries first."""
LATER_ROUNDS = 2
"""Rounds after it, each around the best one so far."""
LATER = tuple(sign * i / 8 for i in range(1, 8) for sign in (-1, 1))
"""Exponents of a later round, in steps of the round before."""
WORTHWHILE = 1e-9
"""Share of the teacher's square that another exponent must gain: an exponent that does not matter stays."""
COLLINEAR = 1e-9
"""Share of their own size that two branches must differ by to be told apart."""


def calibrate_cosine(model: Any, layers: dict[int, Any], rows: Sequence[Any], batch_size: int) -> CalibrationReport:
    """Set exponents, gains and window weights; the processes share the rows out. Arguments as in `calibrate`."""
    batches = batched(_my_part(rows), batch_size)
    found = {i: _Fit(attention.mixer) for i, attention in layers.items()}
    for _ in range(1 + LATER_ROUNDS):
        _observe(model, layers, batches, found)
        for layer, fit in found.items():
            fit.solve(layer)
    names = ("exponents", "gains", "window_weights")
    report = CalibrationReport(len(rows), MEASURE, values={name: {} for name in names})
    for layer, fit in found.items():
        fit.apply()
        report.before[layer], report.after[layer] = fit.errors()
        for name, values in zip(names, fit.values(), strict=True):
            report.values[name][layer] = values
    return report


def _my_part(rows: Sequence[Any]) -> Sequence[Any]:
    """This process's part."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else (0, 1)
    return rows[rank::world]


def _observe(model: Any, layers: dict[int, Any], batches: Sequence[dict[str, Tensor]], found: dict[int, _Fit]) -> None:
    """One pass of the teacher, and the sums of all processes."""

    def meter(attention, *seen, **context):
        found[attention.layer_idx].add(attention, *seen, **context)

    with measuring(model, "teacher") as base:
        device = input_device(base)
        for attention in layers.values():
            attention.observer = meter
        try:
            for batch in batches:
                base.base_model(**{name: x.to(device) for name, x in batch.items()}, use_cache=False)
        finally:
            for attention in layers.values():
                attention.observer = None
    for fit in found.values():  # in the same order everywhere; each process has looked at its own part
        fit.sums = over_processes(fit.sums.to(device)).cpu()


class _Fit:
    """The search of one layer: the products of its terms for the exponents of a round, and the best so far.

    Legend: N exponents of a round, H heads. The terms are the softmax branch o, the cosine branch z with gain 1 and
    the teacher's output t; all float64 on the CPU between passes.

    Args:
        mixer: of the layer, with the values that it starts from.

    Attributes:
        sums: `(N, 6, H)`: oo, oz, zz, ot, zt, tt, of the passes since the last `solve`.
    """

    def __init__(self, mixer: Any) -> None:
        self.mixer, scales = mixer, mixer.scales
        self.start = _double(scales.exponent())
        self.heads = len(self.start)
        grid = torch.linspace(0, 1, FIRST_ROUND, dtype=torch.float64)[:, None].expand(-1, self.heads)
        self.step = 1 / (FIRST_ROUND - 1)
        self.range = scales.exponent_range()
        self._try(torch.cat([self.start[None], grid.clamp(*self.range)]))
        self.chosen = self.start.expand(3, -1)  # exponent, window weight, gain
        self.best = self.initial = self.total = torch.zeros_like(self.start)

    def _try(self, exponents: Tensor) -> None:
        self.exponents = exponents
        self.sums = torch.zeros(len(exponents), 6, self.heads, dtype=torch.float64)

    def add(self, attention, query, key, value, teacher_output, padding_mask, **context) -> None:
        """Take a batch of a pass; arguments of an observer (`MixerAttention`)."""
        exponents = self.exponents.to(query.device, torch.promote_types(query.dtype, torch.float32))
        given = (query, key, value, padding_mask, attention.causal, exponents)
        near, terms = self.mixer.calibration_terms(*given, **context)
        t = teacher_output.double()
        if padding_mask is not None:
            t = t.masked_fill(~padding_mask.bool()[:, None, :, None], 0.0)
        o = torch.zeros_like(t) if near is None else near.double()
        self.sums = self.sums.to(t.device)
        fixed = {"oo": _dot(o, o), "ot": _dot(o, t), "tt": _dot(t, t)}
        for i, far in enumerate(terms):
            z = far.double()
            products = (fixed["oo"], _dot(o, z), _dot(z, z), fixed["ot"], _dot(z, t), fixed["tt"])
            self.sums[i] += torch.stack(products)

    def solve(self, layer: int) -> None:
        """Keep the best exponent of the round with its factors, and lay the next round around it."""
        sums = self.sums
        if not sums.isfinite().all():
            raise UserError(f"The outputs of layer {layer} are not finite: load the teacher in another dtype.")
        factors = self._factors(sums)
        errors = _squared_error(sums, factors)
        if not self.total.any():  # the first round, whose first exponent is the one that is there
            self.total, self.initial = sums[0, 5], _squared_error(sums[0], self._present())
            self.chosen, self.best = torch.stack([self.exponents[0], *factors[:, 0]]), errors[0]
        error, place = errors.min(0)
        heads = torch.arange(self.heads)
        found = torch.stack([self.exponents[place, heads], *factors[:, place, heads]])
        better = error < self.best - WORTHWHILE * self.total
        self.chosen = torch.where(better, found, self.chosen)
        self.best = torch.where(better, error, self.best)
        steps = torch.tensor(LATER, dtype=torch.float64)[:, None] * self.step
        self.step /= 8
        self._try((self.chosen[0] + steps).clamp(*self.range))

    def _present(self) -> Tensor:
        """Window weight and gain that the layer starts from: `(2, H)`."""
        scales = self.mixer.scales
        one = torch.ones(self.heads, dtype=torch.float64)
        return torch.stack([one if x is None else _double(x) for x in (scales.window_weight, scales.gain)])

    def _factors(self, sums: Tensor) -> Tensor:
        """The least-squares window weight and gain for each exponent: `(2, N, H)`; 1 where there is none to learn."""
        oo, oz, zz, ot, zt, _ = sums.unbind(1)
        one = torch.ones_like(oo)
        scales = self.mixer.scales
        if scales.window_weight is None:
            return torch.stack([one, one if scales.gain is None else _ratio(zt, zz)])
        if scales.gain is None:
            return torch.stack([_ratio(ot - oz, oo), one])
        determinant = oo * zz - oz.square()
        apart = determinant > COLLINEAR * oo * zz
        safe = determinant.where(apart, one)
        weight = torch.where(apart, (zz * ot - oz * zt) / safe, _ratio(ot, oo))
        gain = torch.where(apart, (oo * zt - oz * ot) / safe, torch.zeros_like(one))
        return torch.stack([weight, gain])

    def apply(self) -> None:
        """Set the layer's parameters to the best values found."""
        exponent, weight, gain = self.chosen
        self.mixer.scales.assign(exponent, gain, weight)

    def errors(self) -> tuple[float, float]:
        """Before and after, over the teacher's squared outputs."""
        total = self.total.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return float(self.initial.sum() / total), float(self.best.sum() / total)

    def values(self) -> tuple[list[float], list[float], list[float]]:
        """Exponents, gains and window weights, as the layer has them."""
        scales = self.mixer.scales
        learned = (scales.exponent(), scales.gain, scales.window_weight)
        exponents, gains, weights = ([] if x is None else x.tolist() for x in learned)
        return exponents, gains, weights


def _double(x: Tensor) -> Tensor:
    return x.detach().double().cpu()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sums over batch, tokens and dimensions: `(H,)`."""
    return torch.einsum("bhtd,bhtd->h", x, y)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y > 0, x / y.where(y > 0, torch.ones_like(y)), torch.zeros_like(x))


def _squared_error(sums: Tensor, factors: Tensor) -> Tensor:
    """|t - a o - g z|^2 from the products `(..., 6, H)` and a, g `(2, ..., H)`."""
    oo, oz, zz, ot, zt, tt = sums.unbind(-2)
    a, g = factors
    return tt - 2 * (a * ot + g * zt) + a * a * oo + 2 * a * g * oz + g * g * zz
