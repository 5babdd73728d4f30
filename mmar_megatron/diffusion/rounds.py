"""The course of masked auto-regressive painting (MAR, arXiv 2406.11838, section 4): in which round each token is drawn, and from
which noise. Both follow from (seed, number of the image, round) alone, so neither the batch nor the layout changes an image.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def image_generator(seed: int, *, image: int, round_number: int) -> np.random.Generator:
    """The noise of one round of one image; round 0 is that of the order, the others count from 1."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, image, round_number]))


def random_order(num_tokens: int, *, seed: int, image: int) -> NDArray[np.int64]:
    """A permutation of an image's tokens, [N]."""
    return image_generator(seed, image=image, round_number=0).permutation(num_tokens)


def cosine_rounds(num_tokens: int, *, rounds: int) -> list[tuple[int, int]]:
    """Which stretch of the order each round draws: MAR's cosine schedule, few at first, at least one in each.

    Raises:
        ValueError: more rounds than tokens, or none.
    """
    if not 1 <= rounds <= num_tokens:
        raise ValueError(f"{rounds} rounds asked for {num_tokens} tokens: use at least 1, and at most as many rounds as tokens.")
    ends: list[int] = []
    for k in range(1, rounds + 1):
        filled = num_tokens - math.floor(num_tokens * math.cos(math.pi / 2 * k / rounds))
        at_least, at_most = (ends[-1] if ends else 0) + 1, num_tokens - (rounds - k)
        ends.append(min(max(filled, at_least), at_most))
    return list(zip([0, *ends[:-1]], ends, strict=True))
