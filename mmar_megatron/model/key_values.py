"""Keys and values of positions that do not change any more, for attention of those that follow.

Axes: B sequences, G key-value groups, S positions of a pass, T positions kept, E width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Of all layers, those of the passes that were committed. A pass that is not leaves no trace: images change in each round.

    Attributes:
        valid_BT: bool, False at padding; none while nothing is kept.
    """

    def __init__(self) -> None:
        self.valid_BT: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._new: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        """Positions kept."""
        return 0 if self.valid_BT is None else self.valid_BT.shape[1]

    def update(self, key_BGSE: Tensor, value_BGSE: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values [B, G, T + S, E] that queries of this pass may see in a layer."""
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
