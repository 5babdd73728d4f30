"""Distances of samples whose mean and covariance are known, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mmar_megatron.evaluation.frechet import GROUPS, Distance, frechet_distance, knee, measure_distance

Array = NDArray[np.float64]


def with_moments(mean_F: Array, covariance_FF: Array, *, count: int = 200, seed: int = 0) -> Array:
    """Samples that have this mean and covariance exactly."""
    drawn = np.random.default_rng(seed).standard_normal((count, len(mean_F)))
    drawn -= drawn.mean(axis=0)
    whitened = drawn @ np.linalg.inv(np.linalg.cholesky(drawn.T @ drawn / (count - 1))).T
    return mean_F + whitened @ np.linalg.cholesky(covariance_FF).T


def random_covariance(features: int, *, seed: int) -> Array:
    root = np.random.default_rng(seed).standard_normal((features, features))
    return root @ root.T + 0.1 * np.eye(features)


def test_of_shifted_distributions_the_squared_shift() -> None:
    shift, covariance = np.array([1.0, -2.0, 0.5]), random_covariance(3, seed=1)
    one, other = with_moments(np.zeros(3), covariance), with_moments(shift, covariance, seed=2)
    assert frechet_distance(one, other) == pytest.approx(1.0 + 4.0 + 0.25, rel=1e-10)


def test_of_scaled_distributions_the_squared_difference_of_standard_deviations() -> None:
    covariance = random_covariance(4, seed=1)
    one, other = with_moments(np.ones(4), covariance), with_moments(np.ones(4), 9 * covariance, seed=2)
    assert frechet_distance(one, other) == pytest.approx((3 - 1) ** 2 * np.trace(covariance), rel=1e-10)


def test_of_commuting_covariances() -> None:
    """Alike in their axes, which are not those of the features."""
    axes, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))
    one_std, other_std = np.array([1.0, 2.0, 0.1, 3.0, 0.5]), np.array([2.0, 0.3, 0.1, 1.0, 4.0])
    samples = [with_moments(np.zeros(5), (axes * std**2) @ axes.T, seed=k) for k, std in enumerate((one_std, other_std))]
    assert frechet_distance(*samples) == pytest.approx(np.square(one_std - other_std).sum(), rel=1e-10)


def test_of_covariances_that_do_not_commute() -> None:
    one, other = random_covariance(6, seed=1), random_covariance(6, seed=2)
    roots = np.sqrt(np.linalg.eigvals(one @ other).real)  # the eigenvalues of a product of covariances are real
    expected = np.trace(one) + np.trace(other) - 2 * roots.sum()
    found = frechet_distance(with_moments(np.zeros(6), one), with_moments(np.zeros(6), other, seed=2))
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("one", "other"), [(8, 12), (8, 300), (300, 300)])
def test_symmetric_and_nothing_to_itself_with_fewer_pictures_than_features_too(one: int, other: int) -> None:
    draw = np.random.default_rng(0).standard_normal
    a_NF, b_MF = draw((one, 40)), 2 * draw((other, 40)) + 0.3
    assert frechet_distance(a_NF, b_MF) == pytest.approx(frechet_distance(b_MF, a_NF), rel=1e-10)
    assert frechet_distance(a_NF, a_NF[::-1]) == pytest.approx(0, abs=1e-10)
    root_a, root_b = ((x - x.mean(axis=0)) / (len(x) - 1) ** 0.5 for x in (a_NF, b_MF))
    products = np.linalg.eigvalsh((root_a @ root_b.T) @ (root_b @ root_a.T)).clip(min=0)
    expected = np.square(a_NF.mean(axis=0) - b_MF.mean(axis=0)).sum() + (root_a**2).sum() + (root_b**2).sum()
    assert frechet_distance(a_NF, b_MF) == pytest.approx(expected - 2 * np.sqrt(products).sum(), rel=1e-6)


def test_features_far_from_zero_in_single_precision() -> None:
    single = [with_moments(np.full(3, 1e4 + k), (1 + k) * np.eye(3), seed=k).astype(np.float32) for k in range(2)]
    double = [samples.astype(np.float64) for samples in single]
    assert frechet_distance(*single) == pytest.approx(frechet_distance(*double), rel=1e-9)


def test_too_few_pictures() -> None:
    enough = np.ones((40, 3))
    with pytest.raises(ValueError, match="2 or more pictures of each kind, not 1: give more"):
        frechet_distance(enough[:1], enough)
    with pytest.raises(ValueError, match=r"31 pictures are too few .* give 32 or more"):
        measure_distance(enough[:31], enough)


def test_the_error_is_how_far_other_pictures_would_differ() -> None:
    draw = np.random.default_rng(0).standard_normal
    reference = draw((1000, 2))
    found = [measure_distance(draw((96, 2)) + 0.8, reference) for _ in range(300)]
    assert np.mean([one.error for one in found]) == pytest.approx(np.std([one.value for one in found]), rel=0.15)


def test_what_both_have_in_common_is_no_error_of_their_difference() -> None:
    draw = np.random.default_rng(0).standard_normal
    reference, painted = draw((64, 3)), draw((64, 3)) + 1
    one, other = measure_distance(painted, reference), measure_distance(painted[:, [1, 0, 2]], reference[:, [1, 0, 2]])
    assert one.error > 0.1
    assert (one - other).error == pytest.approx(0, abs=1e-10)
    assert (one - other).value == pytest.approx(0, abs=1e-10)


def test_knee() -> None:
    def distance(value: float, *, noise: float = 0.0) -> Distance:
        """`noise` is the standard error."""
        signs_G = np.resize([1.0, -1.0], GROUPS)
        return Distance(value=value, without_G=value + noise * signs_G / (GROUPS - 1) ** 0.5)

    assert distance(3.0, noise=0.7).error == pytest.approx(0.7)
    assert knee([distance(4.0), distance(3.0), distance(3.0), distance(3.0)]) == 1
    assert knee([distance(4.0), distance(3.0), distance(3.0), distance(2.9)]) == 3
    assert knee([distance(4.0), distance(3.0), distance(3.1), distance(2.9, noise=0.11)]) == 1
    assert knee([distance(4.0), distance(3.0), distance(3.1), distance(2.9, noise=0.09)]) == 3
    assert knee([distance(1.0), distance(2.0)]) == 0
