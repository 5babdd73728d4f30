"""Pictures of any mode and size -> pixels of one size. Ships with exported weights, where pillow may be missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

try:
    from PIL import Image
except ImportError:
    if TYPE_CHECKING:
        raise


def on_white(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, transparent parts on white."""
    if image.mode.startswith("I;16"):  # which converting would clip to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        # First the white, then any resizing: the colour under transparent pixels, often black, must not reach the edges.
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(image: Image.Image, *, image_size: int) -> NDArray[np.uint8]:
    """Resized so that the short side fits, and cut in the middle: uint8 [H, W, 3]."""
    if image.size != (image_size, image_size):
        scale = image_size / min(image.size)
        width, height = (max(image_size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image)
