import numpy as np
import pytest

from mmar_megatron.config import MaskRatioConfig
from mmar_megatron.data.draw import (
    Permutation,
    ShuffledOrder,
    Use,
    choose,
    draw_mask,
    draw_mask_ratio,
    low_discrepancy,
    sample_generator,
    source_seed,
    uniforms,
)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 143, 144, 145, 1000])
def test_permutation_visits_each_once(size: int) -> None:
    order = Permutation(size, seed=7, epoch=3)
    assert sorted(order(np.arange(size)).tolist()) == list(range(size))
    assert order(np.array([size - 1, 0])).tolist() == order(np.arange(size))[[-1, 0]].tolist()


def test_permutations_differ_and_are_uniform() -> None:
    size, trials = 10, 2000
    counts = np.zeros((size, size))
    for epoch in range(trials):
        order = Permutation(size, seed=1, epoch=epoch)
        counts[np.arange(size), order(np.arange(size))] += 1
    # Chi-squared with 9 x 9 degrees of freedom: mean 81, standard deviation 12.7.
    chi_squared = ((counts - trials / size) ** 2 / (trials / size)).sum()
    assert 30 < chi_squared < 132
    first = np.array([0])
    assert len({int(Permutation(100, seed=s, epoch=0)(first)[0]) for s in range(8)}) > 1


@pytest.mark.parametrize("size", [1, 5, 16, 17, 63, 64, 65, 200, 1000])
def test_shuffled_order_visits_each_once_and_reads_few_blocks_at_a_time(size: int) -> None:
    block, pool = 8, 64
    order = ShuffledOrder(size, seed=1, epoch=2, block=block, pool=pool)
    found = order(np.arange(size))
    assert sorted(found.tolist()) == list(range(size))
    places = np.random.default_rng(0).permutation(size)
    assert (order(places) == found[places]).all()
    for begin in range(0, size, pool):
        blocks, counts = np.unique(found[begin : begin + pool] // block, return_counts=True)
        assert len(blocks) == -(-len(found[begin : begin + pool]) // block)
        assert sorted(counts)[1:] == [block] * (len(blocks) - 1)


def test_shuffled_order_shuffles_blocks_and_within_pools() -> None:
    orders = [ShuffledOrder(1024, seed=1, epoch=epoch, block=8, pool=64)(np.arange(1024)) for epoch in range(2)]
    assert (orders[0] != orders[1]).mean() > 0.9
    assert set(orders[0][:64] // 8) != set(orders[1][:64] // 8)
    assert (np.diff(orders[0]) == 1).mean() < 0.05


def test_hashed_draws_are_uniform_and_depend_on_each_part() -> None:
    ids, epochs = np.arange(10_000), np.repeat(np.arange(10), 1000)
    u = uniforms(ids, seed=3, epochs_P=epochs, use=Use.CAPTION)
    np.testing.assert_allclose(np.quantile(u, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    others = [
        uniforms(ids, seed=4, epochs_P=epochs, use=Use.CAPTION),
        uniforms(ids, seed=3, epochs_P=epochs + 1, use=Use.CAPTION),
        uniforms(ids + 1, seed=3, epochs_P=epochs, use=Use.CAPTION),
        uniforms(ids, seed=3, epochs_P=epochs, use=Use.DROPOUT),
    ]
    for other in others:
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.05
    assert uniforms([7], seed=3, epochs_P=[0], use=Use.CAPTION)[0] == u[7]
    assert len({source_seed(s, name) for s in (1, 2) for name in ("a", "b")}) == 4


def test_generator_depends_on_each_part_of_its_key() -> None:
    def draw(sample_id: int = 5, *, seed: int = 1, epoch: int = 2, use: Use = Use.TRAINING) -> float:
        return sample_generator(sample_id, seed=seed, epoch=epoch, use=use).random()

    draws = {draw(), draw(6), draw(seed=2), draw(epoch=3), draw(use=Use.VALIDATION), draw(seed=-1)}
    assert len(draws) == 6
    assert draw() == draw()


@pytest.mark.parametrize("batch", [8, 24, 256])
def test_every_batch_has_nearly_its_shares(batch: int) -> None:
    shares = [2.0, 1.0, 0.0, 1.0]
    chosen = choose(low_discrepancy(np.arange(100 * batch), seed=3), weights=shares)
    for of_batch in chosen.reshape(100, batch):
        counts = np.bincount(of_batch, minlength=4)
        assert np.abs(counts - batch * np.array(shares) / 4).max() <= 3
    assert counts[2] == 0


def test_the_last_may_have_no_weight() -> None:
    assert choose(np.array([0.0, 0.4, np.nextafter(1, 0)]), weights=[1.0, 0.0]).tolist() == [0, 0, 0]


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
