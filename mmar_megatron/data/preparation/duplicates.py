"""Pictures that show the same: copies, also resized or compressed once more. Another colour makes another picture.

Of each picture there are two 64-bit keys, the signs of differences between neighbouring cells of its brightness across and down,
and a thumbnail of 8 x 8 cells. Two pictures are the same where a key agrees and no cell of the thumbnails is far apart in any
colour. Axes: n pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 8
THUMBNAIL = (SIDE, SIDE, 3)
FAR = 6
"""Of 255. Compressing a picture again moved its cells by up to 3; a skin tone, or a shape's colour, moves some by 20."""
_STEP = 2
"""Differences up to this count as none, so that noise on plain areas does not decide."""
_MOST_COMPARED = 256
"""With so many kept pictures of the same key, at most, a picture is compared."""


def describe(image: Image.Image) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """RGB -> (the two keys, the thumbnail)."""
    grey = image.convert("L")
    across = np.asarray(grey.resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((SIDE, SIDE + 1), Image.Resampling.BOX), dtype=np.int16)
    bits = [across[:, 1:] > across[:, :-1] + _STEP, down[1:] > down[:-1] + _STEP]
    keys = np.concatenate([np.packbits(b) for b in bits]).view(np.uint64)
    return keys, np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def find_duplicates(keys: NDArray[np.uint64], thumbnails: Callable[[NDArray[np.int64]], NDArray[np.uint8]]) -> NDArray[np.bool_]:
    """Which pictures show the same as one before them.

    Args:
        keys: [n, 2].
        thumbnails: ascending numbers of pictures -> their thumbnails, [..., 8, 8, 3].
    """
    dropped = np.zeros(len(keys), dtype=np.bool_)
    candidates = np.zeros(len(keys), dtype=np.bool_)
    for column in range(keys.shape[1]):
        for group in _groups(keys[:, column]):
            candidates[group] = True
    numbers = np.flatnonzero(candidates)
    thumbs = thumbnails(numbers).reshape(len(numbers), SIDE * SIDE * 3)
    for column in range(keys.shape[1]):
        for group in _groups(keys[numbers, column]):
            _drop_in_group(group, thumbs, numbers, dropped)
    return dropped


def _groups(keys: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
    """The numbers of equal keys, ascending, where there are several."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]) != 0)
    ends = np.append(starts[1:], len(order))
    for k in np.flatnonzero(ends - starts > 1):
        yield order[starts[k] : ends[k]]


def _drop_in_group(
    group: NDArray[np.int64], thumbs: NDArray[np.uint8], numbers: NDArray[np.int64], dropped: NDArray[np.bool_]
) -> None:
    kept = np.zeros((min(len(group), _MOST_COMPARED), thumbs.shape[1]), dtype=np.int16)
    count = 0
    for member in group:
        if dropped[numbers[member]]:
            continue
        thumb = thumbs[member].astype(np.int16)
        if count and (abs(kept[: min(count, len(kept))] - thumb).max(axis=1) <= FAR).any():
            dropped[numbers[member]] = True
        else:
            kept[count % len(kept)] = thumb
            count += 1
