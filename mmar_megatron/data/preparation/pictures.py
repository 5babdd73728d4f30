"""Picture files of any kind -> pixels of the data set's size."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mmar_megatron.data.fitting import fit, on_white
from mmar_megatron.data.preparation.records import Made, Picture, read_picture


class PictureFault(Exception):
    """Why a picture is of no use: one of `records.REASONS`."""


def size_of(encoded: bytes) -> tuple[int, int]:
    """Width and height of a picture file, of which no more than the head is decoded. Raises whatever PIL raises."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.size


def open_picture(encoded: bytes, *, about: int) -> Image.Image:
    """Opens a picture file; JPEG, which can be decoded at a fraction of its size for little, at twice `about` pixels or more.

    Raises whatever PIL raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd EXIF data and such: the picture is what counts
        image = Image.open(io.BytesIO(encoded))
        image.draft("RGB", (2 * about, 2 * about))
        image.load()
        return on_white(ImageOps.exif_transpose(image))


def pixels_of(picture: Picture, *, image_size: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """A picture of a record, ready to be stored, and its width and height before. Raises what reading and decoding raise."""
    if isinstance(picture, Made):
        return picture.make(), (image_size, image_size)
    encoded = read_picture(picture)
    image = open_picture(encoded, about=image_size)
    width, height = size_of(encoded)
    if (width > height) != (image.width > image.height):  # the camera was turned
        width, height = height, width
    return fit(image, image_size=image_size), (width, height)
