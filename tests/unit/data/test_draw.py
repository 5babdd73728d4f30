import numpy as np
import pytest

from mmar_megatron.config import MaskRatioConfig
from mmar_megatron.data.draw import Permutation, Use, draw_mask, draw_mask_ratio, draw_task, sample_generator


@pytest.mark.parametrize("size", [1, 2, 3, 10, 143, 144, 145, 1000])
def test_permutation_visits_each_once(size: int) -> None:
    order = Permutation(size, seed=7, epoch=3)
    assert sorted(order[i] for i in range(size)) == list(range(size))


def test_permutations_differ_and_are_uniform() -> None:
    size, trials = 10, 2000
    counts = np.zeros((size, size))
    for epoch in range(trials):
        order = Permutation(size, seed=1, epoch=epoch)
        counts[np.arange(size), [order[i] for i in range(size)]] += 1
    # Chi-squared with 9 x 9 degrees of freedom: mean 81, standard deviation 12.7.
    chi_squared = ((counts - trials / size) ** 2 / (trials / size)).sum()
    assert 30 < chi_squared < 132
    assert [Permutation(100, seed=s, epoch=0)[0] for s in range(8)] != [Permutation(100, seed=0, epoch=0)[0]] * 8


def test_generator_depends_on_each_part_of_its_key() -> None:
    def draw(sample_id: int = 5, *, seed: int = 1, epoch: int = 2, use: Use = Use.TRAINING) -> float:
        return sample_generator(sample_id, seed=seed, epoch=epoch, use=use).random()

    draws = {draw(), draw(6), draw(seed=2), draw(epoch=3), draw(use=Use.VALIDATION), draw(seed=-1)}
    assert len(draws) == 6
    assert draw() == draw()


@pytest.mark.parametrize("batch", [8, 24, 256])
def test_every_batch_has_nearly_its_shares_of_tasks(batch: int) -> None:
    shares = {"a": 2.0, "b": 1.0, "c": 0.0, "d": 1.0}
    for first in range(0, 100 * batch, batch):
        tasks = [draw_task(position, shares=shares, seed=3) for position in range(first, first + batch)]
        for task, share in shares.items():
            assert abs(tasks.count(task) - batch * share / 4) <= 3


def test_truncated_normal_mask_ratio_has_its_distribution() -> None:
    config = MaskRatioConfig(distribution="truncated_normal", mean=1.0, std=0.25, minimum=0.7)
    generator = np.random.default_rng(0)
    ratios = np.array([draw_mask_ratio(generator, config) for _ in range(20_000)])
    reference = generator.normal(1.0, 0.25, 200_000)
    reference = reference[(reference >= 0.7) & (reference <= 1.0)]
    assert ratios.min() >= 0.7
    assert ratios.max() <= 1.0
    np.testing.assert_allclose(np.quantile(ratios, [0.1, 0.5, 0.9]), np.quantile(reference, [0.1, 0.5, 0.9]), atol=0.004)


def test_uniform_mask_ratio_has_its_distribution() -> None:
    config = MaskRatioConfig(distribution="uniform", minimum=0.2)
    generator = np.random.default_rng(0)
    ratios = [draw_mask_ratio(generator, config) for _ in range(20_000)]
    np.testing.assert_allclose(np.quantile(ratios, [0, 0.25, 0.5, 1]), [0.2, 0.4, 0.6, 1.0], atol=0.01)


@pytest.mark.parametrize(("ratio", "masked"), [(0.0, 1), (0.01, 1), (0.7, 7), (0.71, 8), (1.0, 10)])
def test_number_of_masked_tokens(ratio: float, masked: int) -> None:
    assert draw_mask(np.random.default_rng(0), num_tokens=10, ratio=ratio).sum() == masked


def test_each_token_is_masked_equally_often() -> None:
    generator = np.random.default_rng(0)
    share_N = np.mean([draw_mask(generator, num_tokens=10, ratio=0.3) for _ in range(10_000)], axis=0)
    np.testing.assert_allclose(share_N, 0.3, atol=0.02)
