"""Samplers: from noise to clean tokens in a few steps of the diffusion head.

A step from level t to s takes the clean token x and the noise eps that the network's output implies, and puts together

    x_s = alpha_s x + sigma_s (rho eps + sqrt(1 - rho^2) temperature z),    z fresh standard normal noise.

DDIM (Song et al., 2021) has rho = 1. Ancestral sampling (Ho et al., 2020, with the posterior variance "fixed small") has
rho = (alpha_t sigma_s) / (alpha_s sigma_t); so it is for any alpha and sigma, variance preserving or not (Kingma et al., 2021).
Both x and eps are linear in (x_t, u), so a step is x_s = A x_t + B u + C z; the three numbers are computed in float64.
With v, x and flow nothing is divided by alpha_t: they are exact at a level of pure noise.

DPM-Solver++(2M) (Lu et al., 2022, algorithm 2) follows DDIM's path to the second order: it takes the clean token not as it is
predicted at t but as a line through the last two predictions, over lambda = log(alpha / sigma), says that it will be midway:

    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - exp(-h)) ((1 + w) x - w x_before),  h = lambda_s - lambda_t, w = h / 2 h_before.

Its first step and its last, to which h is infinite, are DDIM's (w = 0). Levels evenly spaced in t have strides h so unequal that
the line misleads, and levels evenly spaced in lambda are too few where most happens: it takes those midway (`midway_timesteps`).

Axes: N rows (tokens), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmar_megatron.diffusion.parameterization import Parameterization, check_compatible
from mmar_megatron.diffusion.schedule import NoiseSchedule

SamplerKind = Literal["ddim", "ancestral", "dpm_solver++"]

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t_NC fp32, t_N int64) -> u_NC."""

NoiseSource = Callable[[int], Tensor]
"""Standard normal noise [N, C] fp32 for draw 0 (the start), 1, 2, ... (after that many steps)."""


def gaussian_noise(generator: torch.Generator, *, shape: tuple[int, int]) -> NoiseSource:
    """Noise from one generator, on its device: for callers that do not need rows to be independent of the batch they are in."""
    return lambda draw: torch.randn(shape, generator=generator, device=generator.device)


def respaced_timesteps(num_timesteps: int, *, steps: int) -> list[int]:
    """`steps` evenly spaced levels from T - 1 down to 0, both included, rounded as in iDDPM.

    Raises:
        ValueError: There are not that many levels.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"{steps} sampling steps asked of a schedule of {num_timesteps} timesteps: use 1 to {num_timesteps}.")
    return [int(t) for t in np.linspace(num_timesteps - 1, 0, steps).round()]


def midway_timesteps(schedule: NoiseSchedule, *, steps: int) -> list[int]:
    """`steps` levels from T - 1 down to 0, both included, evenly spaced in the mean of t and lambda as shares of their ranges.

    Raises:
        ValueError: There are not that many levels.
    """
    even = respaced_timesteps(schedule.num_timesteps, steps=steps)
    if steps < 3:
        return even
    alpha_T = np.maximum(schedule.alpha_T, schedule.alpha_T[schedule.alpha_T > 0].min())  # pure noise has no lambda
    lambda_T = np.log(alpha_T / schedule.sigma_T)
    share_T = (lambda_T - lambda_T[-1]) / (lambda_T[0] - lambda_T[-1]) + 1 - np.arange(schedule.num_timesteps) / even[0]
    levels: list[int] = []
    for k, target in enumerate(np.linspace(0, 2, steps)):
        nearest = int(np.abs(share_T - target).argmin())
        least = steps - 1 - k  # as many must be left below
        levels.append(max(least, min(nearest, levels[-1] - 1) if levels else even[0]))
    return levels


def step_coefficients(*, c_x: Any, c_eps: Any, alpha_t: Any, sigma_t: Any, alpha_s: Any, sigma_s: Any) -> tuple[Any, Any]:
    """(A, B) of alpha_s x + sigma_s eps = A x_t + B u, for the target u = c_x x + c_eps eps. Floats or arrays."""
    determinant = alpha_t * c_eps - sigma_t * c_x
    return (alpha_s * c_eps - sigma_s * c_x) / determinant, (alpha_t * sigma_s - sigma_t * alpha_s) / determinant


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step from level `t`: x_s = A x_t + B u + C z + M x_before, with the clean token x = P x_t + Q u."""

    t: int
    state: float
    """A"""
    output: float
    """B"""
    noise: float = 0.0
    """C"""
    memory: float = 0.0
    """M"""
    clean_state: float = 0.0
    """P"""
    clean_output: float = 0.0
    """Q"""


class Sampler:
    """Draws clean tokens. The state is fp32 throughout, whatever the network computes in.

    Args:
        schedule: The one the network was trained with.
        parameterization: What the network predicts.
        steps: Evaluations of the network for each token.
        kind: `ddim`: deterministic given the start; `dpm_solver++`: the same path in fewer steps; `ancestral`: fresh noise after
            each step but the last.
        temperature: Scales the fresh noise of `ancestral` (as MAR's does), and the start of the others, which draw no more.

    Raises:
        ValueError: Schedule and parameterisation do not go together, an unknown sampler, more steps than timesteps, or a negative
            temperature.
    """

    def __init__(
        self,
        *,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        steps: int,
        kind: SamplerKind = "ddim",
        temperature: float = 1.0,
    ) -> None:
        check_compatible(schedule, parameterization)
        if kind not in get_args(SamplerKind):
            raise ValueError(f"Unknown sampler {kind!r}: choose one of {', '.join(get_args(SamplerKind))}.")
        if temperature < 0:
            raise ValueError(
                f"The temperature is {temperature}: use 0 (no randomness) or more; 1 samples the model's distribution."
            )
        self.initial_scale = 1.0 if kind == "ancestral" else temperature
        if kind == "dpm_solver++":
            timesteps = midway_timesteps(schedule, steps=steps)
        else:
            timesteps = respaced_timesteps(schedule.num_timesteps, steps=steps)
        self.steps: list[Step] = []
        stride_before = math.inf  # none: the first step is of the first order
        for t, s in zip(timesteps, [*timesteps[1:], None], strict=True):
            alpha_t, sigma_t = float(schedule.alpha_T[t]), float(schedule.sigma_T[t])
            alpha_s, sigma_s = (1.0, 0.0) if s is None else (float(schedule.alpha_T[s]), float(schedule.sigma_T[s]))
            shrink = alpha_t * sigma_s / (alpha_s * sigma_t)  # exp(-h)
            rho = shrink if kind == "ancestral" else 1.0
            c_x, c_eps = parameterization.coefficients(alpha=alpha_t, sigma=sigma_t)
            target = {"c_x": c_x, "c_eps": c_eps, "alpha_t": alpha_t, "sigma_t": sigma_t}
            state, output = step_coefficients(**target, alpha_s=alpha_s, sigma_s=rho * sigma_s)
            step = Step(t=t, state=state, output=output, noise=temperature * sigma_s * (1 - rho**2) ** 0.5)
            if kind == "dpm_solver++":  # DDIM's step, and w (x - x_before) more
                stride = math.inf if shrink == 0 else -math.log(shrink)
                w = stride / (2 * stride_before) if math.isfinite(stride) else 0.0
                more, stride_before = alpha_s * (1 - shrink) * w, stride
                clean_state, clean_output = step_coefficients(**target, alpha_s=1.0, sigma_s=0.0)
                step = replace(
                    step,
                    state=state + more * clean_state,
                    output=output + more * clean_output,
                    memory=-more,
                    clean_state=clean_state,
                    clean_output=clean_output,
                )
            self.steps.append(step)

    def timesteps(self) -> list[int]:
        """The levels at which the network is evaluated, from the noisiest down."""
        return [step.t for step in self.steps]

    @torch.no_grad()
    def sample(self, predict: Predict, *, noise: NoiseSource) -> Tensor:
        """Clean tokens [N, C] in fp32.

        Args:
            predict: (x_t_NC fp32, t_N int64) -> u_NC, conditions and guidance inside.
            noise: Called with 0 for the start, and with k for the noise after the k-th step where there is any. All randomness
                is the caller's: noise that depends on the row's identity alone makes samples independent of batch and layout.
        """
        x_NC = clean_NC = self.initial_scale * noise(0).float()
        for k, step in enumerate(self.steps, start=1):
            t_N = torch.full(x_NC.shape[:1], step.t, dtype=torch.int64, device=x_NC.device)
            u_NC = predict(x_NC, t_N).float()
            next_NC = step.state * x_NC + step.output * u_NC
            if step.memory:
                next_NC = next_NC + step.memory * clean_NC  # of the step before
            if step.noise > 0:
                next_NC = next_NC + step.noise * noise(k).float()
            if step.clean_output:
                clean_NC = step.clean_state * x_NC + step.clean_output * u_NC
            x_NC = next_NC
        return x_NC
