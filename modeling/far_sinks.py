"""Attention sinks in texts longer than the teacher's positions: they follow at a distance that the teacher knows.

A window's keys are always near, but the sinks stay at the first positions, and past the L positions of a rotary
teacher (`max_position_embeddings`) they lie farther off than it ever saw. So token n >= L of a row, counted over real
tokens, reads their keys rotated on by `((n - L) // R + 1) R` positions, R = L // 4: from L - R to L behind it, or
little less. Up to L tokens nothing changes. The state after a row's token n holds the keys as that token read them; so
its count says where they are, and any cut into calls gives the same. The ops know nothing of it: a call is run in
pieces between which the keys in the state move on by R. In half precision each move rounds them once more.

Sources: positions within the cache, StreamingLLM (Xiao et al. 2023, arXiv 2309.17453). Moving in steps, so that keys
stay rotated in the state and a step does nothing, is this project's.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache_layers import StateLayer
from .packing import Packing, counted


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a call, and the rows whose sinks move on before them: all or none, or `(B,)`."""

    start: int
    stop: int
    moved: bool | Tensor


class FarSinks:
    """How the layers of a model run one call.

    Args:
        texts: the pieces of each packed text, in their order in the joined row; of other calls a single list.
        rotate: keys `(B, G, S, D)` -> the same keys R positions on.
    """

    def __init__(self, texts: list[list[Piece]], rotate: Callable[[Tensor], Tensor]):
        self.texts, self.rotate = texts, rotate

    def run(
        self,
        mixer: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        padding_mask: Tensor | None,
        cache_layer: StateLayer | None,
        arm: str,
        **context: Tensor,
    ) -> Tensor:
        """What a mixer with sinks gives on the call; arguments as it takes them, packed texts in a joined row."""
        outputs = []
        for pieces in self.texts:
            layer = StateLayer() if cache_layer is None else cache_layer
            for start, stop, moved in pieces:
                if moved is not False:
                    layer.state = self._moved(layer.state, moved)
                tokens = slice(start, stop)
                part = [x[:, :, tokens] for x in inputs]
                read = {name: x[:, :, tokens] for name, x in context.items()}
                mask = None if padding_mask is None else padding_mask[:, tokens]
                outputs.append(mixer(*part, mask, cache_layer=layer, arm=arm, **read))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _moved(self, state: Any, rows: bool | Tensor) -> Any:
        key = self.rotate(state.sink_key)
        if isinstance(rows, Tensor):
            key = torch.where(rows.to(key.device)[:, None, None, None], key, state.sink_key)
        return state._replace(sink_key=key)


def plan_far_sinks(
    model: Any, inputs_embeds: Tensor, padding_mask: Tensor | None, cache: Any, packing: Packing | None = None
) -> dict[str, FarSinks]:
    """How a call of a rotary base model is run, as an argument of its layers; nothing where no row can pass L tokens.

    Below L no device is asked. Above, a GPU is waited for where several tokens come with a cache, a mask or packing.
    """
    limit, (batch, tokens) = sink_limit(model), inputs_embeds.shape[:2]
    seen = 0 if cache is None else cache.get_seq_length()
    if limit is None or isinstance(seen, Tensor) or seen + tokens <= limit:  # a tensor: a stock model's static cache
        return {}
    if cache is not None and any(getattr(layer, "buffers", None) is not None for layer in cache.layers):
        return {}  # a decoding session moves its own, see `move_sinks_`
    count = None if cache is None else counted(cache)
    if packing is not None:
        texts = _between(packing.cu_seqlens.tolist(), limit)
    elif count is None and padding_mask is None:
        texts = _between([0, tokens], limit)
    else:
        count = torch.zeros(batch, dtype=torch.int64) if count is None else count
        texts = _pieces(count.to(inputs_embeds.device), padding_mask, tokens, limit)
    if not any(piece.moved is not False for pieces in texts for piece in pieces):
        return {}
    return {"far_sinks": FarSinks(texts, model.key_rotation(_step(limit)))}


def sink_limit(model: Any) -> int | None:
    """L of a base model; None where sinks never move: there are none, positions are learned, or their scaling changes
    with the length of the text (`dynamic`), so that a rotation cannot be gone on from."""
    rotary: Any = getattr(model, "rotary_emb", None)
    if model.key_rotation is None or getattr(rotary, "rope_type", None) == "dynamic":
        return None
    return model.config.max_position_embeddings if any(x.get("sinks") for x in model.config.mixers.values()) else None


def move_sinks_(model: Any, sink_keys: list[Tensor], count: Tensor, real: Tensor) -> None:
    """Move the sinks' keys of a decoding session's layers in place, where the next token of a row has to read them
    farther on; for rows that may be past L tokens. Waits for a GPU.

    Args:
        model: base model. sink_keys: `(B, G, S, D)` of each layer. count: `(B,)`, tokens so far. real: `(B,)`, the
            rows that take a token.
    """
    limit = sink_limit(model)
    if limit is None:
        return
    moved = _due(count, limit) & real
    if bool(moved.any()):
        rotate = model.key_rotation(_step(limit))
        for key in sink_keys:
            key.copy_(torch.where(moved[:, None, None, None], rotate(key), key))


def _step(limit: int) -> int:
    return max(limit // 4, 1)


def _due(index: Tensor, limit: int) -> Tensor:
    """Whether the sinks move on before the token of this index in its row."""
    past = index - limit
    return (past >= 0) & (past % _step(limit) == 0)


def _between(bounds: list[int], limit: int) -> list[list[Piece]]:
    """The pieces of texts between these bounds, each read from its start."""
    texts = []
    for start, stop in pairwise(bounds):
        cuts = [start, *range(start + limit, stop, _step(limit)), stop]
        texts.append([Piece(a, b, moved=a > start) for a, b in pairwise(cuts)])
    return [pieces for pieces in texts if pieces[0].stop > pieces[0].start]


def _pieces(count: Tensor, padding_mask: Tensor | None, tokens: int, limit: int) -> list[list[Piece]]:
    """The pieces of a call of rows that have had `count` `(B,)` tokens: cut wherever one row's sinks move on."""
    if padding_mask is None:
        moved = _due(count[:, None] + torch.arange(tokens, device=count.device), limit)
    else:
        real = padding_mask.bool()
        moved = _due(count[:, None] + real.cumsum(1) - 1, limit) & real
    if tokens == 1 and moved.device.type != "cpu":
        return [[Piece(0, 1, moved[:, 0])]]
    columns = moved.any(0).nonzero()[:, 0].tolist()
    cuts = [0, *(x for x in columns if x), tokens]
    due = set(columns)
    return [[Piece(a, b, moved[:, a] if a in due else False) for a, b in pairwise(cuts)]]
