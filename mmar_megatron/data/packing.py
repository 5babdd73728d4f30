"""Which documents share a sequence of fixed length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOOD = 0.99
"""Share of positions in use that cannot be bettered by much."""
_TRIES = 8
"""Documents, from the longest on, for which two others are looked for that fill a row to the end."""


def pack(lengths_D: NDArray[np.int64], *, sequence_length: int) -> list[list[int]]:
    """Best fit, and where that leaves much unused, exact fit if it takes fewer sequences.

    Args:
        lengths_D: positions of each document, at least 1 and at most `sequence_length`.

    Returns:
        Of each sequence, its documents, by their numbers in `lengths_D`.
    """
    rows = best_fit(lengths_D, sequence_length=sequence_length)
    if lengths_D.sum() >= _GOOD * sequence_length * (len(rows) - 1):  # the last one takes what is left over, and may be short
        return rows
    return min(rows, exact_fit(lengths_D, sequence_length=sequence_length), key=len)


def best_fit(lengths_D: NDArray[np.int64], *, sequence_length: int) -> list[list[int]]:
    """Best-fit decreasing: the longest document first, each into the fullest sequence that has room for it.

    It needs at most 11/9 of the fewest possible sequences and 4 more (Johnson et al., "Worst-case performance bounds for simple
    one-dimensional packing algorithms", SIAM J. Comput. 3, 1974); where many documents are short, next to none beyond the fewest.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # those of `with_room` that have a row, in rising order
    lengths: Sequence[int] = lengths_D.tolist()
    for document in np.argsort(-lengths_D, kind="stable").tolist():
        length = lengths[document]
        fitting = bisect_left(rooms, length)
        if fitting == len(rooms):
            row: list[int] = []
            room = sequence_length
            rows.append(row)
        else:
            room = rooms[fitting]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[fitting], with_room[room]
        row.append(document)
        left = room - length
        if left not in with_room:
            insort(rooms, left)
            with_room[left] = []
        with_room[left].append(row)
    return rows


def exact_fit(lengths_D: NDArray[np.int64], *, sequence_length: int) -> list[list[int]]:
    """One sequence after the other: the longest documents, and as soon as two or three fill it to the end, these.

    Where all documents are of about the same length, no short ones fill gaps, and it pays to look for lengths that go together.
    """
    waiting = _Waiting(lengths_D, longest=sequence_length)
    rows = []
    while waiting.lengths:
        row, room = [], sequence_length
        while length := waiting.next_length(room):
            row.append(waiting.take(length))
            room -= length
        rows.append(row)
    return rows


class _Waiting:
    """Documents by length. Which lengths there are is a set of bits, so that pairs with a given sum are found at once."""

    def __init__(self, lengths_D: NDArray[np.int64], *, longest: int) -> None:
        self._longest = longest
        self._documents: dict[int, list[int]] = {}
        for document, length in enumerate(lengths_D.tolist()):
            self._documents.setdefault(length, []).append(document)
        self.lengths = sum(1 << length for length in self._documents)
        self._mirrored = sum(1 << longest - length for length in self._documents)

    def take(self, length: int) -> int:
        """One of the documents of this length."""
        documents = self._documents[length]
        document = documents.pop()
        if not documents:
            self.lengths ^= 1 << length
            self._mirrored ^= 1 << self._longest - length
        return document

    def next_length(self, room: int) -> int:
        """Of the document that is to be taken next into a row with so much room; 0 if none fits."""
        fitting = self.lengths & (2 << room) - 1
        longest = fitting.bit_length() - 1
        if longest in (-1, room):
            return max(longest, 0)
        if pair := self._longer_of_pair(room):
            return pair
        for _ in range(_TRIES):
            if (length := fitting.bit_length() - 1) <= 0:
                break
            if self._longer_of_pair(room - length):
                return length
            fitting ^= 1 << length
        return longest

    def _longer_of_pair(self, total: int) -> int:
        """Of two documents with this sum of lengths; 0 if there are none."""
        pairs = self.lengths & self._mirrored >> self._longest - total
        longer = pairs.bit_length() - 1
        if longer < 0 or (2 * longer == total and len(self._documents[longer]) < 2):
            return 0
        return longer
