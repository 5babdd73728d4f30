"""All that is random in training data: a function of (seed, sample id, epoch) or of (seed, position), never of a rank.

The training stream is endless. Position p of it belongs to epoch p // n, where n is the number of samples; each epoch visits each
sample once, in its own order. Axes: N tokens of an image.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from itertools import accumulate
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mmar_megatron.config import MaskRatioConfig

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
_ROUNDS = 8


class Use(enum.IntEnum):
    """What a generator is for: different uses of one sample are independent of each other."""

    TRAINING = 1
    VALIDATION = 2
    SHAPES = 3


def sample_generator(sample_id: int, *, seed: int, epoch: int, use: Use) -> np.random.Generator:
    """The generator of one sample in one epoch.

    Philox (Salmon et al. 2011) is counter based: seed and use are the key, sample id and epoch the upper words of the counter, so
    making one costs about 15 microseconds and streams do not overlap before 2**128 draws.
    """
    return np.random.Generator(np.random.Philox(key=(seed & _WORD) << 64 | use, counter=epoch << 192 | sample_id << 128))


def _mix(value: int) -> int:
    """The 64-bit finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


class Permutation:
    """A pseudo-random order of `size` samples, in constant memory.

    A Feistel network over pairs (left, right) with additions modulo ceil(sqrt(size)), and cycle walking where it leaves the
    range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        self._size = size
        self._side = math.isqrt(size - 1) + 1
        key = _mix(_mix(seed & _WORD) + epoch & _WORD)
        self._keys = [_mix(key + k * _GOLDEN & _WORD) for k in range(1, _ROUNDS + 1)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        """Which sample comes at `index`, both in [0, size)."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        while True:
            left, right = divmod(index, self._side)
            for key in self._keys:
                left, right = right, (left + _mix(key ^ right)) % self._side
            index = left * self._side + right
            if index < self._size:
                return index


def draw_task(position: int, *, shares: Mapping[str, float], seed: int) -> str:
    """The task at a position of the training stream, by its relative share.

    u = frac(offset(seed) + position / golden ratio) is a low-discrepancy sequence: of any G consecutive positions, be it a global
    batch or one rank's microbatch, each task gets its share of G up to a few samples (the deviation grows as log G, where
    independent draws would give sqrt G). It depends on the position alone, so not on the number of ranks.
    """
    u = (_mix(seed & _WORD) + position * _GOLDEN & _WORD) >> 11  # 53 bits: as many as a float holds
    scaled = u / 2**53 * sum(shares.values())
    return next(task for task, upper in zip(shares, accumulate(shares.values()), strict=True) if scaled < upper)


def draw_mask_ratio(generator: np.random.Generator, config: MaskRatioConfig) -> float:
    """A ratio in [minimum, 1]: uniform, or MAR's normal distribution truncated to that range, by its inverse distribution."""
    u = generator.random()
    if config.distribution == "uniform":
        return config.minimum + (1 - config.minimum) * u
    normal = NormalDist(config.mean, config.std)
    low, high = normal.cdf(config.minimum), normal.cdf(1.0)
    return min(max(normal.inv_cdf(low + (high - low) * u), config.minimum), 1.0)


def draw_mask(generator: np.random.Generator, *, num_tokens: int, ratio: float) -> NDArray[np.bool_]:
    """masked_N: the first ceil(ratio * N), but at least one, of the tokens in random order."""
    # The margin keeps 0.7 * 10 = 7.000000000000001 from masking 8.
    num_masked = max(1, math.ceil(ratio * num_tokens - 1e-9))
    masked_N = np.zeros(num_tokens, dtype=np.bool_)
    masked_N[generator.permutation(num_tokens)[:num_masked]] = True
    return masked_N
