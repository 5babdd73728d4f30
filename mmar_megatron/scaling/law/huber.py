"""The fit itself: Huber loss of log errors, summed over runs, brought to its minimum for many problems at once.

The form is L = E + A / N^alpha + B / D^beta, and in logarithms (Hoffmann et al., arXiv 2203.15556, appendix D.3)

    log L = logsumexp(e, a - alpha x, b - beta y),    e = log E,  x = log N - mean,  y = log D - mean.

Here a and b are the logarithms of the two terms at the mean of x and y, and not log A and log B: at the origin of log N, far away
from all runs, a and alpha are almost one direction. The loss is a sum and not a mean, and there is no tolerance on its value: the
first published exponents came of an optimiser that had stopped early (Besiroglu et al., arXiv 2404.10102).

Axes: P problems (starts, or resamples of the runs), I runs, 5 parameters in the order e, a, b, alpha, beta.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DELTA = 1e-3
"""Where the Huber loss turns from a square into a line, in log loss (Hoffmann et al.)."""
_DELTAS = (0.1, 0.03, 0.01, 0.003)
"""Wider ones on the way there: the nearer to a sum of absolute values, the more a far start is caught at a ridge."""
_MOST_STEPS = 300
_SMALLEST_STEP = 1e-10
"""Of a logarithm or an exponent."""
_MOST_DAMPING = 1e12


@dataclass(frozen=True)
class Surface:
    """The runs to be fitted, and the box of the parameters."""

    x_I: Array
    """log N, less its mean."""
    y_I: Array
    """log D, less its mean."""
    log_loss_I: Array
    lower_5: Array
    upper_5: Array


@dataclass(frozen=True)
class Minima:
    """Where the problems ended."""

    theta_P5: Array
    value_P: Array
    """Of the summed loss."""
    converged_P: NDArray[np.bool_]


def _terms(surface: Surface, theta_P5: Array) -> tuple[Array, Array]:
    """Each of the terms E, A / N^alpha, B / D^beta as a share of the loss [3, P, I], and log L less the measured one [P, I]."""
    e, a, b, alpha, beta = (column[:, None] for column in theta_P5.T)
    terms = np.empty((3, len(theta_P5), len(surface.x_I)))
    terms[0] = e
    terms[1] = a - alpha * surface.x_I
    terms[2] = b - beta * surface.y_I
    largest = terms.max(axis=0)
    np.exp(terms - largest, out=terms)
    total = terms.sum(axis=0)
    terms /= total
    return terms, largest + np.log(total) - surface.log_loss_I


def huber(error: Array, delta: float) -> Array:
    """Half the square up to `delta`, then a line."""
    size = np.abs(error)
    return np.where(size <= delta, 0.5 * error**2, delta * (size - 0.5 * delta))


def minimise(surface: Surface, start_P5: Array, weight_PI: Array, *, delta: float = DELTA) -> Minima:
    """From each start to a minimum, by way of wider Huber losses.

    Args:
        start_P5: of each problem.
        weight_PI: of each run in it, 1 on average.
        delta: of the Huber loss.
    """
    theta_P5 = start_P5
    for wider in _DELTAS:
        if wider > delta:
            theta_P5 = _descend(surface, theta_P5, weight_PI, delta=wider, most_steps=15).theta_P5
    return _descend(surface, theta_P5, weight_PI, delta=delta, most_steps=_MOST_STEPS)


def _descend(surface: Surface, start_P5: Array, weight_PI: Array, *, delta: float, most_steps: int) -> Minima:
    """Newton's method with damping, each problem with its own, on those that have not arrived."""
    theta_P5 = np.clip(start_P5, surface.lower_5, surface.upper_5)
    damping_P = np.full(len(theta_P5), 1e-2)
    value_P = _value(surface, theta_P5, weight_PI, delta)
    converged_P = np.zeros(len(theta_P5), dtype=bool)
    going = np.arange(len(theta_P5))
    for _ in range(most_steps):
        theta, weight, damping, value = theta_P5[going], weight_PI[going], damping_P[going], value_P[going]
        moved = np.clip(theta + _step(surface, theta, weight, damping, delta), surface.lower_5, surface.upper_5)
        new_value = _value(surface, moved, weight, delta)
        better = new_value < value
        theta_P5[going] = np.where(better[:, None], moved, theta)
        value_P[going] = np.where(better, new_value, value)
        damping_P[going] = np.where(better, damping * 0.1, damping * 8)
        small = np.abs(moved - theta).max(axis=1) < _SMALLEST_STEP
        arrived = small | (damping_P[going] > _MOST_DAMPING)
        converged_P[going] = arrived
        going = going[~arrived]
        if not len(going):
            break
    return Minima(theta_P5, value_P, converged_P)


def _value(surface: Surface, theta_P5: Array, weight_PI: Array, delta: float) -> Array:
    _, error_PI = _terms(surface, theta_P5)
    return (weight_PI * huber(error_PI, delta)).sum(axis=1)


def _step(surface: Surface, theta_P5: Array, weight_PI: Array, damping_P: Array, delta: float) -> Array:
    """The damped Newton step, in coordinates in which Gauss and Newton's matrix of the reweighted squares is the unit matrix.

    So a long curved valley is round. Directions of negative curvature are gone down as if they were positive. Parameters at the
    edge of the box that are pushed outwards stay.
    """
    x_I, y_I = surface.x_I, surface.y_I
    share, error_PI = _terms(surface, theta_P5)
    size_PI = np.abs(error_PI)
    slope_PI = np.stack([share[0], share[1], share[2], -x_I * share[1], -y_I * share[2]], axis=1)
    pull_PI = weight_PI * np.clip(error_PI, -delta, delta)
    gradient_P5 = (slope_PI @ pull_PI[:, :, None])[:, :, 0]
    inside_PI = weight_PI * (size_PI <= delta)
    round_PI = weight_PI * np.minimum(1.0, delta / np.maximum(size_PI, 1e-300))
    across = slope_PI.transpose(0, 2, 1)
    hessian = (slope_PI * (inside_PI - pull_PI)[:, None]) @ across
    hessian += _own_curvature(share, pull_PI, x_I, y_I)
    metric = (slope_PI * round_PI[:, None]) @ across

    outwards = ((theta_P5 <= surface.lower_5) & (gradient_P5 > 0)) | ((theta_P5 >= surface.upper_5) & (gradient_P5 < 0))
    gradient_P5 = np.where(outwards, 0.0, gradient_P5)
    free = ~outwards[:, :, None] & ~outwards[:, None, :]
    unit = np.eye(5)
    scale = np.sqrt(np.maximum(np.diagonal(metric, axis1=1, axis2=2), 1e-30))
    scaling = scale[:, :, None] * scale[:, None, :]
    metric = np.where(free, metric / scaling, unit) + 1e-12 * unit
    hessian = np.where(free, hessian / scaling, unit)
    inverse = np.linalg.inv(np.linalg.cholesky(metric))
    curvature, basis = np.linalg.eigh(inverse @ hessian @ inverse.transpose(0, 2, 1))
    to_basis = basis.transpose(0, 2, 1) @ inverse
    along = (to_basis @ (gradient_P5 / scale)[:, :, None])[:, :, 0]
    along /= np.abs(curvature) + damping_P[:, None]
    return -(to_basis.transpose(0, 2, 1) @ along[:, :, None])[:, :, 0] / scale


def _own_curvature(share: Array, pull_PI: Array, x_I: Array, y_I: Array) -> Array:
    """What the form's own second derivatives add to the Hessian, but for -pull times the slopes' product: [P, 5, 5]."""
    added = np.zeros((len(pull_PI), 5, 5))
    added[:, 0, 0] = (pull_PI * share[0]).sum(axis=1)
    for offset, exponent, place_I, of_term in ((1, 3, x_I, share[1]), (2, 4, y_I, share[2])):
        pulled = pull_PI * of_term
        added[:, offset, offset] = pulled.sum(axis=1)
        added[:, offset, exponent] = added[:, exponent, offset] = -(pulled @ place_I)
        added[:, exponent, exponent] = pulled @ place_I**2
    return added
