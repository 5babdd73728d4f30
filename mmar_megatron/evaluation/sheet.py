"""A sheet of captions with the images drawn for them, for people to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

_COLUMNS = 4
_PAIR_INCHES = 2.9, 1.36
"""Of a painted and a true picture side by side."""
_PICTURE_INCHES = 2.9, 2.9
"""Of a painted picture alone."""
_MARGIN_INCHES = 0.2
_CAPTION_INCHES = 0.6
_TITLE_INCHES = 0.5
_CAPTION_CHARACTERS = 42
_CAPTION_LINES = 3


def write_sheet(
    path: Path,
    *,
    captions: Sequence[str],
    painted_BHW3: NDArray[np.uint8],
    true_BHW3: Sequence[NDArray[np.uint8]] | None = None,
    title: str,
) -> None:
    """Write a PNG, whole or not at all: for each caption what was painted (left) and the true picture, if given (right)."""
    picture_width, picture_height = _PICTURE_INCHES if true_BHW3 is None else _PAIR_INCHES
    shown = list(painted_BHW3) if true_BHW3 is None else [_beside(*pair) for pair in zip(painted_BHW3, true_BHW3, strict=True)]
    rows = -(-len(captions) // _COLUMNS)
    width = _COLUMNS * (picture_width + _MARGIN_INCHES) + _MARGIN_INCHES
    height = rows * (picture_height + _CAPTION_INCHES) + _TITLE_INCHES
    figure = Figure(figsize=(width, height), dpi=110)
    figure.text(_MARGIN_INCHES / width, 1 - _TITLE_INCHES / 2 / height, title, fontsize=12, va="center", parse_math=False)
    for number, (caption, picture_HW3) in enumerate(zip(captions, shown, strict=True)):
        row, column = divmod(number, _COLUMNS)
        left = _MARGIN_INCHES + column * (picture_width + _MARGIN_INCHES)
        bottom = height - _TITLE_INCHES - row * (picture_height + _CAPTION_INCHES) - picture_height
        axes = figure.add_axes((left / width, bottom / height, picture_width / width, picture_height / height))
        axes.set_axis_off()
        axes.imshow(picture_HW3, interpolation="nearest")
        lines = textwrap.wrap(caption, _CAPTION_CHARACTERS, max_lines=_CAPTION_LINES, placeholder=" ...")
        axes.text(0, -0.05, "\n".join(lines), fontsize=8, va="top", transform=axes.transAxes, parse_math=False)
    partial = path.with_suffix(".partial")
    FigureCanvasAgg(figure).print_png(str(partial))
    partial.replace(path)


def _beside(left_HW3: NDArray[np.uint8], right_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    gap_HG3 = np.full((left_HW3.shape[0], left_HW3.shape[1] // 8, 3), 255, dtype=np.uint8)
    return np.concatenate([left_HW3, gap_HG3, right_HW3], axis=1)
