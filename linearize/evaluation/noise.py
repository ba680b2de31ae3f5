"""Robustness of a gain-cell model: the perplexity when cells and readouts differ from the ideal, over many chips.

A trial is one draw of every deviation: another device, other writes, other readouts. Its seed is the trial's number.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from linearize.errors import UserError
from linearize.evaluation.arms import gain_cell_layers
from linearize.evaluation.labels import describe
from linearize.evaluation.next_token import perplexity
from linearize.modeling import GainCellNoise
from linearize.tables import Table, format_number, show_tables

KINDS = tuple(field.name for field in dataclasses.fields(GainCellNoise) if field.name != "seed")
LAYERS = 2**16  # seeds between two trials: more than any model has layers


@dataclasses.dataclass(frozen=True)
class Trial:
    """One draw of all deviations: its seed, the perplexity, and nats per token."""

    seed: int
    perplexity: float
    nll: float


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None of a single trial), and extremes over the trials."""

    mean: float
    deviation: float | None
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        numbers = torch.tensor(values, dtype=torch.float64)
        deviation = numbers.std().item() if len(values) > 1 else None
        return cls(numbers.mean().item(), deviation, min(values), max(values))


@dataclasses.dataclass(frozen=True)
class NoiseReport:
    """What noise does to a model.

    Fields: noise, kind -> deviation; tokens scored in each trial; noiseless perplexity and nll (nats per token); the
    trials.
    """

    noise: dict[str, float]
    tokens: int
    noiseless_perplexity: float
    noiseless_nll: float
    trials: list[Trial]

    def perplexity(self) -> Spread:
        return Spread.of([trial.perplexity for trial in self.trials])

    def nll(self) -> Spread:
        return Spread.of([trial.nll for trial in self.trials])

    def table(self) -> Table:
        rows = []
        for name, noiseless, spread in (
            ("perplexity", self.noiseless_perplexity, self.perplexity()),
            ("log-perplexity, nats per token", self.noiseless_nll, self.nll()),
        ):
            figures = (noiseless, spread.mean, spread.deviation, spread.least, spread.most)
            rows.append([name, *(format_number(figure, 5) for figure in figures)])
        header = ["", "without noise", "mean", "standard deviation", "least", "most"]
        number = f"{len(self.trials)} trial{'s' if len(self.trials) > 1 else ''}"
        return Table(f"Noise {describe(self.noise)}: {number} on {self.tokens:,} tokens", header, rows)

    def show(self, console: Any = None) -> None:
        show_tables([self.table()], (), console)

    def to_dict(self) -> dict[str, Any]:
        spreads = {"perplexity": self.perplexity(), "nll": self.nll()}
        return dataclasses.asdict(self) | {name: dataclasses.asdict(spread) for name, spread in spreads.items()}

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write noise.json and noise.png; returns the paths."""
        from linearize.evaluation.plots import plot_noise

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "noise.json", folder / "noise.png"]
        paths[0].write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        plot_noise(self, paths[1])
        return paths


def parse_noise(text: str) -> GainCellNoise:
    """Read `read=0.01,mismatch=0.05`: kinds of noise with their deviations, as `GainCellNoise` defines them.

    Raises:
        UserError: an unknown kind, one that is given twice, or what is no number of at least 0.
    """
    deviations: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in KINDS:
            raise UserError(f"--noise has no kind {name!r}: give KIND=DEVIATION with a kind of {', '.join(KINDS)}.")
        if name in deviations:
            raise UserError(f"--noise gives {name} twice: give each kind once.")
        try:
            deviations[name] = float(number)
        except ValueError:
            deviations[name] = float("nan")
        if not 0 <= deviations[name] < float("inf"):
            raise UserError(f"--noise {name} is {number!r}, but a deviation is a number of at least 0.")
    return GainCellNoise().replace(**deviations)


@contextlib.contextmanager
def noisy(model: Any, noise: GainCellNoise) -> Iterator[None]:
    """Within the block every gain-cell layer has this noise, each by a seed of its own; then back.

    Args:
        model: a student with gain-cell layers, adapters merged.
        noise: `noise.seed` is the trial's: no two pairs of trial and layer share a seed.
    """
    layers = gain_cell_layers(model, "Noise")
    before = {layer_idx: mixer.noise for layer_idx, mixer in layers.items()}
    try:
        for layer_idx, mixer in layers.items():
            mixer.noise = noise.replace(seed=noise.seed * LAYERS + layer_idx)
        yield
    finally:
        for layer_idx, mixer in layers.items():
            mixer.noise = before[layer_idx]


def measure_noise(
    model: Any, blocks: Any, noise: GainCellNoise, *, trials: int = 16, batch_size: int = 1
) -> NoiseReport:
    """Take the perplexity without noise and under `trials` draws of it.

    Args:
        model: a student with gain-cell layers, adapters merged.
        blocks: held-out `TokenBlocks`.
        noise: deviations; trial t has the seed `noise.seed + t`.
        trials: number of draws.
        batch_size: blocks per forward pass.

    Raises:
        UserError: no gain-cell layer, or nothing to score.
    """

    gain_cell_layers(model, "Noise")
    noiseless = perplexity(model, blocks, batch_size=batch_size, description="without noise")
    results = []
    for seed in tqdm(range(noise.seed, noise.seed + trials), desc="noise", unit="trial", leave=False):
        with noisy(model, noise.replace(seed=seed)):
            result = perplexity(model, blocks, batch_size=batch_size, description=f"seed {seed}")
        results.append(Trial(seed, result.perplexity, result.nll))
    deviations = {kind: value for kind, value in dataclasses.asdict(noise).items() if kind in KINDS}
    return NoiseReport(deviations, noiseless.tokens, noiseless.perplexity, noiseless.nll, results)
