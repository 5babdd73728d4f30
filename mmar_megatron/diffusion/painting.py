"""Masked auto-regressive painting (MAR, arXiv 2406.11838, section 4): all tokens are masked at first; in each round the diffusion
head draws some of those that still are, given what the backbone makes of the others.

In which round a token is drawn, and from which noise, follows from (seed, number of the image, round) alone: neither the batch
nor the layout changes an image. Axes: B images, N tokens of an image, C channels of a token, K tokens drawn in a round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmar_megatron.diffusion.parameterization import Parameterization
from mmar_megatron.diffusion.sampler import NoiseSource, Sampler, SamplerKind
from mmar_megatron.diffusion.schedule import NoiseSchedule

Order = Literal["random", "raster"]
GuidanceSchedule = Literal["constant", "linear"]


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """How images are drawn.

    Raises:
        ValueError: an unknown order or guidance schedule, or a guidance scale that is not finite.
    """

    rounds: int = 16
    """Runs of the backbone for each image; at most its number of tokens."""
    steps: int = 25
    """Runs of the head for each token."""
    guidance_scale: float = 2.0
    """Classifier-free guidance; 1: none."""
    guidance_schedule: GuidanceSchedule = "constant"
    """`linear`: it grows with the share of the image that is drawn, up to `guidance_scale` in the last round, as MAR has it."""
    order: Order = "random"
    """In which tokens are drawn; `raster`: row by row."""
    sampler: SamplerKind = "ddim"
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("order", Order), ("guidance_schedule", GuidanceSchedule)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}: choose one of {', '.join(get_args(kinds))}.")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"The guidance scale is {self.guidance_scale}: give a number; 1 is no guidance.")

    @property
    def guided(self) -> bool:
        """Whether conditions without the prompt are needed too."""
        return self.guidance_scale != 1.0

    def head_sampler(self, *, schedule: NoiseSchedule, parameterization: Parameterization) -> Sampler:
        """The steps of the head. Raises ValueError where there are none such."""
        return Sampler(
            schedule=schedule,
            parameterization=parameterization,
            steps=self.steps,
            kind=self.sampler,
            temperature=self.temperature,
        )


@dataclass(frozen=True, kw_only=True)
class Round:
    """What the model is asked in one round."""

    latents_BNC: Tensor
    """What is drawn so far; of no meaning where masked."""
    masked_BN: Tensor
    """What is not."""
    row_K: Tensor
    """Of the tokens to draw, the image ..."""
    place_K: Tensor
    """... and the place in it."""
    noise: NoiseSource
    """For the head's steps, [K, C]."""
    guidance_scale_K1: Tensor | None
    """Of each token; none: without guidance."""


Draw = Callable[[Round], Tensor]
"""The model: the tokens that are asked for, [K, C] in fp32."""


def paint_tokens(
    draw: Draw,
    *,
    latents_BNC: Tensor,
    masked_BN: Tensor,
    sampling: ImageSampling,
    first_number: int = 0,
    progress: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Draws all masked tokens; the others stay as they are. Returns [B, N, C].

    Args:
        draw: the model.
        latents_BNC: fp32; what stands at masked tokens does not matter.
        masked_BN: bool, tokens to draw.
        sampling: rounds, order, guidance, seed.
        first_number: number of the first image, where a longer list is painted in parts.
        progress: called after each round with its number, from 1, the number of rounds, and the latents so far.

    Raises:
        ValueError: more rounds than there are tokens to draw in an image that is masked as a whole.
        FloatingPointError: what was drawn is not finite.
    """
    latents_BNC, masked_BN = latents_BNC.clone(), masked_BN.clone()
    device, num_tokens = latents_BNC.device, masked_BN.shape[1]
    numbers = range(first_number, first_number + len(latents_BNC))
    plans = [
        plan_rounds(masked_N, sampling=sampling, image=b) for b, masked_N in zip(numbers, masked_BN.cpu().numpy(), strict=True)
    ]
    for number in range(1, sampling.rounds + 1):
        chosen = [plan[number - 1] if number <= len(plan) else _NOTHING for plan in plans]
        counts = [len(places) for places in chosen]
        if any(counts):
            row_K = torch.arange(len(chosen)).repeat_interleave(torch.tensor(counts)).to(device)
            place_K = torch.from_numpy(np.concatenate(chosen)).to(device)
            streams = [image_generator(sampling.seed, image=b, round_number=number) for b in numbers]
            noise = partial(_noise, streams=streams, counts=counts, channels=latents_BNC.shape[2], device=device)
            left_B = masked_BN.sum(dim=1) - torch.tensor(counts, device=device)
            drawn_KC = draw(
                Round(
                    latents_BNC=latents_BNC,
                    masked_BN=masked_BN,
                    row_K=row_K,
                    place_K=place_K,
                    noise=noise,
                    guidance_scale_K1=_guidance(sampling, 1 - left_B / num_tokens)[row_K, None] if sampling.guided else None,
                )
            )
            if not bool(drawn_KC.isfinite().all()):
                raise FloatingPointError(
                    "The image tokens just drawn are not finite: the weights or the guidance scale are unfit."
                )
            latents_BNC[row_K, place_K] = drawn_KC
            masked_BN[row_K, place_K] = False
        if progress is not None:
            progress(number, sampling.rounds, latents_BNC)
    return latents_BNC


_NOTHING = np.empty(0, dtype=np.int64)


def _guidance(sampling: ImageSampling, drawn_share_B: Tensor) -> Tensor:
    """Of a round, by the share of an image's tokens that it will leave drawn."""
    if sampling.guidance_schedule == "constant":
        return torch.full_like(drawn_share_B, sampling.guidance_scale)
    return 1 + (sampling.guidance_scale - 1) * drawn_share_B


def plan_rounds(masked_N: NDArray[np.bool_], *, sampling: ImageSampling, image: int) -> list[NDArray[np.int64]]:
    """The places that each round of an image draws: those masked, in order, few at first.

    Raises:
        ValueError: more rounds than tokens; where only a part is drawn, as many rounds as there are tokens do.
    """
    places = (
        np.arange(len(masked_N)) if sampling.order == "raster" else random_order(len(masked_N), seed=sampling.seed, image=image)
    )
    places = places[masked_N[places]]
    if not len(places):
        return []
    rounds = sampling.rounds if masked_N.all() else min(sampling.rounds, len(places))
    return [places[begin:end] for begin, end in cosine_rounds(len(places), rounds=rounds)]


def _noise(_: int, *, streams: list[np.random.Generator], counts: list[int], channels: int, device: torch.device) -> Tensor:
    """Of all images behind each other, [K, C]; each call goes on in the images' streams."""
    drawn = [
        stream.standard_normal((count, channels), dtype=np.float32)
        for stream, count in zip(streams, counts, strict=True)
        if count
    ]
    return torch.from_numpy(np.concatenate(drawn)).to(device)


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
