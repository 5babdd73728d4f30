"""What the network predicts, the loss on it, and how it turns back into a clean token and its noise.

Every parameterisation is linear in the clean token and the noise: u = c_x x + c_eps eps. With x_t = alpha x + sigma eps this is a
2 x 2 system, so that (x_t, u) and (x, eps) say the same, unless its determinant alpha c_eps - sigma c_x is 0.

    v      alpha eps - sigma x   Salimans and Ho (2022): the velocity on the circle alpha^2 + sigma^2 = 1; determinant 1
    eps    eps                   Ho et al. (2020); determinant alpha: nothing can be said of x where alpha = 0
    x      x                     determinant -sigma
    flow   eps - x               Liu et al. (2022): the velocity on the straight line alpha + sigma = 1; determinant 1

Inputs of any precision are widened to fp32 first: the noise process and the loss do not inherit the network's number format.
Axes: ... any rows, C channels. `alpha` and `sigma` are [..., 1], from `NoiseSchedule.alpha_sigma`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmar_megatron.diffusion.schedule import NoiseSchedule

ParameterizationName = Literal["v", "eps", "x", "flow"]
Level = TypeVar("Level", float, Tensor, NDArray[np.float64])


def _widen(x: Tensor) -> Tensor:
    """`x` in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Parameterization:
    """One of v, eps, x, flow.

    Raises:
        ValueError: The name is unknown.
    """

    name: ParameterizationName

    def __post_init__(self) -> None:
        if self.name not in get_args(ParameterizationName):
            raise ValueError(
                f"Unknown parameterization {self.name!r}: choose one of {', '.join(get_args(ParameterizationName))}."
            )

    def coefficients(self, *, alpha: Level, sigma: Level) -> tuple[Level | float, Level | float]:
        """(c_x, c_eps) of the target u = c_x x + c_eps eps."""
        match self.name:
            case "v":
                return -sigma, alpha
            case "eps":
                return 0.0, 1.0
            case "x":
                return 1.0, 0.0
            case "flow":
                return -1.0, 1.0

    def target(self, *, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should predict, [..., C], from the clean token and its noise, [..., C] each."""
        c_x, c_eps = self.coefficients(alpha=alpha, sigma=sigma)
        return c_x * _widen(x) + c_eps * _widen(eps)

    def to_x_eps(self, u: Tensor, *, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The clean token and the noise, [..., C] each, that a prediction u and the noised token x_t imply."""
        c_x, c_eps = self.coefficients(alpha=alpha, sigma=sigma)
        u, x_t = _widen(u), _widen(x_t)
        determinant = alpha * c_eps - sigma * c_x
        return (c_eps * x_t - sigma * u) / determinant, (alpha * u - c_x * x_t) / determinant


def check_compatible(schedule: NoiseSchedule, parameterization: Parameterization) -> None:
    """Refuses combinations that cannot be sampled, or that do not mean what their names say.

    Raises:
        ValueError: `eps` with a schedule that ends in pure noise; `flow` or `v` on the other's path.
    """
    straight = schedule.name == "linear_interpolation"
    match parameterization.name:
        case "eps" if schedule.ends_in_pure_noise:
            raise ValueError(
                f"The parameterization 'eps' says nothing of the token at the last level of the schedule {schedule.name!r}, "
                f"which is pure noise: use {'flow' if straight else 'v'!r}, or the schedule 'cosine'."
            )
        case "flow" if not straight:
            raise ValueError(
                f"The parameterization 'flow' is the velocity on a straight path, which the schedule {schedule.name!r} is not: "
                "use the schedule 'linear_interpolation', or the parameterization 'v'."
            )
        case "v" if straight:
            raise ValueError(
                "The parameterization 'v' is the velocity on a circle, which the schedule 'linear_interpolation' is not: "
                "use the parameterization 'flow', or the schedule 'cosine'."
            )


def add_noise(x: Tensor, *, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noised token x_t = alpha x + sigma eps, [..., C]."""
    return alpha * _widen(x) + sigma * _widen(eps)


def diffusion_loss(
    u: Tensor, *, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, parameterization: Parameterization
) -> Tensor:
    """Squared error of the prediction u [..., C], averaged over channels: [...], in fp32 at least."""
    target = parameterization.target(x=x, eps=eps, alpha=alpha, sigma=sigma)
    return (_widen(u) - target).square().mean(dim=-1)


def zero_loss(*, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, parameterization: Parameterization) -> Tensor:
    """The `diffusion_loss` of predicting zero: what an untrained head (its output layer is zero) scores. Shape [...]."""
    return parameterization.target(x=x, eps=eps, alpha=alpha, sigma=sigma).square().mean(dim=-1)


def guide(u_cond: Tensor, *, u_uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022) on the prediction itself, [..., C], in fp32 at least.

    Scale 0 is unconditional, 1 conditional, more goes further. As u is affine in x at a given x_t, to guide u is to guide x.
    """
    u_cond, u_uncond = _widen(u_cond), _widen(u_uncond)
    return u_uncond + scale * (u_cond - u_uncond)
