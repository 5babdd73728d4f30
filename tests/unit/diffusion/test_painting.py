"""In which round each token is drawn, and from which noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmar_megatron.diffusion.painting import cosine_rounds, image_generator, random_order


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 16, 64, 256])
def test_rounds_fill_each_place_once(num_tokens: int) -> None:
    for rounds in range(1, num_tokens + 1):
        stretches = cosine_rounds(num_tokens, rounds=rounds)
        assert len(stretches) == rounds
        assert [n for begin, end in stretches for n in range(begin, end)] == list(range(num_tokens))
        assert all(begin < end for begin, end in stretches)


def test_rounds_follow_the_cosine() -> None:
    """What is still masked after round k is N cos(pi k / 2 K): few tokens are drawn while little is known."""
    left = [256 - end for _, end in cosine_rounds(256, rounds=8)]
    assert left == [math.floor(256 * math.cos(math.pi / 2 * k / 8)) for k in range(1, 8)] + [0]


@pytest.mark.parametrize("rounds", [0, 17])
def test_impossible_rounds(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"{rounds} rounds asked for 16 tokens: use at least 1, and at most"):
        cosine_rounds(16, rounds=rounds)


def test_streams_differ_by_seed_image_and_round() -> None:
    places = [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2)]
    drawn = [image_generator(seed, image=image, round_number=number).standard_normal(4) for seed, image, number in places]
    assert len({tuple(noise) for noise in drawn}) == 4
    again = image_generator(0, image=0, round_number=1).standard_normal(4)
    np.testing.assert_array_equal(drawn[0], again)


def test_an_order_has_every_token() -> None:
    order = random_order(64, seed=3, image=5)
    assert sorted(order) == list(range(64))
    assert list(order) != list(random_order(64, seed=3, image=6))
