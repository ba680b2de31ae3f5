"""Texts kept apart in a row, and rows that whole documents are fitted into.

A row's position_ids start again with each of its texts, by which transformers' models and converted ones keep them
apart. Best-fit decreasing (Ding et al. 2024, arXiv 2404.10830) gives every document, the longest first, the fullest
row that still has room for it, so that only documents longer than a row are cut; what stays free of a row is padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

CHUNK_ROWS = 1024
"""Rows that are made at once."""


class Places:
    """The place of each token in its document, an array as far as it is sliced.

    Args:
        ends: (documents,) int64, where each document stops in the stream, in order.
    """

    def __init__(self, ends: np.ndarray) -> None:
        self.ends = ends
        self.starts = np.concatenate([[0], ends[:-1]])

    def __getitem__(self, span: slice) -> np.ndarray:
        tokens = np.arange(span.start, span.stop)
        return tokens - self.starts[np.searchsorted(self.ends, tokens, side="right")]


def row_positions(places: np.ndarray) -> np.ndarray:
    """Positions (rows, L) of a stream that is cut into rows: a document that started before its row starts with it.

    Args:
        places: (rows, L), of the tokens in their documents.
    """
    return np.minimum(places, np.arange(places.shape[1]))


class Piece(NamedTuple):
    """A document, or a row's length of a longer one: tokens [start, stop) of the stream."""

    start: int
    stop: int


def cut_documents(ends: np.ndarray, ranges: Iterable[tuple[int, int]], most: int) -> Iterator[Piece]:
    """The documents in the stretches of a stream, in order, those longer than `most` tokens cut."""
    for start, stop in ranges:
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        for end in ends[first : last + 1].tolist():
            end = min(end, stop)
            for place in range(start, end, most):
                yield Piece(place, min(place + most, end))
            start = end


def best_fit(pieces: list[Piece], length: int) -> list[list[Piece]]:
    """Rows of at most `length` tokens by best-fit decreasing; equal lengths and rows in the order they came."""
    rows: list[list[Piece]] = []
    open_rows: dict[int, list[int]] = {}  # by how many tokens are free
    free: list[int] = []  # its keys, in order
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.stop):
        size = piece.stop - piece.start
        place = bisect.bisect_left(free, size)
        if place == len(free):
            row, room = len(rows), length
            rows.append([])
        else:
            room = free[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], free[place]
        rows[row].append(piece)
        if room > size:
            if room - size not in open_rows:
                bisect.insort(free, room - size)
            open_rows.setdefault(room - size, []).append(row)
    return rows


class FittedRows:
    """Rows that whole documents are fitted into, padded where they end.

    Args:
        ends: (documents,) where they stop in the stream. ranges: the stretches of it to take. length: tokens of a row.

    Attributes:
        count: rows. left_over: tokens that are in none. lengths: (rows,) tokens of each without padding.
    """

    def __init__(self, ends: np.ndarray, ranges: Iterable[tuple[int, int]], length: int) -> None:
        self.length, self.left_over = length, 0
        self._rows = best_fit(list(cut_documents(ends, ranges, length)), length)
        self.count = len(self._rows)
        self.lengths = np.array([sum(piece.stop - piece.start for piece in row) for row in self._rows], np.int32)

    def of(self, stream: np.ndarray) -> Iterator[np.ndarray]:
        """The rows of a stream, some (n, length) at a time, 0 at padding."""
        for rows in self._chunks():
            chunk = np.zeros((len(rows), self.length), dtype=stream.dtype)
            for target, row in zip(chunk, rows, strict=True):
                part = np.concatenate([stream[piece.start : piece.stop] for piece in row])
                target[: len(part)] = part
            yield chunk

    def real(self) -> Iterator[np.ndarray]:
        """Which tokens are no padding, alike."""
        for start in range(0, self.count, CHUNK_ROWS):
            yield np.arange(self.length) < self.lengths[start : start + CHUNK_ROWS, None]

    def positions(self) -> Iterator[np.ndarray]:
        """Positions alike: every document starts again, and the padding behind them is a text of its own."""
        for rows in self._chunks():
            chunk = np.empty((len(rows), self.length), dtype=np.int32)
            for target, row in zip(chunk, rows, strict=True):
                sizes = [piece.stop - piece.start for piece in row]
                target[:] = np.concatenate([np.arange(size) for size in [*sizes, self.length - sum(sizes)]])
            yield chunk

    def _chunks(self) -> Iterator[list[list[Piece]]]:
        return (self._rows[start : start + CHUNK_ROWS] for start in range(0, self.count, CHUNK_ROWS))
