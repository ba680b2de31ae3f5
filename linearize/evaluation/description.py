"""What a converted repository is, from its config and the headers of its weight files: no weights are loaded."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.config.record import find_converted, read_record
from linearize.conversion.students import load_config
from linearize.errors import UserError
from linearize.hardware.state_bytes import LENGTHS, StateBytes, layer_bytes, state_bytes, state_table
from linearize.tables import Table, format_bytes, markdown_tables, ranges, show_tables

MIXER_PART = "mixer."


@dataclasses.dataclass
class Info:
    """Fields: mechanisms, name -> settings; layers, name of each layer's mechanism; parameters and mixer_parameters,
    numbers in the weight files (None without any); teacher, where the conversion's record names one; layer_state and
    state, bytes while generating (empty for an encoder, which keeps none); sliding_window, tokens that softmax layers
    see (None: all).
    """

    path: str
    model_type: str
    teacher: str | None
    dtype: str
    layers: list[str]
    mechanisms: dict[str, dict[str, Any]]
    layer_state: dict[str, int]
    parameters: int | None
    mixer_parameters: int | None
    state: list[StateBytes]
    sliding_window: int | None = None

    def tables(self) -> list[Table]:
        tables = [self._model_table(), self._layer_table()]
        return [*tables, state_table(self.state)] if self.state else tables

    def show(self, console: Any = None) -> None:
        show_tables(self.tables(), (), console)

    def markdown(self, heading: str = "###") -> str:
        return markdown_tables(self.tables(), (), heading)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def _model_table(self) -> Table:
        rows = [["model type", self.model_type], ["layers", str(len(self.layers))], ["dtype", self.dtype]]
        if self.teacher:
            rows.insert(0, ["teacher", self.teacher])
        if self.sliding_window is not None:
            rows.append(["sliding window of softmax layers", f"{self.sliding_window:,} tokens"])
        if self.parameters is not None and self.mixer_parameters is not None:
            rows.append(["parameters", f"{self.parameters:,}"])
            part = self.mixer_parameters / self.parameters
            rows.append(["of them the mechanisms'", f"{self.mixer_parameters:,} ({part:.2%})"])
        return Table(self.path, ["", "value"], rows, text=True)

    def _layer_table(self) -> Table:
        rows = []
        for name in dict.fromkeys(self.layers):
            settings = self.mechanisms.get(name, {"type": "softmax"})
            shown = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "type")
            rows.append(
                [
                    ranges([i for i, layer in enumerate(self.layers) if layer == name]),
                    name,
                    str(settings["type"]),
                    shown or "the teacher's attention",
                    *([format_bytes(self.layer_state[name])] if self.state else []),
                ]
            )
        header = ["layers", "name", "mechanism", "settings"]
        if self.state:
            header.append(f"state a layer at {LENGTHS[0]:,} tokens")
        return Table("Attention", header, rows, text=True)


def info(directory: str | os.PathLike[str], lengths: Sequence[int] = LENGTHS) -> Info:
    """Describe a converted repository.

    Args:
        directory: of a converted repository, or of a run (its final one); weight files and record may be missing.
        lengths: tokens at which the state is compared with the teacher's KV cache.

    Raises:
        UserError: no converted model there, or a file of it cannot be read.
    """
    folder = find_converted(directory)
    config = load_config(str(folder))
    parameters = _count_parameters(folder)
    layers = list(config.mixer_types)
    record = read_record(folder)
    dtype = getattr(config, "dtype", None)
    state = state_bytes(config, lengths)
    keeping = dict.fromkeys(layers) if state else ()  # an encoder keeps nothing
    return Info(
        path=str(directory),
        model_type=config.model_type,
        teacher=record.get("teacher"),
        dtype=str(dtype).removeprefix("torch.") if dtype is not None else "float32",
        layers=layers,
        mechanisms={name: dict(settings) for name, settings in config.mixers.items() if name in layers},
        layer_state={name: layer_bytes(config, layers.index(name), lengths[0]) for name in keeping},
        parameters=parameters[0] if parameters else None,
        mixer_parameters=parameters[1] if parameters else None,
        state=state,
        sliding_window=config.softmax_window,
    )


def _count_parameters(folder: Path) -> tuple[int, int] | None:
    """All parameters and the mechanisms', from the headers of the safetensors files."""
    from safetensors import SafetensorError, safe_open

    total = mixers = 0
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    size = math.prod(file.get_slice(name).get_shape())
                    total += size
                    mixers += size if MIXER_PART in name else 0
        except (SafetensorError, OSError) as error:
            raise UserError(f"The weight file {str(path)!r} cannot be read ({error}): copy it again.") from error
    return (total, mixers) if paths else None
