"""Masked auto-regressive painting (MAR, arXiv 2406.11838, section 4): all tokens are masked at first; in each round the diffusion
head draws some of those that still are, given what the backbone makes of the others.

From which noise a token is drawn follows from (seed, number of the image, round) alone, and in which round from that and the
image itself: neither the batch nor the layout changes an image. Axes: B images, N tokens of an image, C channels of a token, K
tokens that something is done with.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmar_megatron.diffusion.conditional import draw_tokens, spread
from mmar_megatron.diffusion.parameterization import Parameterization
from mmar_megatron.diffusion.sampler import NoiseSource, Sampler, SamplerKind
from mmar_megatron.diffusion.schedule import NoiseSchedule

Order = Literal["random", "raster", "confidence"]
GuidanceSchedule = Literal["constant", "linear"]


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """How images are drawn.

    Raises:
        ValueError: an unknown order or guidance schedule, a guidance scale that is not finite, no rounds to refresh after, or a
            seed that is none.
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
    """In which tokens are drawn. `raster`: row by row; `confidence`: in each round those of which the head is surest."""
    sampler: SamplerKind = "dpm_solver++"
    temperature: float = 1.0
    refresh_every: int = 1
    """Rounds after which the backbone runs over the whole image again. In the others it runs over the tokens that changed and
    those to draw, and the rest keep their keys and values, as LazyMAR (arXiv 2503.12450) re-uses features. 1 is exact."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("order", Order), ("guidance_schedule", GuidanceSchedule)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}: choose one of {', '.join(get_args(kinds))}.")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"The guidance scale is {self.guidance_scale}: give a number; 1 is no guidance.")
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every is {self.refresh_every}: give 1 (the whole image in each round) or more.")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"The seed is {self.seed}: give a whole number from 0 to 2^64 - 1.")

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


class Denoiser(Protocol):
    """The part of a model that holds the diffusion head."""

    schedule: NoiseSchedule
    parameterization: Parameterization

    def denoise(self, x_KRC: Tensor, *, timestep_KR: Tensor, z_KZ: Tensor) -> Tensor:
        """See `conditional.Denoise`."""


class Painter(ABC):
    """The model at work on a batch of images; alike on all ranks.

    Args:
        model: none where this rank does not hold the head, which `draw` and `spread` are then overridden for.
        sampling: how.

    Attributes:
        halves: 2 with guidance, where the second half of the conditions has no prompt; else 1.
    """

    def __init__(self, model: Denoiser | None, *, sampling: ImageSampling) -> None:
        self.halves = 2 if sampling.guided else 1
        self._model, self._sampling = model, sampling

    @abstractmethod
    def look(self, latents_BNC: Tensor, *, masked_BN: Tensor, anew_BN: Tensor) -> None:
        """Runs the backbone over some tokens; what is asked for next is of these.

        Args:
            latents_BNC: what is drawn so far; of no meaning where masked.
            masked_BN: what is not.
            anew_BN: the tokens to run over, at first all; others stay to them what they were.
        """

    @abstractmethod
    def conditions(self, row_K: Tensor, place_K: Tensor, *, halves: int) -> Tensor:
        """Of the tokens of these images at these places in the last look; of the first half, or of both behind each other."""

    def draw(self, row_K: Tensor, place_K: Tensor, *, noise: NoiseSource, guidance_scale_K1: Tensor | None) -> Tensor:
        """These tokens, [K, C] in fp32.

        Args:
            row_K, place_K: which.
            noise: for the head's steps, [K, C].
            guidance_scale_K1: of each token; none: without guidance.
        """
        model = self._model
        assert model is not None
        return draw_tokens(
            model.denoise,
            self.conditions(row_K, place_K, halves=self.halves),
            sampler=self._sampling.head_sampler(schedule=model.schedule, parameterization=model.parameterization),
            noise=noise,
            guidance_scale=guidance_scale_K1,
        )

    def spread(self, row_K: Tensor, place_K: Tensor, *, noise: NoiseSource) -> Tensor:
        """How unsure the head is of these tokens, [K]: see `conditional.spread`."""
        model = self._model
        assert model is not None
        z_KZ = self.conditions(row_K, place_K, halves=1)
        return spread(model.denoise, z_KZ, schedule=model.schedule, parameterization=model.parameterization, noise=noise)


Report = Callable[[int, int, Tensor, Tensor], None]
"""Told of a round: its number, from 1; the number of rounds; the latents so far, [B, N, C]; which of them are masked still."""


def paint_tokens(
    painter: Painter,
    *,
    latents_BNC: Tensor,
    masked_BN: Tensor,
    sampling: ImageSampling,
    first_number: int = 0,
    progress: Report | None = None,
) -> Tensor:
    """Draws all masked tokens; the others stay as they are. Returns [B, N, C].

    Args:
        painter: the model.
        latents_BNC: fp32; what stands at masked tokens does not matter.
        masked_BN: bool, tokens to draw.
        sampling: rounds, order, guidance, seed.
        first_number: number of the first image, where a longer list is painted in parts.
        progress: called after each round.

    Raises:
        ValueError: more rounds than there are tokens to draw in an image that is masked as a whole.
        FloatingPointError: what was drawn is not finite.
    """
    latents_BNC, device = latents_BNC.clone(), latents_BNC.device
    numbers = range(first_number, first_number + len(latents_BNC))
    plans = [
        plan_rounds(masked_N, sampling=sampling, image=b) for b, masked_N in zip(numbers, masked_BN.cpu().numpy(), strict=True)
    ]
    plan_BN = torch.from_numpy(np.stack(plans)).to(device)
    for number in range(1, sampling.rounds + 1):
        masked_BN, chosen_BN = plan_BN >= number, plan_BN == number
        if bool(chosen_BN.any()):
            streams = [image_generator(sampling.seed, image=b, round_number=number) for b in numbers]
            noise = partial(_noise, streams, channels=latents_BNC.shape[2], device=device)
            by_confidence = sampling.order == "confidence"
            anew_BN = torch.ones_like(masked_BN)
            if (number - 1) % sampling.refresh_every:
                anew_BN = (masked_BN if by_confidence else chosen_BN) | (plan_BN == number - 1)
            painter.look(latents_BNC, masked_BN=masked_BN, anew_BN=anew_BN)
            if by_confidence:
                plan_BN = _surest_first(painter, plan_BN, masked_BN=masked_BN, noise=noise(_counts(masked_BN)))
                chosen_BN = plan_BN == number
            row_K, place_K = chosen_BN.nonzero(as_tuple=True)
            drawn_share_B = 1 - (plan_BN > number).float().mean(dim=1)
            drawn_KC = painter.draw(
                row_K,
                place_K,
                noise=noise(_counts(chosen_BN)),
                guidance_scale_K1=_guidance(sampling, drawn_share_B)[row_K, None] if sampling.guided else None,
            )
            _check_finite(drawn_KC)
            latents_BNC[row_K, place_K] = drawn_KC
        if progress is not None:
            progress(number, sampling.rounds, latents_BNC, plan_BN > number)
    return latents_BNC


def _guidance(sampling: ImageSampling, drawn_share_B: Tensor) -> Tensor:
    """Of a round, by the share of an image's tokens that it will leave drawn."""
    if sampling.guidance_schedule == "constant":
        return torch.full_like(drawn_share_B, sampling.guidance_scale)
    return 1 + (sampling.guidance_scale - 1) * drawn_share_B


def plan_rounds(masked_N: NDArray[np.bool_], *, sampling: ImageSampling, image: int) -> NDArray[np.int64]:
    """The round, from 1, that draws each token of an image, few at first; 0: it stays. By confidence only their numbers count.

    Raises:
        ValueError: more rounds than tokens; where only a part is drawn, as many rounds as there are tokens do.
    """
    num_tokens = len(masked_N)
    order = random_order(num_tokens, seed=sampling.seed, image=image) if sampling.order == "random" else np.arange(num_tokens)
    places = order[masked_N[order]]
    round_N = np.zeros(num_tokens, dtype=np.int64)
    if len(places):
        rounds = sampling.rounds if masked_N.all() else min(sampling.rounds, len(places))
        for number, (begin, end) in enumerate(cosine_rounds(len(places), rounds=rounds), start=1):
            round_N[places[begin:end]] = number
    return round_N


def _surest_first(painter: Painter, plan_BN: Tensor, *, masked_BN: Tensor, noise: NoiseSource) -> Tensor:
    """The same number of tokens in each round to come, but those first of which the head is surest."""
    row_K, place_K = masked_BN.nonzero(as_tuple=True)
    spread_BN = torch.full(masked_BN.shape, math.inf, device=masked_BN.device)
    spread_K = painter.spread(row_K, place_K, noise=noise)
    _check_finite(spread_K)
    spread_BN[row_K, place_K] = spread_K
    surest_BN = spread_BN.argsort(dim=1, stable=True)
    to_come_BN = torch.where(masked_BN, plan_BN, torch.iinfo(plan_BN.dtype).max).sort(dim=1).values
    return torch.where(masked_BN, plan_BN.scatter(1, surest_BN, to_come_BN), plan_BN)


def _check_finite(drawn: Tensor) -> None:
    if not bool(drawn.isfinite().all()):
        raise FloatingPointError("The image tokens just drawn are not finite: the weights or the guidance scale are unfit.")


def _counts(chosen_BN: Tensor) -> list[int]:
    counts: list[int] = chosen_BN.sum(dim=1).tolist()
    return counts


def _noise(streams: list[np.random.Generator], counts: list[int], *, channels: int, device: torch.device) -> NoiseSource:
    """So many tokens of each image behind each other, [K, C]; each call goes on in the images' streams."""

    def draw(_: int) -> Tensor:
        drawn = [
            stream.standard_normal((count, channels), dtype=np.float32)
            for stream, count in zip(streams, counts, strict=True)
            if count
        ]
        return torch.from_numpy(np.concatenate(drawn)).to(device)

    return draw


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
