"""The diffusion head at work, in training and in painting: the loss of clean tokens, drawing tokens, and how sure it is of them,
under given conditions.

Axes: K tokens, R noise levels for each, C channels, Z width of the condition.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmar_megatron.diffusion.parameterization import Parameterization, add_noise, diffusion_loss, guide, zero_loss
from mmar_megatron.diffusion.sampler import NoiseSource, Sampler
from mmar_megatron.diffusion.schedule import NoiseSchedule


class Denoise(Protocol):
    """The head: noisy tokens at integer levels of the schedule, each token's condition -> the prediction u [K, R, C].

    Levels may be [1, R] or [1, 1], where all tokens have the same: they are embedded once then.
    """

    def __call__(self, x_KRC: Tensor, *, timestep_KR: Tensor, z_KZ: Tensor) -> Tensor:
        """Predict."""


def denoising_loss(
    denoise: Denoise,
    *,
    x_KC: Tensor,
    noise_KRC: Tensor,
    u_KR: Tensor,
    z_KZ: Tensor,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
) -> tuple[Tensor, Tensor]:
    """What predicting costs, and what predicting zero would, each [K, R] in fp32.

    Args:
        denoise: the head.
        x_KC: clean tokens.
        noise_KRC: standard normal.
        u_KR: noise levels as shares of the schedule's length, in [0, 1).
        z_KZ: conditions.
        schedule, parameterization: of the noise process.
    """
    timestep_KR = schedule.index(u_KR)
    alpha_KR1, sigma_KR1 = schedule.alpha_sigma(timestep_KR)
    x_KRC = x_KC[:, None].expand(-1, u_KR.shape[1], -1)
    noisy_KRC = add_noise(x_KRC, eps=noise_KRC, alpha=alpha_KR1, sigma=sigma_KR1)
    predicted_KRC = denoise(noisy_KRC, timestep_KR=timestep_KR, z_KZ=z_KZ)
    loss_KR = diffusion_loss(
        predicted_KRC, x=x_KRC, eps=noise_KRC, alpha=alpha_KR1, sigma=sigma_KR1, parameterization=parameterization
    )
    zero_KR = zero_loss(x=x_KRC, eps=noise_KRC, alpha=alpha_KR1, sigma=sigma_KR1, parameterization=parameterization)
    return loss_KR, zero_KR


def draw_tokens(
    denoise: Denoise, z_KZ: Tensor, *, sampler: Sampler, noise: NoiseSource, guidance_scale: float | Tensor | None = None
) -> Tensor:
    """Clean tokens [K, C] in fp32.

    Args:
        denoise: the head.
        z_KZ: conditions; with guidance [2 K, Z], the second half unconditional.
        sampler: the steps.
        noise: for each of them, [K, C].
        guidance_scale: of classifier-free guidance, also one for each token, [K, 1]; none: without.
    """

    def predict(x_KC: Tensor, t_K: Tensor) -> Tensor:
        if guidance_scale is None:
            return denoise(x_KC[:, None], timestep_KR=t_K[:1, None], z_KZ=z_KZ)[:, 0]
        u = denoise(x_KC.repeat(2, 1)[:, None], timestep_KR=t_K[:1, None], z_KZ=z_KZ)[:, 0]
        conditional, unconditional = u.chunk(2)
        return guide(conditional, u_uncond=unconditional, scale=guidance_scale)

    return sampler.sample(predict, noise=noise)


def spread(
    denoise: Denoise, z_KZ: Tensor, *, schedule: NoiseSchedule, parameterization: Parameterization, noise: NoiseSource
) -> Tensor:
    """How unsure the head is of each token, [K] in fp32.

    Two noises, at the level at which they weigh as much as a token, are taken for noised tokens: the clean ones that the head
    sees behind them agree where the condition leaves no choice, and follow the noise where it leaves any. Their mean square
    distance.

    Args:
        denoise: the head.
        z_KZ: conditions.
        schedule, parameterization: of the noise process.
        noise: called twice, [K, C].
    """
    level = int(np.abs(schedule.alpha_T - schedule.sigma_T).argmin())
    t_11 = torch.full((1, 1), level, dtype=torch.int64, device=z_KZ.device)
    alpha, sigma = schedule.alpha_sigma(t_11)
    x_K2C = sigma * torch.stack((noise(0), noise(1)), dim=1)
    u_K2C = denoise(x_K2C, timestep_KR=t_11, z_KZ=z_KZ)
    clean_K2C, _ = parameterization.to_x_eps(u_K2C, x_t=x_K2C, alpha=alpha, sigma=sigma)
    return (clean_K2C[:, 0] - clean_K2C[:, 1]).square().mean(dim=1)
