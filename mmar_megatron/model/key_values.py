"""Keys and values of positions that passed before, for attention of those that follow.

Axes: B sequences, G key-value groups, S positions of a pass, T positions kept, E width of a head, K positions written over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mmar_megatron.model.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Overwriting:
    """Positions of a pass that take the place of kept ones; its other positions are filler, and are not kept."""

    row_K: Tensor
    """The sequence."""
    kept_K: Tensor
    """Which of its kept positions."""
    new_K: Tensor
    """By which of the pass."""

    @classmethod
    def of_images(cls, tokens: Selection, *, begin: int) -> Self:
        """A pass over some tokens of images, of which one in each row is kept, from position `begin` on."""
        row_K, place_K, column_K = tokens.entries
        return cls(row_K=row_K, kept_K=begin + place_K, new_K=column_K)


class KeyValueCache:
    """Of all layers. A pass goes behind what is kept, and is kept itself where it is committed; or it writes over a part of that.

    Attributes:
        valid_BT: bool, False at padding; none while nothing is kept.
        overwriting: what the next passes write over; none: they go behind.
    """

    def __init__(self) -> None:
        self.valid_BT: Tensor | None = None
        self.overwriting: Overwriting | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._new: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        """Positions kept."""
        return 0 if self.valid_BT is None else self.valid_BT.shape[1]

    def update(self, key_BGSE: Tensor, value_BGSE: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values that this pass may see in a layer, [B, G, T + S, E]; [B, G, T, E] where it writes over."""
        if self.overwriting is not None:
            over, kept = self.overwriting, self._kept[layer]
            for kept_BGTE, new_BGSE in zip(kept, (key_BGSE, value_BGSE), strict=True):
                kept_BGTE[over.row_K, :, over.kept_K] = new_BGSE[over.row_K, :, over.new_K]
            return kept
        self._new[layer] = (key_BGSE, value_BGSE)
        return self._joined(layer)

    def commit(self, valid_BS: Tensor) -> None:
        """Keep the last pass, in which these positions are not padding."""
        self._kept = {layer: self._joined(layer) for layer in self._new}
        self._new = {}
        self.valid_BT = valid_BS if self.valid_BT is None else torch.cat((self.valid_BT, valid_BS), dim=1)

    def _joined(self, layer: int) -> tuple[Tensor, Tensor]:
        key, value = self._new[layer]
        if layer not in self._kept:
            return key, value
        kept_key, kept_value = self._kept[layer]
        return torch.cat((kept_key, key), dim=2), torch.cat((kept_value, value), dim=2)
