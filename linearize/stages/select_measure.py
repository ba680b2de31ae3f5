"""What every layer loses with a window in place of softmax attention over the whole text, for a few windows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from linearize.errors import UserError
from linearize.evaluation.arms import input_device, measuring
from linearize.modeling.decoding import replace_forward
from linearize.processes import own_place
from linearize.stages.select_plan import KEPT
from linearize.stages.transfer_loss import relative_mse
from linearize.training.losses import at_least_float32

POSITIONS = 1024
"""Positions whose probabilities exist at one time."""


@dataclass
class LayerTables:
    """What was measured: `error` and `divergence` by layer and window, on `tokens` tokens in pieces of
    `sequence_length`; `seconds` that it took."""

    windows: list[int]
    kept: list[int]
    """Tokens kept beside each window."""
    error: list[list[float]]
    """Squared error of the layer's own attention over the square of softmax attention's output."""
    divergence: list[list[float]]
    """Nats a token: KL divergence of the model's output from the teacher's when this layer alone has the window."""
    tokens: int
    sequence_length: int
    seconds: float


def measured_pieces(rows: Any, tokens: int, length: int) -> Tensor:
    """Pieces of text of a length of their own, evenly over the training sequences, each of neighbouring ones.

    Args:
        rows: training sequences, `[i] -> {"input_ids": (L,)}` with an `attention_mask` where padded.
        tokens: of all pieces at most, but for one piece.
        length: tokens of a piece.

    Returns:
        `(pieces, length)`.

    Raises:
        UserError: the sequences do not fill one piece.
    """
    together = -(-length // rows.sequence_length)
    count = min(max(1, tokens // length), len(rows) // together)
    pieces = [_piece(rows, place * len(rows) // count, length) for place in range(count)]
    whole = [piece for piece in pieces if len(piece) == length]
    if not whole:
        raise UserError(
            f"The training data hold {len(rows)} sequences of {rows.sequence_length} tokens, which do not fill one "
            f"measured piece of {length}: give more text, or lower select.sequence_length."
        )
    return torch.stack(whole)


def _piece(rows: Any, start: int, length: int) -> Tensor:
    """Up to `length` real tokens from a row on."""
    parts: list[Tensor] = []
    while start < len(rows) and sum(map(len, parts)) < length:
        row = rows[start]
        parts.append(row["input_ids"][row["attention_mask"].bool()] if "attention_mask" in row else row["input_ids"])
        start += 1
    return torch.cat(parts)[:length]


def layer_tables(
    model: Any, pieces: Tensor, windows: Sequence[int], kept: Sequence[int] | None = None, batch_size: int = 1
) -> LayerTables:
    """Measure every layer with every window, and tokens kept beside it, with the sinks that it has.

    The layers before the one that is measured are as the teacher's, so they do not run again: what they gave is
    replayed. Memory holds the hidden states of all layers and the teacher's logits for the pieces of one batch. Every
    process calls it; they share out the layers, and all get the same tables.

    Args:
        model: an untrained student, every layer converted to a mechanism with a softmax window.
        pieces: `(pieces, length)` token ids.
        windows: tokens. kept: tokens kept beside each of them, None for none. batch_size: pieces at once.
    """
    start = time.perf_counter()
    layers, device = len(model.decoder_layers()), input_device(model)
    totals = torch.zeros(3, layers, len(windows), dtype=torch.float64)
    place, processes = own_place()
    kept = [0] * len(windows) if kept is None else kept
    options = list(zip(windows, kept, strict=True))
    own = [_sight(attention.mixer) for attention in model.mixer_attentions()]
    rounds = -(-len(pieces) // batch_size)
    shown = {"desc": "measuring layers", "unit": "window", "leave": False, "disable": place > 0}
    progress = tqdm(total=rounds * len(range(0, layers, processes)) * len(windows), **shown)
    try:
        with measuring(model, "teacher"), progress:
            for ids in pieces.split(batch_size):
                _measure(model, ids.to(device), options, totals, progress)
    finally:
        for attention, option in zip(model.mixer_attentions(), own, strict=True):
            _see(attention.mixer, option)
            attention.observer = None
    if processes > 1:  # of the errors, which all have taken, errors and scales are as many times as large
        totals = totals.to(device)
        torch.distributed.all_reduce(totals)
    errors, scales, divergences = totals
    return LayerTables(
        list(windows),
        list(kept),
        (errors / scales).tolist(),
        (divergences / pieces.numel()).tolist(),
        pieces.numel(),
        pieces.shape[1],
        round(time.perf_counter() - start, 1),
    )


def _sight(mixer: Any) -> tuple[int, int]:
    """A layer's window and kept tokens."""
    return mixer.window, getattr(mixer, KEPT, 0)


def _see(mixer: Any, option: tuple[int, int]) -> str:
    """Give a layer a window and kept tokens; returns the arm that has both and nothing else."""
    mixer.window = option[0]
    if not hasattr(mixer, KEPT):
        return "softmax"
    setattr(mixer, KEPT, option[1])
    return "mixed"


def _measure(model: Any, ids: Tensor, options: Sequence[tuple[int, int]], totals: Tensor, progress: Any) -> None:
    """Add up one batch: squared errors, the squares that they are measured by, and divergences."""
    layers, attentions = model.decoder_layers(), model.mixer_attentions()
    own, processes = own_place()
    outputs: list[Any] = []
    with contextlib.ExitStack() as watched:
        for layer in layers:
            hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            watched.callback(hook.remove)
        for attention in attentions:
            attention.observer = _observer(options, totals)
        teacher = _logits(model, ids)
    for attention in attentions:
        attention.observer = None
    with contextlib.ExitStack() as replayed:
        for place, (layer, attention) in enumerate(zip(layers, attentions, strict=True)):
            for number, option in enumerate(options if place % processes == own else ()):
                attention.arm = _see(attention.mixer, option)
                totals[2, place, number] += _divergence(teacher, _logits(model, ids))
                progress.update()
            attention.arm = "teacher"
            replayed.callback(replace_forward(layer, _always(outputs[place])))


def _always(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _logits(model: Any, ids: Tensor) -> Tensor:
    """`(B * T, vocabulary)`, in the model's dtype."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden.flatten(0, 1))


def _observer(options: Sequence[tuple[int, int]], totals: Tensor) -> Callable[..., None]:
    """Takes every option's error in a layer from the queries, keys and values of the teacher's forward."""

    def observe(attention, query, key, value, output, padding_mask=None, **call) -> None:
        for number, option in enumerate(options):
            arm = _see(attention.mixer, option)
            ours = attention.mix(query, key, value, padding_mask=padding_mask, arm=arm, **call)
            error, scale = relative_mse(ours, output, padding_mask)
            totals[0, attention.layer_idx, number] += float(error)
            totals[1, attention.layer_idx, number] += float(scale)

    return observe


def _divergence(teacher: Tensor, student: Tensor) -> float:
    """KL(teacher, student) summed over tokens, from logits `(tokens, vocabulary)`."""
    total = 0.0
    for parts in zip(teacher.split(POSITIONS), student.split(POSITIONS), strict=True):
        target, ours = (at_least_float32(part).log_softmax(-1) for part in parts)
        total += float(functional.kl_div(ours, target, reduction="sum", log_target=True))
    return total
