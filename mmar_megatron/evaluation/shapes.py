"""Pixel rule for the `shapes` data set: what does a picture of one thing show, and is it what was asked for?

H, W pixels; lengths in units of 1/32 of the image's side, as in `data.shapes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.shapes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, UNITS, Scene, coverage

_LEAST_CONTRAST = 50.0
"""Between thing and background; the nearest two colours of the palette are 90 apart."""
_LEAST_AREA = 12.0
"""In square units; what is smaller is a speck. The smallest thing has 32."""
_LARGE_AREA = 80.0
"""In square units, between the small square (64) and the large triangle (98)."""


def describe_image(image_HW3: NDArray[np.uint8]) -> dict[str, str | None]:
    """What a picture of one thing shows.

    The background is the palette's colour nearest to the border's median. The thing is the pixels that differ from that median by
    more than half of what the most different ones do, without those that stand alone, as noise does. Its colour is the palette's
    nearest to their median, its place the nearest to their centroid; its size follows from their number; its shape is the
    template with the best overlap.

    Args:
        image_HW3: uint8.

    Returns:
        background, colour, shape, size, place; all but the background None where there is no thing.
    """
    pixels_HW3 = image_HW3.astype(np.float32)
    border_P3 = np.concatenate([pixels_HW3[0], pixels_HW3[-1], pixels_HW3[:, 0], pixels_HW3[:, -1]])
    background_3 = np.median(border_P3, axis=0)
    found: dict[str, str | None] = dict.fromkeys(("colour", "shape", "size", "place"))
    found["background"] = _nearest(background_3, BACKGROUNDS)

    units = UNITS / image_HW3.shape[0]
    distance_HW = np.linalg.norm(pixels_HW3 - background_3, axis=-1)
    contrast = np.sort(distance_HW, axis=None)[-round(_LEAST_AREA / units**2)]
    thing_HW = _without_loners(distance_HW > max(contrast, _LEAST_CONTRAST) / 2)
    area = thing_HW.sum() * units**2
    if contrast < _LEAST_CONTRAST or area < _LEAST_AREA:
        return found
    y, x = ((indices.mean() + 0.5) * units for indices in np.nonzero(thing_HW))
    found["colour"] = _nearest(np.median(pixels_HW3[thing_HW], axis=0), COLOURS)
    found["place"] = _nearest(np.array([x, y]), PLACES)
    found["size"] = "large" if area > _LARGE_AREA else "small"
    found["shape"] = _best_shape(thing_HW)
    return found


def score_image(image_HW3: NDArray[np.uint8], spec: Mapping[str, Any]) -> dict[str, bool]:
    """Which attributes of a picture of one thing are as specified.

    Args:
        image_HW3: uint8.
        spec: of a scene with one thing, as stored in the data set.

    Returns:
        colour, shape, size, place, background: right or not.

    Raises:
        ValueError: the scene has two things.
    """
    scene = Scene.from_spec(dict(spec))
    if len(scene.things) != 1:
        raise ValueError("the pixel rule scores pictures of one thing: leave out the scenes with two")
    found, thing = describe_image(image_HW3), scene.things[0]
    wanted = {**asdict(thing), "background": scene.background}
    return {attribute: found[attribute] == value for attribute, value in wanted.items()}


def _nearest(value: NDArray[np.floating], palette: Mapping[str, tuple[int, ...]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(value - np.array(palette[name]))))


def _without_loners(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keeps the pixels that have at least three of their eight neighbours with them."""
    height, width = mask_HW.shape
    padded_HW = np.pad(mask_HW, 1).astype(np.int64)
    of_nine_HW = sum(padded_HW[y : y + height, x : x + width] for y, x in itertools.product(range(3), range(3)))
    return mask_HW & (of_nine_HW > 3)


def _best_shape(thing_HW: NDArray[np.bool_]) -> str:
    """The shape whose template, moved onto the thing's bounding box, has the greatest intersection over union with it."""
    cropped_HW = _crop(thing_HW)

    def overlap(candidate: tuple[str, str]) -> float:
        template_HW = _template(*candidate, thing_HW.shape[0])
        height, width = np.maximum(cropped_HW.shape, template_HW.shape)
        a, b = (np.pad(m, ((0, height - m.shape[0]), (0, width - m.shape[1]))) for m in (cropped_HW, template_HW))
        return float((a & b).sum() / (a | b).sum())

    shape, _ = max(itertools.product(SHAPES, SIZES), key=overlap)
    return shape


@cache
def _template(shape: str, size: str, image_size: int) -> NDArray[np.bool_]:
    return _crop(coverage(shape, size=size, place="top left", image_size=image_size) > 0.5)


def _crop(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    return mask_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
