"""What a calibration did, and the batches that it looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from linearize.data.rows import collate
from linearize.hub.card import calibration_sentence


@dataclass
class CalibrationReport:
    """What a calibration did; plain data.

    Fields: sequences, the number that it looked at, over all processes; measure, what before and after are of each
    layer, by its index; values, what was fitted, by its name and layer (of cosine attention: exponents, gains and
    window_weights of the heads).
    """

    sequences: int
    measure: str
    before: dict[int, float] = field(default_factory=dict)
    after: dict[int, float] = field(default_factory=dict)
    values: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """What the record of a converted repository keeps: means over the layers."""
        before, after = (sum(errors.values()) / len(errors) for errors in (self.before, self.after))
        return {
            "sequences": self.sequences,
            "measure": self.measure,
            "before": round(before, 6),
            "after": round(after, 6),
        }

    def sentence(self) -> str:
        """One line for a person."""
        return calibration_sentence(self.summary())


def batched(rows: Sequence[Any], batch_size: int) -> list[dict[str, Tensor]]:
    """Rows as the model's arguments."""
    names = ("input_ids", "attention_mask")
    rows = [{name: row[name] for name in names if name in row} for row in rows]
    return [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
