"""Landmark tokens: put between a call's tokens before the layers and taken out behind them.

A user never sees one: token ids, masks, labels and logits are landmark-free. A landmark follows every F real tokens
of a row, counted from its first; the last, incomplete block of a row has none yet.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from .counter_draws import draw_words
from .packing import Packing


@dataclass
class Landmarks:
    """Where the landmarks of one call stand. T tokens of the call become L, with landmarks and what evens out rows.

    Attributes:
        position: `(B, L)`, place in the row, in its text where several are packed, landmarks counted; -1 = padding.
        position_is_simple: whether it is 0 to L - 1 in every row.
        tokens: T.
        source: `(B, L)`: the token that stands there; T a landmark, T + 1 nothing.
        slot: `(B, T)`: where a token stands. ends: `(B, T)`, whether a landmark follows it.
        rotary: cosines and sines `(M, D)` of the positions 0 to M - 1, or None.
        packing: the texts of the L tokens where several are packed into a row, else None.
    """

    position: Tensor
    position_is_simple: bool
    tokens: int
    source: Tensor
    slot: Tensor
    ends: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    packing: Packing | None = None
    seen: Tensor | None = None  # what `visible` gave, for the other layers
    seeds: Tensor | None = None  # in training `(texts,)`, int64: what a text's draws are made from
    drawn: Tensor | None = None  # in training `(texts, 2)`, random in [0, 1): one draw for all layers

    @classmethod
    def plan(
        cls, real: Tensor, past: Tensor | None, block_size: int, simple: bool, packing: Packing | None = None
    ) -> "Landmarks":
        """Place the landmarks.

        Args:
            real: `(B, T)`, which tokens are no padding.
            past: `(B,)`, earlier tokens of each row, landmarks counted; None at the start.
            simple: whether no token is padding, which need not be asked then.
            packing: the texts of the T tokens where several are packed into a row: blocks count from a text's start.
        """
        (batch, tokens), device, size = real.shape, real.device, block_size - 1
        before = real.new_zeros(batch, dtype=torch.long) if past is None else past - past // block_size
        order = before[:, None] + real.long().cumsum(1) - real.long()  # of a token among its row's real ones
        if packing is not None:
            order = packing.place
        ends = real & (order % size == size - 1)
        inserted = ends.long().cumsum(1) - ends.long()
        total = ends.sum(1)
        simple = simple and past is None
        most = tokens // size  # of a row without padding that starts here: one more at most if it goes on
        if not simple:
            most = most + (past is not None) if torch.compiler.is_compiling() else int(total.max())
        length = tokens + most
        slot = torch.arange(tokens, device=device) + inserted + (most - total)[:, None]
        place = torch.where(real, order + order // size, -1)
        source = torch.full((batch, length + 1), tokens + 1, device=device)
        position = torch.full((batch, length + 1), -1, device=device)
        source.scatter_(1, slot, torch.arange(tokens, device=device).expand(batch, -1).contiguous())
        position.scatter_(1, slot, place)
        behind = torch.where(ends, slot + 1, length)
        source.scatter_(1, behind, tokens)
        position.scatter_(1, behind, place + 1)
        position = position[:, :length]
        if packing is not None:
            # To a single row without padding landmarks bring none, unless a trace leaves room for as many as may be.
            alone = packing.source is None and not torch.compiler.is_compiling()
            packing = Packing.of(position == 0, None if alone else position >= 0)
        return cls(position, simple, tokens, source[:, :length], slot, ends, packing=packing)

    @property
    def texts(self) -> int:
        """Rows, or texts where several are packed into a row."""
        return self.position.shape[0] if self.packing is None else self.packing.cu_seqlens.shape[0] - 1

    def of_text(self, number: int, tokens: int) -> "Landmarks":
        """Those of one of the packed texts, of so many tokens, landmarks counted, as if it were alone."""
        position = torch.arange(tokens, device=self.position.device)[None]
        drawn = None if self.drawn is None else self.drawn[number : number + 1]
        return replace(self, position=position, position_is_simple=True, packing=None, seen=None, drawn=drawn)

    def insert(self, embeddings: Tensor, landmark: Tensor) -> Tensor:
        """`(B, T, width)` to `(B, L, width)`."""
        rows = landmark.to(embeddings).expand(embeddings.shape[0], 1, -1)
        return _along(torch.cat([embeddings, rows, torch.zeros_like(rows)], dim=1), self.source)

    def visible(self, block_size: int) -> Tensor:
        """`(B, L, L)`, `(1, L, L)` where rows are alike: the tokens that a row's softmax attention without landmarks
        may see, made once for all layers. Padding sees its own place, so that no softmax is empty."""
        if self.seen is None:
            position = self.position[:1] if self.position_is_simple else self.position
            token = (position >= 0) & (position % block_size != block_size - 1)
            self.seen = (position[:, None] <= position[..., None]) & token[:, None]
            if self.packing is not None:
                self.seen = self.seen & (self.packing.text[:, None] == self.packing.text[..., None])
            if not self.position_is_simple:
                place = torch.arange(position.shape[1], device=position.device)
                self.seen = self.seen | ((position < 0)[..., None] & (place[:, None] == place))
        return self.seen

    def padding(self) -> Tensor:
        """`(B, 1, L, 1)`, the places of padding."""
        return (self.position < 0)[:, None, :, None]

    def to(self, device, non_blocking: bool = False) -> "Landmarks":
        """A copy on another device, for layers that lie there."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if self.rotary is not None:
            moved["rotary"] = tuple(x.to(device, non_blocking=non_blocking) for x in self.rotary)
        if self.packing is not None:
            moved["packing"] = self.packing.to(device, non_blocking)
        return replace(self, **moved)

    def extract(self, hidden: Tensor, after: bool = False) -> Tensor:
        """`(B, L, width)` to `(B, T, width)`; `after`: of a token that a landmark follows, the landmark's."""
        return _along(hidden, self.slot + self.ends.long() if after else self.slot)


def _along(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))


class LandmarkTokens(nn.Module):
    """What a model learns of its landmarks, float32: their embedding, and where they are predicted, an output row.

    Args:
        config: settings of landmark attention. reach: positions that its retrieval counts with, in any layer.
        width: of the embeddings. deviation: of the first values.

    Attributes:
        include_in_loss: whether the model around predicts them, which needs its language-modelling head.
    """

    def __init__(self, config, reach: int, width: int, deviation: float):
        super().__init__()
        self.reach = reach
        self.block_size, self.deviation = config.block_size, deviation
        self.include_in_loss = config.include_landmark_in_loss
        self.embedding = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.output = nn.Parameter(torch.empty(width, dtype=torch.float32)) if self.include_in_loss else None
        self.call: tuple[Landmarks, Tensor] | None = None  # the last one, for the loss of published labels
        self.row_seeds: Tensor | None = None  # `(B,)`, int64: of the next call in training

    def __getstate__(self) -> dict:
        """For copies and pickles, which leave the last call and the next one's seeds behind."""
        return {**self.__dict__, "call": None, "row_seeds": None}

    def take_row_seeds(self, rows: int, device: torch.device) -> Tensor:
        """Seeds `(B,)` of a call's draws in training: those that `row_seeds` names, used up by this, so that draws are
        a row's own however a batch is cut; else random ones, and other ones on each process."""
        seeds, self.row_seeds = self.row_seeds, None
        if seeds is not None:
            return seeds.to(device)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return draw_words(torch.randint(2**62, (rows,), device=device), rank)

    def reset_parameters(self) -> None:
        for row in self.parameters():
            init.normal_(row, std=self.deviation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The embedding and the output row, `(width,)` each; x as in `FeatureMap`."""
        return self.embedding, self.output

    @torch.no_grad()
    def start_from(self, embeddings: Tensor, outputs: Tensor) -> None:
        """The mean of all rows, as the paper's code starts new entries of a vocabulary."""
        self.embedding.copy_(embeddings.float().mean(0))
        if self.output is not None:
            self.output.copy_(outputs.float().mean(0))


def published_loss(
    tokens: LandmarkTokens, head: Callable[[Tensor], Tensor], logits: Tensor, labels: Tensor, num_items_in_batch=None
) -> Tensor:
    """The published labels: a block's last token predicts the landmark, the landmark predicts the next token, and both
    choose among the vocabulary and the landmark. No landmark ends a row: what nothing follows is no target.

    Args:
        tokens: with the call of the base model.
        head: of the model. logits: `(B, T, V)`, a landmark's where one follows. labels: `(B, T)`, -100 = none.
        num_items_in_batch: labels of the whole global batch; None: those here.

    Returns:
        Nats per target, landmarks among them. A global batch is counted without its landmarks: they are taken to be as
        many for a label as in a whole row of T, so that micro-batches add up however they are cut.
    """
    _, row = tokens(logits)
    assert row is not None, "landmarks are predicted"
    if tokens.call is None:
        raise ValueError("published landmark labels are counted within the model's call: give it the labels")
    landmarks, states = tokens.call
    count = logits.shape[-1]

    def total(states: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        extra = states.to(row.dtype) @ row
        logits = torch.cat([logits.to(extra.dtype), extra[..., None]], dim=-1)
        return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum")

    after = landmarks.extract(states, after=True)
    loss = total(after[:, :-1], logits[:, :-1], labels[:, 1:])
    real = landmarks.position.gather(1, landmarks.slot) >= 0
    followed = real.flip(1).cumsum(1).flip(1) > 1
    last = landmarks.extract(states)[landmarks.ends & followed & (labels != -100)]
    landmark = labels.new_full(last.shape[:1], count)
    loss = loss + total(last, head(last), landmark)
    if num_items_in_batch is None:
        return loss / ((labels[:, 1:] != -100).sum() + len(landmark)).clamp(min=1)
    words = max(1, labels.shape[1] - 1)
    return loss / (num_items_in_batch * (1 + words // (tokens.block_size - 1) / words))


def forget_call(model, args, output) -> None:
    """After a language model's forward, whose loss has read the call: it would keep the graph of the whole model."""
    model.base_model.mixer.call = None


def through_landmarks(forward: Callable) -> Callable:
    """Around a base model's forward: it gets embeddings with landmarks among them and gives states without.

    The model's `landmarks` are a `LandmarkTokens` in its student arm where it has landmark layers, else None.
    """
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        tokens = self.landmarks
        if tokens is None:
            return forward(self, *args, **kwargs)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        del given["self"]
        embeddings, ids = given.get("inputs_embeds"), given.pop("input_ids", None)
        if (embeddings is None) == (ids is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if embeddings is None:
            embeddings = self.get_input_embeddings()(ids)
        mask = given.get("attention_mask")
        if given.get("token_type_ids") is not None:
            raise ValueError("a model with landmark attention takes no token_type_ids: leave them out")
        return_dict = given.pop("return_dict", None)
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in self.decoder_layers())
        if self.training and (given.get("past_key_values") is None or checkpointed):
            given |= {"use_cache": False, "past_key_values": None}  # what trains sees all blocks, a cache retrieves
        landmarks = self.place_landmarks(embeddings, mask, given.get("past_key_values"), given.pop("packing", None))
        given["inputs_embeds"] = landmarks.insert(embeddings, tokens(embeddings)[0])
        given["attention_mask"] = None if landmarks.position_is_simple else landmarks.position >= 0
        given["position_ids"] = landmarks.position.clamp(min=0)
        output = forward(self, **given, return_dict=True, landmarks=landmarks)
        last = output["last_hidden_state"]
        if tokens.include_in_loss:
            tokens.call = landmarks, last
        output["last_hidden_state"] = landmarks.extract(last, after=tokens.include_in_loss)
        if output.get("hidden_states") is not None:
            before = (landmarks.extract(x) for x in output["hidden_states"][:-1])
            output["hidden_states"] = (*before, output["last_hidden_state"])
        as_output = self.config.return_dict if return_dict is None else return_dict
        return output if as_output else output.to_tuple()

    return wrapped
