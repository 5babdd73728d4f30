"""Which documents share a sequence of fixed length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack(lengths_D: NDArray[np.int64], *, sequence_length: int) -> list[list[int]]:
    """Best-fit decreasing: the longest document first, each into the fullest sequence that has room for it.

    It needs at most 11/9 of the fewest possible sequences and 4 more (Johnson et al., "Worst-case performance bounds for simple
    one-dimensional packing algorithms", SIAM J. Comput. 3, 1974); where many documents are short, next to none beyond the fewest.

    Args:
        lengths_D: positions of each document, at most `sequence_length`.

    Returns:
        Of each sequence, its documents, by their numbers in `lengths_D`.
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
