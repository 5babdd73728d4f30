"""In which round each token is drawn, and from which noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmar_megatron.diffusion.painting import (
    ImageSampling,
    Round,
    cosine_rounds,
    image_generator,
    paint_tokens,
    plan_rounds,
    random_order,
)


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


def test_raster_order_is_row_by_row() -> None:
    masked = np.ones(16, dtype=np.bool_)
    plan = plan_rounds(masked, sampling=ImageSampling(rounds=4, order="raster"), image=0)
    assert np.concatenate(plan).tolist() == list(range(16))
    masked[3:] = False
    assert len(plan_rounds(masked, sampling=ImageSampling(rounds=4), image=0)) == 3  # no more tokens are to be drawn


def test_guidance_grows_with_what_is_drawn() -> None:
    """Of two images of which one begins half drawn; in the last round it is the whole scale."""
    scales: list[list[float]] = []

    def draw(asked: Round) -> Tensor:
        assert asked.guidance_scale_K1 is not None
        scales.append([float(asked.guidance_scale_K1[asked.row_K == b].mean()) for b in range(2)])
        return torch.ones(len(asked.row_K), 3)

    masked_BN = torch.ones(2, 16, dtype=torch.bool)
    masked_BN[1, :8] = False
    sampling = ImageSampling(rounds=4, guidance_scale=5.0, guidance_schedule="linear")
    drawn = paint_tokens(draw, latents_BNC=torch.zeros(2, 16, 3), masked_BN=masked_BN, sampling=sampling)
    left = [math.floor(16 * math.cos(math.pi / 8 * k)) for k in range(1, 4)] + [0]
    assert [scale for scale, _ in scales] == pytest.approx([1 + 4 * (16 - n) / 16 for n in left])
    assert scales[-1] == [5.0, 5.0]
    assert scales[0][1] > scales[0][0]
    assert torch.equal(drawn.any(dim=2), masked_BN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "spiral"}, "Unknown order 'spiral': choose one of random, raster"),
        ({"guidance_schedule": "cosine"}, "Unknown guidance_schedule 'cosine': choose one of constant, linear"),
        ({"guidance_scale": float("nan")}, "The guidance scale is nan: give a number"),
    ],
)
def test_unknown_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSampling(**changes)
