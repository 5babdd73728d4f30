"""The Frechet distance between two sets of features, each taken for a normal distribution, and how sure it is.

For normal distributions with means m and covariances C it is (Dowson and Landau, "The Fréchet distance between multivariate
normal distributions", Journal of Multivariate Analysis 12, 1982)

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

Heusel et al. (2017) judge painters by it, on features of InceptionV3; those here are of another network (see `features`), so that
no number compares with theirs. With C1 = A'A and C2 = B'B the trace of the root is the sum of the singular values of AB', and A
and B are the centred features themselves: no root of a matrix is taken, nothing becomes complex, and covariances of fewer
pictures than features are as good as others. All in float64.

The distance of few pictures is too large, for their covariance is not that of all: it means something only beside another of the
same number of pictures.

Axes: N, M pictures, F features, G groups of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUPS = 16
"""Of pictures, each of which is left out once."""


def frechet_distance(a_NF: NDArray[np.floating], b_MF: NDArray[np.floating]) -> float:
    """As above, with the covariances of samples (divided by N - 1).

    Raises:
        ValueError: fewer than two pictures in a set.
    """
    (mean_a, root_a), (mean_b, root_b) = _moments(a_NF), _moments(b_MF)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    variances = np.square(root_a).sum() + np.square(root_b).sum()
    return max(0.0, float(np.square(mean_a - mean_b).sum() + variances - 2 * overlap))


def _moments(features_NF: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean [F], and a matrix of F columns and as few rows as do, whose product with its transpose is the covariance."""
    if len(features_NF) < 2:
        raise ValueError(f"a distance needs 2 or more pictures of each kind, not {len(features_NF)}: give more")
    features_NF = features_NF.astype(np.float64)
    mean_F = features_NF.mean(axis=0)
    root_NF = (features_NF - mean_F) / (len(features_NF) - 1) ** 0.5
    if root_NF.shape[0] > root_NF.shape[1]:
        root_NF = np.asarray(np.linalg.qr(root_NF, mode="r"))
    return mean_F, root_NF


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A distance, or a difference of two that were measured on pictures of the same captions and noise."""

    value: float
    without_G: NDArray[np.float64]
    """The same without each group of pictures."""

    @property
    def error(self) -> float:
        """Its standard error over the choice of pictures, by the jackknife (Efron and Stein, 1981)."""
        groups = len(self.without_G)
        return float(((groups - 1) * np.var(self.without_G)) ** 0.5)

    def __sub__(self, other: Distance) -> Distance:
        return Distance(value=self.value - other.value, without_G=self.without_G - other.without_G)


def measure_distance(painted_NF: NDArray[np.floating], reference_MF: NDArray[np.floating]) -> Distance:
    """The distance of pictures that are judged to those that are not, which are the same whatever is left out.

    Raises:
        ValueError: too few pictures for the groups.
    """
    if len(painted_NF) < 2 * GROUPS:
        raise ValueError(f"{len(painted_NF)} pictures are too few to tell how sure their distance is: give {2 * GROUPS} or more")
    group_N = np.arange(len(painted_NF)) % GROUPS
    return Distance(
        value=frechet_distance(painted_NF, reference_MF),
        without_G=np.array([frechet_distance(painted_NF[group_N != g], reference_MF) for g in range(GROUPS)]),
    )


def knee(distances: Sequence[Distance]) -> int:
    """The first below which no later one lies by more than its own standard error.

    On the same captions and noise smaller differences are certain too, but other captions would change the distance by more.
    """
    values = [one.value for one in distances]
    return next(i for i, one in enumerate(values) if all(one - later.value <= later.error for later in distances[i + 1 :]))
