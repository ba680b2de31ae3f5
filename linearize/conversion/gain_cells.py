"""Gain cells by name or from a YAML file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from linearize.config.yaml_io import read_mapping
from linearize.errors import UserError
from linearize.modeling.gain_cell import GainCell

CELLS = {"silicon_cmos": GainCell(), "silicon_cmos_linear": GainCell().linear()}
"""The paper's cell, and the linear one that stands in for it."""


def load_cell(path: str | PathLike[str]) -> GainCell:
    """The cell that a name or a YAML file of `GainCell` fields stands for; fields that it lacks are the paper's.

    Raises:
        UserError: neither a known name nor a file, or the file holds no possible cell; one sentence (a ValueError).
    """
    if (named := CELLS.get(str(path))) is not None:
        return named
    if not Path(path).is_file():
        raise UserError(f"There is no cell {str(path)!r}: give the path of a YAML file or one of {', '.join(CELLS)}.")
    settings = read_mapping(Path(path))
    try:
        return GainCell.from_dict(settings)
    except (TypeError, ValueError) as error:  # TypeError: keys of several types cannot be sorted
        raise UserError(f"The cell file {path} cannot be used: {error}.") from error


class Moments(NamedTuple):
    """Mean and deviation `(heads,)` of what a scaler gives, over batch, tokens and dimensions; float64."""

    mean: Tensor
    std: Tensor


Statistics = dict[str, Moments]  # by layer and scaler: "3.key_scaler"
