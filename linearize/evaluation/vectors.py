"""Test vectors for circuit simulation: everything that one gain-cell head stores, reads and converts on a short text.

The arithmetic is float64 and follows the definition (`kernels/gain_cell/reference.py`) token by token, in numpy; its
inputs are the queries, keys and values that the model itself computes. Noise has no part in it.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from linearize.errors import UserError
from linearize.evaluation.arms import gain_cell_layers, input_device, measuring
from linearize.files import write_file
from linearize.modeling import GainCell

TEXT = (
    "A gain cell keeps its voltage on a small capacitor and is read without being disturbed. A pulse on the word line "
    "opens it for a time, the charge that flows meanwhile is the product, and all cells of a column add theirs on one "
    "wire. The voltage leaks away slowly, so that old tokens fade before their cells are written again. "
)

README = """Test vectors of one gain-cell attention head. Numbers are float64 or int64; numpy.load reads them.

Sizes: T tokens, D head dim, S slots of the ring that the tokens reach (whole tiles, at most the window), P cells of a
tile, K = S / P tiles. Token n is written into slot n mod window; tile k holds the slots k P to (k + 1) P - 1.

input_ids (T,)                      the text
query_in, key_in, value_in (T, D)   after the rotary embedding, before the range scalers
query_scaler, key_scaler, value_scaler, output_scaler (2,)   scale and offset of each range scaler
query, key, value (T, D)            after the range scalers: pulse widths relative to the longest; volts
query_code (T, D)                   level of each pulse width, 0 to input_levels - 1; absent without levels
key_code, value_code (T, D)         level of each stored voltage, 0 to weight_levels - 1; absent without levels
pulse (T, D)                        pulse width applied, clamped and on its level
key_deviation, value_deviation (T, D)   voltage as written minus the cell's offset, volts
slot_token (T, S)                   token that slot s holds when token n is read, n itself included; -1: empty
age (T, S)                          n minus that token; -1: empty
decay (T, S)                        factor exp(-leak age) on the stored deviation; 0: empty
score_charge (T, S)                 sum over D of pulse * P(key deviation * decay); 0: empty
score (T, S)                        after the first converter: clamp(score_charge / score_saturation, 0, 1); 0: empty
tile_charge (T, K, D)               sum over the tile's slots of score * P(value deviation * decay)
tile_output (T, K, D)               after the second: clamp(tile_charge / output_saturation, -1, 1), on levels
tile_code (T, K, D)                 signed level of tile_output, in steps of the grid; absent without levels
output (T, D)                       sum of tile_output over the tiles, before the output scaler
output_scaled (T, D)                after it
constants                           JSON: the cell, window, layer, head, key_value_head

P(u) = C0 + C1 u + C2 u^2 + C3 u^3, the cell's polynomial. Rounding goes to the nearest, halves to even.
Noise and mismatch are off.
"""


def head_vectors(query: ndarray, key: ndarray, value: ndarray, *, cell: GainCell, window: int) -> dict[str, ndarray]:
    """What one head does with scaled inputs, by the definition.

    Args:
        query, key, value: `(T, D)` float64, after the range scalers, before clamp and levels.
        cell: the device.
        window: slots of the ring.

    Returns:
        The arrays of `README` from query_code to output.
    """
    length, dim = query.shape
    slots = min(window, -(-length // cell.tile) * cell.tile)
    tiles = slots // cell.tile
    found: dict[str, ndarray] = {}
    found["pulse"], codes = _to_levels(query, cell.input_range, cell.input_levels)
    _add_codes(found, "query_code", codes)
    for name, x in (("key", key), ("value", value)):
        stored, codes = _to_levels(x, cell.weight_range, cell.weight_levels)
        found[f"{name}_deviation"] = stored - cell.offset
        _add_codes(found, f"{name}_code", codes)

    token, slot = np.arange(length)[:, None], np.arange(slots)
    newest = token - (token - slot) % window
    empty = newest < 0
    age = np.where(empty, -1, token - newest)
    decay = np.where(empty, 0.0, np.exp(-cell.leak * age))
    charge, weight = np.zeros((length, slots)), np.zeros((length, slots))
    sums = np.zeros((length, tiles, dim))
    for n in range(length):
        filled = np.flatnonzero(~empty[n])
        held, fade = newest[n, filled], decay[n, filled, None]
        charge[n, filled] = _charge(found["key_deviation"][held] * fade, cell) @ found["pulse"][n]
        weight[n, filled] = np.clip(charge[n, filled] / cell.score_saturation, 0, 1)
        read = np.zeros((slots, dim))
        read[filled] = weight[n, filled, None] * _charge(found["value_deviation"][held] * fade, cell)
        sums[n] = read.reshape(tiles, cell.tile, dim).sum(1)
    output, codes = _to_output_levels(sums / cell.output_saturation, cell)
    _add_codes(found, "tile_code", codes)
    return found | {
        "slot_token": np.where(empty, -1, newest),
        "age": age,
        "decay": decay,
        "score_charge": charge,
        "score": weight,
        "tile_charge": sums,
        "tile_output": output,
        "output": output.sum(1),
    }


def export_vectors(model: Any, input_ids: torch.Tensor, *, layer: int, head: int) -> dict[str, ndarray]:
    """Run a text through a model and follow one head of one layer.

    Args:
        model: a student with gain-cell layers, adapters merged.
        input_ids: `(T,)` tokens.
        layer: index of the layer.
        head: query head; its keys and values are those of the group that it belongs to.

    Returns:
        The arrays that `README` names, itself among them.

    Raises:
        UserError: no such layer or head, or no gain cells.
    """
    mixers = gain_cell_layers(model, "The export of test vectors")
    if layer not in mixers:
        raise UserError(
            f"--layer is {layer}, but the layers with gain cells are {', '.join(map(str, sorted(mixers)))}."
        )
    mixer = mixers[layer]
    caught: list[torch.Tensor] = []
    hook = mixer.register_forward_pre_hook(lambda module, inputs: caught.extend(inputs[:3]))
    try:
        with measuring(model, "mixed") as base:
            getattr(base, base.base_model_prefix)(input_ids[None].to(input_device(base)), use_cache=False)
    finally:
        hook.remove()
    heads, groups = caught[0].shape[1], caught[1].shape[1]
    if not 0 <= head < heads:
        raise UserError(f"--head is {head}, but the layer has the heads 0 to {heads - 1}.")
    group = head // (heads // groups)
    places = {"query": head, "key": group, "value": group}
    scalers = {
        "query": mixer.query_scaler,
        "key": mixer.key_scaler,
        "value": mixer.value_scaler,
        "output": mixer.output_scaler,
    }
    arrays: dict[str, Any] = {"README": np.array(README), "input_ids": input_ids.cpu().numpy()}
    scaled: list[ndarray] = []
    with torch.no_grad():
        for (name, place), x in zip(places.items(), caught, strict=True):
            x = x.double()
            arrays[f"{name}_in"] = _array(x[0, place])
            scaled.append(_array(scalers[name](x)[0, place]))
            arrays[name] = scaled[-1]
        found = head_vectors(*scaled, cell=mixer.cell, window=mixer.window)
        for name, scaler in scalers.items():
            place = places.get(name, head)
            arrays[f"{name}_scaler"] = np.array([scaler.scale[place].item(), scaler.offset[place].item()])
        every_head = torch.from_numpy(found["output"]).expand(1, heads, -1, -1).to(mixer.output_scaler.scale.device)
        arrays["output_scaled"] = _array(mixer.output_scaler(every_head)[0, head])
    constants = {"window": mixer.window, "layer": layer, "head": head, "key_value_head": group}
    arrays["constants"] = np.array(json.dumps({"cell": mixer.cell.to_dict(), **constants}))
    return arrays | found


def check_vectors_path(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse a file that is there, and a name that numpy would not load as an archive.

    Raises:
        UserError: either of them.
    """
    if Path(path).suffix != ".npz":
        raise UserError(f"{path} must end in .npz: the vectors are an archive of numpy arrays.")
    if Path(path).is_dir() or (Path(path).exists() and not overwrite):
        raise UserError(f"{path} exists already: replace it with --overwrite, or name another file.")


def save_vectors(path: str | os.PathLike[str], arrays: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write the arrays as a compressed .npz file, whole or not at all.

    Raises:
        UserError: the file is there and is not to be replaced, or cannot be written.
    """
    check_vectors_path(path, overwrite)
    archive = io.BytesIO()
    np.savez_compressed(archive, **arrays)
    write_file(path, archive.getvalue())


def _array(x: torch.Tensor) -> ndarray:
    return x.cpu().numpy()


def _add_codes(found: dict[str, ndarray], name: str, codes: ndarray | None) -> None:
    if codes is not None:
        found[name] = codes.astype(np.int64)


def _to_levels(x: ndarray, bounds: tuple[float, float], levels: int | None) -> tuple[ndarray, ndarray | None]:
    """Clamped values on equidistant levels, and the number of each level from the lowest."""
    low, high = bounds
    x = x.clip(low, high)
    if levels is None:
        return x, None
    step = (high - low) / (levels - 1)
    codes = np.round((x - low) / step)
    return low + step * codes, codes


def _to_output_levels(y: ndarray, cell: GainCell) -> tuple[ndarray, ndarray | None]:
    """A tile's output between -1 and 1 on its grid, and the signed number of each level."""
    y = y.clip(-1, 1)
    if cell.output_levels is None:
        return y, None
    step = 1 / (cell.output_levels / 2 - 1) if cell.output_grid == "symmetric" else 2 / (cell.output_levels - 1)
    codes = np.round(y / step)
    return step * codes, codes


def _charge(u: ndarray, cell: GainCell) -> ndarray:
    """Charge of deviations for a pulse of width 1."""
    c0, c1, c2, c3 = cell.polynomial
    return c0 + u * (c1 + u * (c2 + u * c3))
