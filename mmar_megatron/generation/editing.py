"""Changing a picture: which of its tokens are drawn anew.

Axes: N tokens of a picture in raster order, C channels of a token; H, W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmar_megatron.data.fitting import fit
from mmar_megatron.data.preparation.pictures import open_picture
from mmar_megatron.diffusion.painting import random_order
from mmar_megatron.hf.processing_mmar import MMARProcessor
from mmar_megatron.training.manifest import record

_WHITE = 128
"""Of 255: from here on a pixel of a mask counts as white."""
_AS_IT_IS = 2**16
"""No picture is larger."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A picture to begin from, and what is redrawn of it."""

    latents_NC: Tensor
    redraw_N: NDArray[np.bool_] | None = None
    """None: a random share."""
    share: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)
    """Name and digest of the picture, and what was asked."""

    def redraw(self, *, seed: int, number: int) -> NDArray[np.bool_]:
        """The tokens that this image draws anew, [N]."""
        if self.redraw_N is not None:
            return self.redraw_N
        chosen_N = np.zeros(len(self.latents_NC), dtype=np.bool_)
        # The first of the random order of painting: given which they are, their own order is as random as before.
        chosen_N[random_order(len(chosen_N), seed=seed, image=number)[: max(1, round(self.share * len(chosen_N)))]] = True
        return chosen_N


def read_edit(
    start: Path,
    *,
    processor: MMARProcessor,
    redraw: Path | None = None,
    outpaint: tuple[float, float, float, float] | None = None,
    vary: float | None = None,
) -> Edit:
    """Reads the picture, and what to redraw of it; one of the three must be given.

    Args:
        start: the picture.
        processor: of the model.
        redraw: a mask picture: tokens with a white pixel are redrawn.
        outpaint: margins around the picture at the left, top, right and bottom, as shares of the new picture's sides.
        vary: the share of tokens, drawn by seed and number of the image.

    Raises:
        ValueError: a picture cannot be read, nothing is redrawn, or a share makes no sense.
    """
    if [redraw, outpaint, vary].count(None) != 2:
        raise ValueError("--start needs one of --redraw, --outpaint and --vary, which say what to draw anew")
    picture = read_picture(start, about=processor.codec["image_size"])
    facts = {"start": str(start), "start_sha256": record(start, flush=False)["sha256"]}
    if vary is not None:
        if not 0 < vary <= 1:
            raise ValueError(f"--vary is {vary}: it must be a share above 0 and at most 1")
        return Edit(latents_NC=_latents(picture, processor), share=vary, facts={**facts, "vary": vary})
    grid = processor.codec["grid_height"], processor.codec["grid_width"]
    if redraw is not None:
        redraw_N = tokens_of(read_picture(redraw), grid=grid)
        if not redraw_N.any():
            raise ValueError(f"{redraw} has no white pixel, so that nothing would be redrawn: paint white what is to change")
        facts |= {"redraw": str(redraw), "redraw_sha256": record(redraw, flush=False)["sha256"]}
        return Edit(latents_NC=_latents(picture, processor), redraw_N=redraw_N, facts=facts)
    assert outpaint is not None
    canvas, outside = place(picture, margins=outpaint, size=processor.codec["image_size"])
    redraw_N = tokens_of(outside, grid=grid)
    if not redraw_N.any() or redraw_N.all():
        raise ValueError(
            f"--outpaint {','.join(f'{margin:g}' for margin in outpaint)} leaves no token to "
            f"{'keep: make the margins smaller' if redraw_N.all() else 'draw: make a margin larger'}"
        )
    return Edit(latents_NC=_latents(canvas, processor), redraw_N=redraw_N, facts={**facts, "outpaint": list(outpaint)})


def read_picture(file: Path, *, about: int = _AS_IT_IS) -> Image.Image:
    """A picture file -> RGB, upright, transparent parts on white.

    Args:
        file: where it is.
        about: the size that it is wanted in, which spares time.

    Raises:
        ValueError: it is missing, or no whole picture.
    """
    try:
        return open_picture(file.read_bytes(), about=about)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of damaged PNG
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as a picture ({reason}): give another one") from error


def tokens_of(mask: Image.Image, *, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which tokens have a white pixel, [N]. The mask may have any size; as a picture's, its middle square counts."""
    side = min(mask.size)
    left, top = (mask.width - side) // 2, (mask.height - side) // 2
    white_HW = np.asarray(mask.convert("L").crop((left, top, left + side, top + side))) >= _WHITE
    rows, columns = (
        [(side * k // count, math.ceil(side * (k + 1) / count)) for k in range(count)] for count in grid
    )  # at least one pixel each, also of a mask that is smaller than the grid
    return np.array([white_HW[slice(*row), slice(*column)].any() for row in rows for column in columns])


def place(picture: Image.Image, *, margins: tuple[float, float, float, float], size: int) -> tuple[Image.Image, Image.Image]:
    """The picture shrunk into a larger one, cut in its middle where that has another shape, and the mask of what lies around.

    Raises:
        ValueError: margins are negative, or leave nothing between them.
    """
    left, top, right, bottom = (round(margin * size) for margin in margins)
    width, height = size - left - right, size - top - bottom
    if min(left, top, right, bottom) < 0 or min(width, height) < 1:
        raise ValueError(
            f"--outpaint {','.join(f'{m:g}' for m in margins)}: margins must be shares from 0, opposite ones below 1"
        )
    square = fit(picture, image_size=max(width, height))
    y, x = (len(square) - height) // 2, (len(square) - width) // 2
    inside_HW3 = square[y : y + height, x : x + width]
    # An encoder sees a little of what lies around: nearly the same there is the least misleading.
    canvas_HW3 = np.pad(inside_HW3, ((top, bottom), (left, right), (0, 0)), mode="edge")
    outside_HW = np.pad(np.zeros((height, width), dtype=np.uint8), ((top, bottom), (left, right)), constant_values=255)
    return Image.fromarray(canvas_HW3), Image.fromarray(outside_HW)


def _latents(picture: Image.Image, processor: MMARProcessor) -> Tensor:
    return processor.to_latents([picture])[0]
