"""Fit a mechanism's own numbers to softmax attention before anything trains: a few sequences, each layer for itself.

What is fitted, and how, is `calibration_cosine.py`, `calibration_landmark.py` and, for gain cells, `adaptation.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from typing import Any

import torch

from linearize.errors import UserError
from linearize.evaluation.arms import unwrap
from linearize.stages.calibration_report import CalibrationReport


def calibrates(config: Any) -> bool:
    """Whether a converted model's config, or settings of one mechanism, name one that can be calibrated."""
    from linearize.modeling.registry import mechanism

    used = [config] if isinstance(config, dict) else [config.mixers.get(name) for name in set(config.mixer_types)]
    return any(mechanism(settings["type"]).calibrates(settings) for settings in used if settings is not None)


@torch.no_grad()
def calibrate(model: Any, rows: Any, sequences: int, batch_size: int = 1) -> CalibrationReport | None:
    """Fit the layers of a converted model whose mechanism has a calibration, in place; the same on every process.

    Args:
        model: a converted model whose weights are the teacher's; other layers stay as they are.
        rows: training sequences, `len()` and `[i] -> {"input_ids": (L,)}`, with an `attention_mask` where padded;
            every process gives all of them.
        sequences: to look at, the first ones.
        batch_size: sequences at once.

    Returns:
        What was fitted; None of gain cells, whose scalers are set from the teacher's moments.

    Raises:
        UserError: no layer can be calibrated, there is no sequence, or the model's outputs are not finite.
    """
    from linearize.stages.adaptation import calibrate_gain_cells
    from linearize.stages.calibration_cosine import calibrate_cosine
    from linearize.stages.calibration_landmark import calibrate_landmark

    count = min(sequences, len(rows))
    if count < 1:
        raise UserError("The calibration has no sequence to look at: give more text, or leave the stage out.")
    fits = {"cosine": calibrate_cosine, "landmark": calibrate_landmark, "gain_cell": calibrate_gain_cells}
    kind, layers = _layers(model, fits)
    return fits[kind](model, layers, [rows[i] for i in range(count)], batch_size)


def save_calibration(report: CalibrationReport, folder: str | os.PathLike[str], name: str) -> None:
    """Write it as `logs/NAME.json` of a run directory."""
    from pathlib import Path

    from linearize.files import write_file

    path = Path(folder, "logs", f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(report.to_dict(), indent=1) + "\n").encode())


def _layers(model: Any, kinds: Collection[str]) -> tuple[str, dict[int, Any]]:
    """The mechanism that can be calibrated, of these, and its attentions by layer."""
    base = unwrap(model)
    found: dict[str, dict[int, Any]] = {}
    for attention in base.mixer_attentions() if hasattr(base, "mixer_attentions") else ():
        kind = base.config.mixer(attention.layer_idx).type
        if kind in kinds:
            found.setdefault(kind, {})[attention.layer_idx] = attention
    if not found:
        known = " or ".join(kinds)
        raise UserError(f"The model has no layer to calibrate: convert it with attention type {known} first.")
    return next(iter(found.items()))
