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
_CAPTION_WIDTH = 34
_CAPTION_LINES = 3


def write_sheet(
    path: Path,
    *,
    captions: Sequence[str],
    painted_BHW3: NDArray[np.uint8],
    true_BHW3: Sequence[NDArray[np.uint8]],
    title: str,
) -> None:
    """Write a PNG, whole or not at all: for each held-out caption what was painted (left) and the true picture (right)."""
    rows = -(-len(captions) // _COLUMNS)
    figure = Figure(figsize=(3.1 * _COLUMNS, 2.15 * rows + 0.6), dpi=110)
    figure.suptitle(title, fontsize=12, x=0.02, ha="left", y=1 - 0.2 / figure.get_figheight())
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, caption, painted_HW3, true_HW3 in zip(grid, captions, painted_BHW3, true_BHW3, strict=False):
        gap_HG3 = np.full((painted_HW3.shape[0], max(1, painted_HW3.shape[1] // 8), 3), 255, dtype=np.uint8)
        axes.imshow(np.concatenate([painted_HW3, gap_HG3, true_HW3], axis=1), interpolation="nearest")
        lines = textwrap.wrap(caption, _CAPTION_WIDTH, max_lines=_CAPTION_LINES, placeholder=" ...")
        axes.set_title("\n".join(lines), fontsize=8, loc="left", y=-0.04, va="top")
    figure.subplots_adjust(
        left=0.02, right=0.98, top=1 - 0.5 / figure.get_figheight(), bottom=0.5 / figure.get_figheight(), hspace=0.42
    )
    partial = path.with_suffix(".partial")
    FigureCanvasAgg(figure).print_png(str(partial))
    partial.replace(path)
