"""Noise schedules: how much of the clean token is left at each discrete noise level.

A noised token is x_t = alpha_t x + sigma_t eps, for t = 0 (nearly clean) to T - 1 (nearly, or entirely, noise).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ScheduleName = Literal["cosine", "cosine_zero_snr", "linear_interpolation"]

MAX_BETA = 0.999
COSINE_OFFSET = 0.008


def _alpha_bar(num_timesteps: int, *, max_beta: float) -> NDArray[np.float64]:
    """The squared-cosine alpha^2 of Nichol and Dhariwal (2021, eq. 17), each step's beta clipped at `max_beta`. Shape [T]."""
    edges = np.linspace(0.0, 1.0, num_timesteps + 1)
    f = np.cos((edges + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
    f[-1] = 0.0  # cos(pi / 2) in floating point is not quite 0
    return np.cumprod(np.maximum(f[1:] / f[:-1], 1 - max_beta))


class NoiseSchedule:
    """The table of (alpha, sigma), in float64 on the CPU, with an fp32 copy for each device it is used on.

    - `cosine`: the variance-preserving schedule of iDDPM and MAR. Clipping leaves alpha = 5e-5 at the last of 1000 levels.
    - `cosine_zero_snr`: the same without the clip, so that it differs in the last level alone, which is pure noise
      (the requirement of Lin et al., 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed").
    - `linear_interpolation`: alpha = 1 - tau, sigma = tau with tau = (t + 1) / T, the straight path of rectified flow
      (Liu et al., 2022). It does not preserve variance, and its last level is pure noise too.

    Not a module, and the table is numpy's: building a model on the meta device must leave it alone.

    Args:
        name: One of the above.
        num_timesteps: Number of noise levels T.

    Raises:
        ValueError: The name is unknown.
    """

    def __init__(self, name: ScheduleName, *, num_timesteps: int = 1000) -> None:
        match name:
            case "cosine" | "cosine_zero_snr":
                alpha_bar_T = _alpha_bar(num_timesteps, max_beta=MAX_BETA if name == "cosine" else 1.0)
                self.alpha_T, self.sigma_T = np.sqrt(alpha_bar_T), np.sqrt(1 - alpha_bar_T)
            case "linear_interpolation":
                self.sigma_T = np.arange(1, num_timesteps + 1) / num_timesteps
                self.alpha_T = 1 - self.sigma_T
            case _:
                raise ValueError(f"Unknown noise schedule {name!r}: choose one of {', '.join(get_args(ScheduleName))}.")
        self.name: ScheduleName = name
        self.num_timesteps = num_timesteps
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def ends_in_pure_noise(self) -> bool:
        """The last level holds nothing of the clean token (its signal-to-noise ratio is 0)."""
        return bool(self.alpha_T[-1] == 0)

    def index(self, u: Tensor) -> Tensor:
        """Noise levels from shares of the schedule's length: [...] fp32 in [0, 1) -> [...] int64 in [0, T)."""
        return (u * self.num_timesteps).long()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise amplitudes of levels t [...] int64: two fp32 tensors [..., 1], ready for a channel axis."""
        if t.device not in self._tables:
            table_T2 = np.stack([self.alpha_T, self.sigma_T], axis=-1).astype(np.float32)
            self._tables[t.device] = torch.from_numpy(table_T2).to(t.device)
        alpha, sigma = self._tables[t.device][t].split(1, dim=-1)
        return alpha, sigma
