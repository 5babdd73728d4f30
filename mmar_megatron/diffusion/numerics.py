"""How much a low-precision network output disturbs a sampling step: closed form, and measurement against float64.

A DDIM step is x_s = A x_t + B u. Rounding makes u relatively wrong by r, so x_s is wrong by |B| r rms(u). On the circle
alpha = cos(phi), sigma = sin(phi), with the target u = cos(theta) eps - sin(theta) x,

    B = sin(phi_s - phi_t) / cos(phi_t - theta),

whose magnitude is least at theta = phi_t, the v-prediction, for every t and s. With rms(u) counted too, for data of standard
deviation d, the linear target with the least error is that of EDM (Karras et al., 2022), which is -v at d = 1.

Nothing is fitted: r follows from the number format. Rounding to a significand of m explicit bits makes an error uniform over a
spacing of 2^(floor(log2 |u|) - m); over values whose logarithm is spread evenly within an octave, r = 2^-m / sqrt(32 ln 2).

Axes: K steps of the trajectory, N samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmar_megatron.diffusion.parameterization import Parameterization, ParameterizationName
from mmar_megatron.diffusion.sampler import respaced_timesteps, step_coefficients
from mmar_megatron.diffusion.schedule import NoiseSchedule

TargetName = ParameterizationName | Literal["edm"]
Array = NDArray[np.float64]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def edm_coefficients(*, alpha: Any, sigma: Any, data_std: float) -> tuple[Any, Any]:
    """(c_x, c_eps) of the EDM network's target F = (x - c_skip x~) / c_out, x~ = x_t / alpha (Karras et al., 2022, table 1).

    Written so that neither alpha = 0 nor sigma = 0 is divided by. F has unit variance and is uncorrelated with x_t.
    """
    x_t_std = np.sqrt(sigma**2 + (data_std * alpha) ** 2)
    return sigma / (data_std * x_t_std), -data_std * alpha / x_t_std


def target_coefficients(target: TargetName, *, alpha: Any, sigma: Any, data_std: float) -> tuple[Any, Any]:
    """(c_x, c_eps) of a parameterisation of ours, or of EDM's."""
    if target == "edm":
        return edm_coefficients(alpha=alpha, sigma=sigma, data_std=data_std)
    return Parameterization(target).coefficients(alpha=alpha, sigma=sigma)


def relative_rounding_error(dtype: torch.dtype) -> float:
    """r: RMS error over RMS value of a smooth distribution rounded to nearest in `dtype` (module docstring)."""
    return torch.finfo(dtype).eps / math.sqrt(32 * math.log(2))


def round_to(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """`x` as it comes back from `dtype`; a format of one byte gets a scale that takes the tensor's largest value to its own."""
    if dtype.itemsize > 1:
        return x.to(dtype).to(x.dtype)
    scale = torch.finfo(dtype).max / x.abs().amax()
    return (x * scale).to(dtype).to(x.dtype) / scale


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The levels a sampler passes: step k goes from (alpha_t, sigma_t) to (alpha_s, sigma_s), the last to the clean token."""

    timesteps: list[int]
    alpha_t_K: Array
    sigma_t_K: Array
    alpha_s_K: Array
    sigma_s_K: Array

    @classmethod
    def of(cls, schedule: NoiseSchedule, *, steps: int) -> Trajectory:
        """Evenly respaced, as in `Sampler`."""
        timesteps = respaced_timesteps(schedule.num_timesteps, steps=steps)
        alpha_K, sigma_K = schedule.alpha_T[timesteps], schedule.sigma_T[timesteps]
        return cls(
            timesteps=timesteps,
            alpha_t_K=alpha_K,
            sigma_t_K=sigma_K,
            alpha_s_K=np.append(alpha_K[1:], 1.0),
            sigma_s_K=np.append(sigma_K[1:], 0.0),
        )


@dataclass(frozen=True, kw_only=True)
class StepErrors:
    """Errors of each step of a trajectory, for one target in one number format."""

    amplification_K: Array
    """|B|, for the target scaled to c_x^2 + c_eps^2 = 1 (on the circle v, eps and x are so by themselves)."""
    closed_form_K: Array
    """|B| r rms(u): RMS error of x_s."""
    measured_K: Array
    """RMS error of x_s with u rounded to the format and the step in fp32, against float64."""
    measured_low_state_K: Array
    """The same with x_s rounded to the format too, as in a sampler that does not keep its state in fp32."""


def step_errors(
    target: TargetName, *, trajectory: Trajectory, dtype: torch.dtype, data_std: float = 0.5, samples: int = 65536, seed: int = 0
) -> StepErrors:
    """Closed form and measurement for Gaussian tokens of standard deviation `data_std`.

    Data of standard deviation 1 are a special case, in which no part of v can be told from x_t: real latents have less.
    Where the target does not determine x_s (eps at pure noise), the closed form is infinite and there is no measurement (NaN).
    """
    path = trajectory
    c_x_K, c_eps_K = (
        np.broadcast_to(c, path.alpha_t_K.shape)
        for c in target_coefficients(target, alpha=path.alpha_t_K, sigma=path.sigma_t_K, data_std=data_std)
    )
    with np.errstate(divide="ignore"):
        a_K, b_K = step_coefficients(
            c_x=c_x_K,
            c_eps=c_eps_K,
            alpha_t=path.alpha_t_K,
            sigma_t=path.sigma_t_K,
            alpha_s=path.alpha_s_K,
            sigma_s=path.sigma_s_K,
        )
    u_rms_K = np.sqrt(c_eps_K**2 + (data_std * c_x_K) ** 2)

    generator = torch.Generator().manual_seed(seed)
    x_N, eps_N = torch.randn(2, samples, generator=generator, dtype=torch.float64)
    x_N = data_std * x_N
    measured_K, measured_low_state_K = np.full((2, len(path.timesteps)), np.nan)
    for k in np.flatnonzero(np.isfinite(b_K)):
        x_t_N = path.alpha_t_K[k] * x_N + path.sigma_t_K[k] * eps_N
        x_s_N = path.alpha_s_K[k] * x_N + path.sigma_s_K[k] * eps_N
        u_N = round_to(c_x_K[k] * x_N + c_eps_K[k] * eps_N, dtype=dtype).float()
        stepped_N = a_K[k] * x_t_N.float() + b_K[k] * u_N
        measured_K[k] = _rms(stepped_N - x_s_N)
        measured_low_state_K[k] = _rms(round_to(stepped_N, dtype=dtype) - x_s_N)
    return StepErrors(
        amplification_K=np.abs(b_K) * np.hypot(c_x_K, c_eps_K),
        closed_form_K=np.abs(b_K) * relative_rounding_error(dtype) * u_rms_K,
        measured_K=measured_K,
        measured_low_state_K=measured_low_state_K,
    )


def _rms(error_N: Tensor) -> float:
    return float(error_N.square().mean().sqrt())


def root_sum_of_squares(error_K: Array) -> float:
    """Of a whole trajectory: the errors of its steps added as if independent."""
    return float(np.sqrt(np.square(error_K).sum()))
