"""Pictures <-> patches, one token each. Ships with exported weights: numpy alone.

Axes: H, W positions of a grid, C values at each, N patches in raster order, P positions along a patch's side; "..." any leading.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_patches(grid_HWC: NDArray[Any], *, patch_size: int) -> NDArray[Any]:
    """[..., H, W, C] -> [..., N, P * P * C]."""
    *leading, height, width, channels = grid_HWC.shape
    rows, columns = height // patch_size, width // patch_size
    split = grid_HWC.reshape(*leading, rows, patch_size, columns, patch_size, channels)
    return split.swapaxes(-4, -3).reshape(*leading, rows * columns, patch_size**2 * channels)


def from_patches(tokens_NC: NDArray[Any], *, rows: int, patch_size: int) -> NDArray[Any]:
    """Undo of `to_patches`; `rows` of patches."""
    *leading, patches, width = tokens_NC.shape
    columns, channels = patches // rows, width // patch_size**2
    split = tokens_NC.reshape(*leading, rows, columns, patch_size, patch_size, channels)
    return split.swapaxes(-4, -3).reshape(*leading, rows * patch_size, columns * patch_size, channels)


def scaled(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """0 ... 255 -> -1 ... 1."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def pixels_of(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Undo of `scaled`; values outside [-1, 1] are clipped."""
    return np.rint((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
