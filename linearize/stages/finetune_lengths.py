"""The sequences of stage 2 where they are not the data's: longer ones, several lengths in turn, and the piece of text
before each, whose state they start from.

A row of the longest length is made of rows of the data that follow each other. A step cuts its rows into pieces of its
own length, so that every step has as many tokens as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from linearize.errors import UserError

if TYPE_CHECKING:
    from linearize.config.settings import FinetuneConfig
    from linearize.data.sequences import TokenBlocks

PREVIOUS = "previous_ids"
"""Name in a batch of the tokens before each row."""


class StepLengths:
    """What the sequences of each step are: a function of the step's number alone, so that a resumed run goes on as it
    would have, and every process does the same.

    The length that is furthest behind its share comes next, and of each length's own steps every so many start from a
    state: all shares are exact to one step, and no length has all the states.

    Args:
        lengths: tokens of a sequence, one or several.
        shares: of the steps, one for each length; None: equal ones.
        state_passing: share of the steps whose sequences start from a state.
    """

    def __init__(self, lengths: Sequence[int], shares: Sequence[float] | None, state_passing: float) -> None:
        weights = [1.0] * len(lengths) if shares is None else list(shares)
        self.lengths, self.shares = list(lengths), [weight / sum(weights) for weight in weights]
        self.state_passing = state_passing
        self._given = [0] * len(lengths)
        self._steps: list[tuple[int, bool]] = []

    def of(self, step: int) -> tuple[int, bool]:
        """Of the step of this number, from 0: tokens of its sequences, and whether they start from a state."""
        while len(self._steps) <= step:
            self._steps.append(self._next())
        return self._steps[step]

    def _next(self) -> tuple[int, bool]:
        due = [share * (len(self._steps) + 1) - given for share, given in zip(self.shares, self._given, strict=True)]
        chosen = max(range(len(due)), key=due.__getitem__)
        self._given[chosen] += 1
        before, after = (int(self.state_passing * (self._given[chosen] - back) + 1e-9) for back in (1, 0))
        return self.lengths[chosen], after > before


class JoinedRows(Dataset):
    """Rows of a length that is a multiple of the data's, a map-style dataset as `TokenBlocks` is one.

    Args:
        blocks: rows that follow each other.
        length: tokens of a joined row.
        with_previous: whether an item has the tokens before it too, `previous_ids (length,)`; before the first row
            those of the last.
    """

    def __init__(self, blocks: TokenBlocks, length: int, with_previous: bool) -> None:
        self.blocks, self.sequence_length, self.with_previous = blocks, length, with_previous
        self.joined = length // blocks.sequence_length

    def __len__(self) -> int:
        return len(self.blocks) // self.joined

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._row(index)
        if self.with_previous:
            row[PREVIOUS] = self._row((index - 1) % len(self))["input_ids"]
        return row

    def _row(self, index: int) -> dict[str, Tensor]:
        rows = self.blocks[index * self.joined : (index + 1) * self.joined]
        return {name: tensor.flatten() for name, tensor in rows.items()}


def training_rows(train: TokenBlocks, config: FinetuneConfig) -> TokenBlocks | JoinedRows:
    """The rows of stage 2: those of the data, or longer ones.

    Raises:
        UserError: the lengths do not fit each other, or the rows of the data do not follow each other.
    """
    row_length = train.sequence_length
    longest = check_rows(config, row_length)
    if not changes_rows(config, row_length):
        return train
    if not train.contiguous and (longest > row_length or config.state_passing):
        raise UserError(
            f"{config.section}.sequence_length and state_passing need rows that follow each other in the text, and "
            "of this data rows without an answer are left out: set data.completion_only to false, or leave both out."
        )
    if train.lengths is not None or train.positions is not None:
        refuse_packing(config.section)
    rows = JoinedRows(train, longest, config.state_passing > 0)
    if len(rows) == 0:
        raise UserError(
            f"the training data has no whole sequence of {longest} tokens: lower {config.section}.sequence_length"
        )
    return rows


def check_rows(config: FinetuneConfig, row_length: int) -> int:
    """The longest length, where the rows of the data can be joined to it and be cut into the others.

    Raises:
        UserError: they cannot.
    """
    lengths = config.lengths(row_length)
    longest = max(lengths)
    if longest % row_length:
        raise UserError(
            f"{config.section}.sequence_length is {longest}, but rows of data.sequence_length = {row_length} tokens "
            f"are joined: give a multiple of it, such as {-(-longest // row_length) * row_length}."
        )
    if odd := [length for length in lengths if longest % length]:
        raise UserError(
            f"{config.section}.sequence_length holds {odd[0]}, which does not divide the longest, {longest}, into "
            "whole pieces: choose lengths that do."
        )
    return longest


def changes_rows(config: FinetuneConfig, row_length: int) -> bool:
    """Whether stage 2 joins or cuts the rows of the data, or needs to know what lies before them."""
    return config.lengths(row_length) != [row_length] or config.state_passing > 0


def refuse_packing(section: str) -> None:
    """Raise the sentence about data whose rows do not go on from one to the next."""
    raise UserError(
        f"{section}.sequence_length and state_passing need rows that follow each other in the text: set "
        "data.packing to stream and data.isolate_documents to false, or leave both out."
    )


def check_state_passing(config: FinetuneConfig, mechanisms: Sequence[str], context: int | None, longest: int) -> None:
    """Refuse a start from a state where there is none of constant size, or no position for what follows it.

    Args:
        mechanisms: types of attention in the model.
        context: tokens that it was made for; None: any number. longest: tokens of a sequence.

    Raises:
        UserError: one sentence.
    """
    from linearize.modeling import ATTENTIONS

    for name in mechanisms:
        if name in ATTENTIONS and not ATTENTIONS[name].constant_state:
            raise UserError(
                f"{config.section}.state_passing needs a state of constant size, and {name} attention keeps every "
                f"block: set it to 0, or give longer sequences by {config.section}.sequence_length."
            )
    if context is not None and 2 * longest > context:
        raise UserError(
            f"{config.section}.state_passing trains on positions up to {2 * longest}, twice the longest sequence, but "
            f"the teacher's context is {context} tokens: lower {config.section}.sequence_length or "
            f"data.sequence_length, or set {config.section}.state_passing to 0."
        )


def pieces(batch: dict[str, Tensor], length: int, passes_state: bool) -> dict[str, Any]:
    """A micro-batch `[B, L]` cut into pieces of a length, `[B * L / length, length]`, in the order of the text.

    With `passes_state` the tokens before each piece stay in it, as many as the piece has.
    """
    previous = batch.get(PREVIOUS)
    cut = {name: x.reshape(-1, length) for name, x in batch.items() if name != PREVIOUS}
    if passes_state:
        assert previous is not None
        before = torch.cat([previous[:, -length:], batch["input_ids"][:, :-length]], dim=1)
        cut[PREVIOUS] = before.reshape(-1, length)
    return cut
