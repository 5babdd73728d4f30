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
    Painter,
    cosine_rounds,
    image_generator,
    paint_tokens,
    plan_rounds,
    random_order,
)
from mmar_megatron.diffusion.sampler import NoiseSource


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
    assert plan.tolist() == sorted(plan)
    assert set(plan) == {1, 2, 3, 4}


def test_where_few_tokens_are_drawn_there_are_as_many_rounds() -> None:
    masked = np.zeros(16, dtype=np.bool_)
    masked[[3, 7, 8]] = True
    plan = plan_rounds(masked, sampling=ImageSampling(rounds=4), image=0)
    assert sorted(plan[masked]) == [1, 2, 3]
    assert not plan[~masked].any()


# --- the loop -------------------------------------------------------------------------------------------------------------------

B, N, C = 3, 16, 2


class Recorded(Painter):
    """Draws the noise that it is given, and records what it is asked."""

    def __init__(self, sampling: ImageSampling, *, spread_BN: Tensor | None = None) -> None:
        super().__init__(None, sampling=sampling)
        self.spread_BN = spread_BN
        self.masked: list[Tensor] = []
        self.anew: list[Tensor] = []
        self.drawn: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scales: list[Tensor | None] = []

    def look(self, latents_BNC: Tensor, *, masked_BN: Tensor, anew_BN: Tensor) -> None:
        self.masked.append(masked_BN.clone())
        self.anew.append(anew_BN.clone())

    def conditions(self, row_K: Tensor, place_K: Tensor, *, halves: int) -> Tensor:
        raise NotImplementedError

    def spread(self, row_K: Tensor, place_K: Tensor, *, noise: NoiseSource) -> Tensor:
        assert self.spread_BN is not None
        assert noise(0).shape == noise(1).shape == (len(row_K), C)
        return self.spread_BN[row_K, place_K]

    def draw(self, row_K: Tensor, place_K: Tensor, *, noise: NoiseSource, guidance_scale_K1: Tensor | None) -> Tensor:
        self.drawn.append((row_K, place_K, noise(0)))
        self.scales.append(guidance_scale_K1)
        return self.drawn[-1][2]

    def chosen(self, number: int) -> Tensor:
        """The tokens drawn in a round, bool [B, N]."""
        row_K, place_K, _ = self.drawn[number - 1]
        chosen_BN = torch.zeros(B, N, dtype=torch.bool)
        chosen_BN[row_K, place_K] = True
        return chosen_BN


def partly_masked() -> Tensor:
    """All of one image, few of another (so that it is done before), none of the last."""
    masked_BN = torch.zeros(B, N, dtype=torch.bool)
    masked_BN[0] = True
    masked_BN[1, [2, 9, 11]] = True
    return masked_BN


def paint(painter: Recorded, masked_BN: Tensor, sampling: ImageSampling, *, first_number: int = 0) -> Tensor:
    latents_BNC = torch.full((B, N, C), 7.0)
    drawn_BNC = paint_tokens(painter, latents_BNC=latents_BNC, masked_BN=masked_BN, sampling=sampling, first_number=first_number)
    assert (latents_BNC == 7).all()  # the caller's own
    return drawn_BNC


def test_each_image_is_drawn_for_as_long_as_it_takes() -> None:
    sampling = ImageSampling(rounds=6)
    painter, masked_BN = Recorded(sampling), partly_masked()
    drawn_BNC = paint(painter, masked_BN, sampling)
    assert torch.equal((drawn_BNC != 7).all(dim=2), masked_BN)
    assert len(painter.drawn) == 6
    for number in range(1, 7):
        assert torch.equal(painter.masked[number - 1], masked_BN)
        assert (painter.chosen(number) <= masked_BN).all()
        masked_BN = masked_BN & ~painter.chosen(number)
    assert not masked_BN.any()


def test_noise_is_of_the_images_stream_of_that_round() -> None:
    sampling = ImageSampling(rounds=4, seed=5)
    painter = Recorded(sampling)
    paint(painter, partly_masked(), sampling, first_number=40)
    for number, (row_K, _, noise_KC) in enumerate(painter.drawn, start=1):
        for b in range(B):
            expected = image_generator(5, image=40 + b, round_number=number).standard_normal(
                (int((row_K == b).sum()), C), dtype=np.float32
            )
            np.testing.assert_array_equal(noise_KC[row_K == b].numpy(), expected)


def test_between_refreshes_only_what_changed_is_run_over() -> None:
    sampling = ImageSampling(rounds=7, refresh_every=3)
    painter = Recorded(sampling)
    paint(painter, partly_masked(), sampling)
    for number, anew_BN in enumerate(painter.anew, start=1):
        if number in (1, 4, 7):
            assert anew_BN.all()
        else:
            assert torch.equal(anew_BN, painter.chosen(number - 1) | painter.chosen(number))


def test_by_confidence_the_surest_are_drawn_first() -> None:
    """As many in each round as in any order; all masked ones are run over, since any may be drawn."""
    sampling = ImageSampling(rounds=5, order="confidence", refresh_every=2)
    spread_BN = torch.from_numpy(np.random.default_rng(0).random((B, N), dtype=np.float32))
    painter, masked_BN = Recorded(sampling, spread_BN=spread_BN), partly_masked()
    drawn_BNC = paint(painter, masked_BN, sampling)
    assert torch.equal((drawn_BNC != 7).all(dim=2), masked_BN)
    for number in range(1, 6):
        chosen_BN, left_BN = painter.chosen(number), masked_BN & ~painter.chosen(number)
        for b in range(B):
            if chosen_BN[b].any() and left_BN[b].any():
                assert spread_BN[b, chosen_BN[b]].max() < spread_BN[b, left_BN[b]].min()
        if number in (2, 4):
            assert torch.equal(painter.anew[number - 1], masked_BN | painter.chosen(number - 1))
        masked_BN = left_BN
    counts = [int(painter.chosen(number)[0].sum()) for number in range(1, 6)]
    assert counts == [end - begin for begin, end in cosine_rounds(N, rounds=5)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_order_is_made_of_what_is_not_finite(value: float) -> None:
    sampling = ImageSampling(rounds=4, order="confidence")
    spread_BN = torch.rand(B, N)
    spread_BN[0] = value
    with pytest.raises(FloatingPointError, match="tokens just drawn are not finite"):
        paint(Recorded(sampling, spread_BN=spread_BN), torch.ones(B, N, dtype=torch.bool), sampling)


def test_guidance_grows_with_what_is_drawn() -> None:
    """Of two images of which one begins half drawn; in the last round it is the whole scale."""
    masked_BN = torch.ones(B, N, dtype=torch.bool)
    masked_BN[1, :8] = False
    sampling = ImageSampling(rounds=4, guidance_scale=5.0, guidance_schedule="linear")
    painter = Recorded(sampling)
    paint(painter, masked_BN, sampling)
    scales = []
    for (row_K, _, _), scale_K1 in zip(painter.drawn, painter.scales, strict=True):
        assert scale_K1 is not None
        scales.append([float(scale_K1[row_K == b].mean()) for b in range(2)])
    left = [math.floor(16 * math.cos(math.pi / 8 * k)) for k in range(1, 4)] + [0]
    assert [scale for scale, _ in scales] == pytest.approx([1 + 4 * (16 - n) / 16 for n in left])
    assert scales[-1] == [5.0, 5.0]
    assert scales[0][1] > scales[0][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "spiral"}, "Unknown order 'spiral': choose one of random, raster, confidence"),
        ({"seed": -1}, "The seed is -1: give a whole number from 0"),
        ({"refresh_every": 0}, r"refresh_every is 0: give 1 \(the whole image in each round\) or more"),
        ({"guidance_schedule": "cosine"}, "Unknown guidance_schedule 'cosine': choose one of constant, linear"),
        ({"guidance_scale": float("nan")}, "The guidance scale is nan: give a number"),
    ],
)
def test_unknown_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSampling(**changes)
