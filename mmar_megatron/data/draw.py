"""All that is random in training data: a function of (seed, sample id, epoch) or of (seed, position), never of a rank.

What decides how long a document is (its source, task, caption) is drawn for thousands of documents at once, by hashing; the rest
(masks, noise) by a generator for each document when it is made. Axes: N tokens of an image, P positions.
"""

from __future__ import annotations

import enum
import math
import zlib
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from mmar_megatron.config import MaskRatioConfig

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
_ROUNDS = 8


class Use(enum.IntEnum):
    """What a draw is for: different uses of one sample are independent of each other."""

    TRAINING = 1
    VALIDATION = 2
    SHAPES = 3
    LANGUAGE = 4
    CAPTION = 5
    DROPOUT = 6
    ROWS = 7


def source_seed(seed: int, name: str) -> int:
    """The seed of one of several sources: samples with the same id in two of them are independent."""
    return _mix(_mix(seed & _WORD) ^ zlib.crc32(name.encode()))


def sample_generator(sample_id: int, *, seed: int, epoch: int, use: Use) -> np.random.Generator:
    """The generator of one sample in one epoch.

    Philox (Salmon et al. 2011) is counter based: seed and use are the key, sample id and epoch the upper words of the counter, so
    making one costs about 15 microseconds and streams do not overlap before 2**128 draws.
    """
    return np.random.Generator(np.random.Philox(key=(seed & _WORD) << 64 | use, counter=epoch << 192 | sample_id << 128))


def uniforms(sample_ids_P: ArrayLike, *, seed: int, epochs_P: ArrayLike, use: Use) -> NDArray[np.float64]:
    """One number in [0, 1) for each (sample, epoch), float64 [P]."""
    ids, epochs = (np.atleast_1d(np.asarray(values, dtype=np.uint64)) for values in (sample_ids_P, epochs_P))
    key = np.uint64(_mix(_mix(seed & _WORD) + use * _GOLDEN & _WORD))
    return _unit(_mix_array(_mix_array(ids + key) ^ _mix_array(epochs * np.uint64(_GOLDEN) + key)))


def _mix(value: int) -> int:
    """The 64-bit finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same for each of many."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _unit(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """64 bits -> [0, 1), by as many bits as a float holds."""
    return (words >> np.uint64(11)) / 2.0**53


class Permutation:
    """A pseudo-random order of `size` things, in constant memory.

    A Feistel network over pairs (left, right) with additions modulo ceil(sqrt(size)), and cycle walking where it leaves the
    range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        self._size = size
        self._side = np.uint64(math.isqrt(size - 1) + 1)
        key = _mix(_mix(seed & _WORD) + epoch & _WORD)
        self._keys = [np.uint64(_mix(key + k * _GOLDEN & _WORD)) for k in range(1, _ROUNDS + 1)]

    def __call__(self, indices_P: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which things come at these indices, both in [0, size)."""
        assert len(indices_P) == 0 or 0 <= indices_P.min() <= indices_P.max() < self._size
        found = self._once(indices_P.astype(np.uint64))
        while (outside := found >= self._size).any():
            found[outside] = self._once(found[outside])
        return found.astype(np.int64)

    def _once(self, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = np.divmod(indices, self._side)
        for key in self._keys:
            left, right = right, (left + _mix_array(key ^ right) % self._side) % self._side
        return left * self._side + right


class ShuffledOrder:
    """The order of one epoch: random, but such that near positions mostly read near bytes.

    Samples lie on the disk in blocks of neighbours. The blocks come in random order, and the samples of as many consecutive
    blocks as make a pool are shuffled among each other: while a pool is read, so are few contiguous ranges. A data set no larger
    than a pool is shuffled as a whole.

    Args:
        size: number of samples.
        block: samples of a block; the last, if it is not full, ends the last pool.
        pool: samples of a pool, a multiple of `block`.
    """

    def __init__(self, size: int, *, seed: int, epoch: int, block: int, pool: int) -> None:
        self._size, self._block, self._pool = size, block, pool
        self._seed, self._epoch = seed, epoch
        self._blocks = Permutation(size // block, seed=seed, epoch=epoch) if size >= block else None

    def __call__(self, positions_P: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which samples come at these positions, both in [0, size)."""
        pools, places = np.divmod(positions_P, self._pool)
        for pool in np.unique(pools):
            members = pools == pool
            places[members] = self._within(int(pool))(places[members])
        blocks, offsets = np.divmod(pools * self._pool + places, self._block)
        if self._blocks is not None:
            full = blocks < self._size // self._block
            blocks[full] = self._blocks(blocks[full])
        return blocks * self._block + offsets

    def _within(self, pool: int) -> Permutation:
        size = min(self._pool, self._size - pool * self._pool)
        return Permutation(size, seed=self._seed ^ _mix(pool + 1), epoch=self._epoch)


def low_discrepancy(positions_P: NDArray[np.int64], *, seed: int) -> NDArray[np.float64]:
    """u = frac(offset(seed) + position / golden ratio), float64 [P] in [0, 1).

    Of any G consecutive positions, be it a global batch or one rank's microbatch, an interval of length w gets w G up to a few
    (the deviation grows as log G, where independent draws would give sqrt G). It depends on the position alone, so not on the
    number of ranks.
    """
    return _unit(positions_P.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(_mix(seed & _WORD)))


def choose(u_P: NDArray[np.float64], *, weights: Sequence[float]) -> NDArray[np.int64]:
    """Which of several things each u in [0, 1) falls to, by their relative weights: int64 [P]."""
    upper = np.cumsum(np.asarray(weights, dtype=np.float64))
    return np.searchsorted(upper, u_P * upper[-1], side="right").clip(max=_last_positive(weights))


def _last_positive(weights: Sequence[float]) -> int:
    return max(i for i, weight in enumerate(weights) if weight > 0)


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
