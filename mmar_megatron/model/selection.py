"""Some of the tokens of each image, moved to the front, so that work is done on these alone.

Axes: B images, N tokens, A tokens chosen of the image that has most, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Selection:
    """Which tokens are chosen, and where they are then.

    Args:
        chosen_BN: bool. The number of them is read from the device.

    Attributes:
        place_BA: int64: the token in each column, in raster order; of no meaning where nothing is.
        there_BA: bool: whether a token is there.
        column_BN: int64: the column of each chosen token; of no meaning for others.
    """

    def __init__(self, chosen_BN: Tensor) -> None:
        count_B = chosen_BN.sum(dim=1)
        columns = max(1, int(count_B.max()))  # empty tensors are trouble to many kernels
        self.place_BA = torch.argsort(~chosen_BN, dim=1, stable=True)[:, :columns]
        self.there_BA = torch.arange(columns, device=chosen_BN.device) < count_B[:, None]
        self.column_BN = (chosen_BN.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all chosen tokens, K: row, place and column."""
        row_K, column_K = self.there_BA.nonzero(as_tuple=True)
        return row_K, self.place_BA[row_K, column_K], column_K

    def take(self, x_BNF: Tensor) -> Tensor:
        """[B, N, F] -> [B, A, F]."""
        return _gathered(x_BNF, self.place_BA)

    def put_back(self, x_BAF: Tensor) -> Tensor:
        """[B, A, F] -> [B, N, F], where tokens that are not chosen have values of others."""
        return _gathered(x_BAF, self.column_BN)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
