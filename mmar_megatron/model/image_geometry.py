"""What the model must know of the image codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class _Codec(Protocol):
    grid_height: int
    grid_width: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class ImageGeometry:
    """The grid of tokens an image becomes, and the width of each."""

    grid_height: int
    grid_width: int
    channels: int

    @classmethod
    def of(cls, codec: _Codec) -> ImageGeometry:
        """That of a codec."""
        return cls(grid_height=codec.grid_height, grid_width=codec.grid_width, channels=codec.channels)
