"""Rows of documents and images, written down by their lengths.

Axes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What stands where."""

    document_ids_BS: Tensor
    span_ids_BS: Tensor


def rows(length: int, *written: Sequence[str]) -> Rows:
    """Each row is its documents, such as "t5 i16 t3": 5 positions of text, an image of 16, 3 of text. Padding fills the rest."""
    document_ids_BS = torch.full((len(written), length), -1)
    span_ids_BS = torch.full((len(written), length), -1)
    for b, documents in enumerate(written):
        place = image = 0
        for number, document in enumerate(documents):
            for kind, positions in ((part[0], int(part[1:])) for part in document.split()):
                document_ids_BS[b, place : place + positions] = number
                if kind == "i":
                    span_ids_BS[b, place : place + positions] = image
                    image += 1
                place += positions
        assert place <= length
    return Rows(document_ids_BS, span_ids_BS)


MIXED = {
    "short of a block": rows(48, ["t5 i16 t3", "i16 t4"], ["t9"], []),
    "a block": rows(128, ["t20 i64 t10", "i16 t9"], ["t128"]),
    "no multiple of a block": rows(200, ["t120 i16 t10 i40 t9"], ["t3 i64", "i64 t20", "t40"], ["i150 t5"]),
    "images over the borders of blocks": rows(400, ["t127 i2 t100 i64 t80"], ["i129 t1", "t124 i140"], ["t60", "i320 t2"], []),
    "images that end at borders": rows(384, ["t64 i64 t64 i64 t128"], ["i128", "i256"]),
}
