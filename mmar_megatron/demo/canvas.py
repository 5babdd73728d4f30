"""A picture on the page, of which a part may not be drawn yet.

Axes: N tokens of a picture in raster order, C channels of a token; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_GREYS = 205, 235


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A picture as the model has it."""

    latents_NC: Tensor
    """Of no meaning where nothing is drawn."""
    drawn_N: NDArray[np.bool_]
    record: dict[str, Any]
    """How it was made, for its PNG (`generation/files.py`) and that of a picture that begins from it."""

    def check_whole(self) -> None:
        """Raises ValueError where a part is not drawn."""
        if not self.drawn_N.all():
            raise ValueError("There is no whole picture to read yet: paint one, or open one.")

    def to_redraw(self, marked: Sequence[int]) -> NDArray[np.bool_]:
        """The tokens to draw where these are marked, [N]: with them those that are not drawn yet.

        Raises:
            ValueError: there is no picture, nothing to draw, or a mark beside the picture.
        """
        if not self.drawn_N.any():
            raise ValueError("There is no picture to change yet: paint one, or open one.")
        redraw_N = ~self.drawn_N
        for token in marked:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(redraw_N):
                raise ValueError(
                    f"{token!r} is marked, but the picture has the tokens 0 to {len(redraw_N) - 1}: clear the marks."
                )
            redraw_N[token] = True
        if not redraw_N.any():
            raise ValueError("Nothing is marked: draw with the mouse over what is to change.")
        return redraw_N


def with_gaps(pixels_HW3: NDArray[np.uint8], *, drawn_N: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture with a grey chequer where nothing is drawn, uint8 [H, W, 3]."""
    height, width = (side // count for side, count in zip(pixels_HW3.shape, grid, strict=False))  # of a token
    drawn_HW = drawn_N.reshape(grid).repeat(height, axis=0).repeat(width, axis=1)
    square = max(1, height // 2)
    y_HW, x_HW = np.indices(drawn_HW.shape) // square
    chequer_HW = np.where((y_HW + x_HW) % 2, *_GREYS).astype(np.uint8)
    return np.where(drawn_HW[..., None], pixels_HW3, chequer_HW[..., None])
