"""The law L = E + A / N^alpha + B / D^beta of some runs, and those of their resamples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.progress import Progress
from mmar_megatron.scaling.law.huber import Array, Surface, minimise

EXPONENTS = (1e-3, 5.0)
"""Box of alpha and beta. At its edge a term is a constant, or is there at the smallest runs alone."""
FEWEST_POINTS = 6
"""One more than is fitted."""
_FEWEST_VALUES = 3
"""Different sizes, and numbers of tokens: a curve with a limit goes through any two."""
_SMALLEST_RANGE = 1.5
_OFF_THE_LINE = 1.05
"""Factor that runs must scatter by (a standard deviation) about a line in log N and log D."""
_FALLS = 15.0
"""Below the smallest loss, in log, the box of a term ends, at the smallest N or D."""
_NOUGHT = 11.5
"""And there it counts as nought: 1e-5 of the smallest loss."""
_RISES = 5.0
_START_EXPONENTS = np.geomspace(0.03, 2, 8)
_SAME_VALUE = 1e-6
_NO_VALUE = 1e-18
_CHUNK = 250


@dataclass(frozen=True)
class Law:
    """P laws, each parameter [P]; one of all runs, or those of resamples."""

    E: Array
    A: Array
    B: Array
    alpha: Array
    beta: Array

    def loss(self, params: Array, tokens: Array) -> Array:
        """What is expected at each of I sizes and tokens: [P, I]; or at one for each law: [P, 1] and [P, 1] to [P, 1]."""
        E, A, B, alpha, beta = (each[:, None] for each in (self.E, self.A, self.B, self.alpha, self.beta))
        return np.asarray(E + A * params**-alpha + B * tokens**-beta)


@dataclass(frozen=True)
class Fitted:
    """The law of some runs, and how its minimum was found."""

    theta_5: Array
    surface: Surface
    log_means: tuple[float, float]
    """Of log N and log D."""
    starts: int
    agreeing: int
    """Starts that ended at this minimum."""
    converged: bool

    @property
    def law(self) -> Law:
        """Of all runs; P is 1."""
        return self.law_of(self.theta_5[None])

    def law_of(self, theta_P5: Array) -> Law:
        """In the form that people know."""
        e, a, b, alpha, beta = theta_P5.T
        nought = self.surface.log_loss_I.min() - _NOUGHT
        largest = (e, a - alpha * self.surface.x_I.min(), b - beta * self.surface.y_I.min())
        terms = [np.where(most > nought, np.exp(term), 0.0) for term, most in zip((e, a, b), largest, strict=True)]
        x, y = self.log_means
        return Law(terms[0], terms[1] * np.exp(alpha * x), terms[2] * np.exp(beta * y), alpha, beta)


def check_design(params_I: Array, tokens_I: Array) -> None:
    """Raises ValueError where no losses at these sizes and tokens would tell the parameters of the law apart."""
    if len(params_I) < FEWEST_POINTS:
        raise ValueError(f"{len(params_I)} runs are too few: the law has 5 numbers, and takes {FEWEST_POINTS} runs at least")
    for values, name, exponent in ((params_I, "n_params", "alpha"), (tokens_I, "n_tokens", "beta")):
        count = len(np.unique(values))
        if count < _FEWEST_VALUES or values.max() < _SMALLEST_RANGE * values.min():
            raise ValueError(
                f"`{name}` has {count} different {'value' if count == 1 else 'values'}, from {values.min():.6g} to "
                f"{values.max():.6g}, which does not tell {exponent}: add runs, with {_FEWEST_VALUES} values over a factor of "
                f"{_SMALLEST_RANGE:g} at least"
            )
    x, y = np.log(params_I), np.log(tokens_I)
    slope, offset = np.polyfit(x, y, 1)
    if np.std(y - slope * x - offset) < np.log(_OFF_THE_LINE):
        fixed = "n_tokens / n_params" if slope > 0 else "n_params x n_tokens, the budget,"
        raise ValueError(
            f"all runs lie on one line in log n_params and log n_tokens ({fixed} hardly changes), where parameters and tokens "
            "cannot be told apart, so alpha and beta are not determined: add runs with other numbers of tokens at the same sizes"
        )


def fit_law(params_I: Array, tokens_I: Array, loss_I: Array) -> Fitted:
    """From many starts: a grid of exponents, each with the other three numbers that suit it best.

    Raises:
        ValueError: see `check_design`.
    """
    check_design(params_I, tokens_I)
    x_I, y_I, log_loss_I = np.log(params_I), np.log(tokens_I), np.log(loss_I)
    floor, ceiling = log_loss_I.min() - _FALLS, log_loss_I.max() + _RISES
    # Under the largest exponent a term that is there at the smallest runs is tiny at the mean.
    floor_of_a, floor_of_b = (floor - EXPONENTS[1] * (each.mean() - each.min()) for each in (x_I, y_I))
    surface = Surface(
        x_I - x_I.mean(),
        y_I - y_I.mean(),
        log_loss_I,
        np.array([floor, floor_of_a, floor_of_b, EXPONENTS[0], EXPONENTS[0]]),
        np.array([ceiling, ceiling, ceiling, EXPONENTS[1], EXPONENTS[1]]),
    )
    start_P5 = _starts(surface)
    minima = minimise(surface, start_P5, np.ones((len(start_P5), len(loss_I))))
    best = int(minima.value_P.argmin())
    least = minima.value_P[best]
    return Fitted(
        theta_5=minima.theta_P5[best],
        surface=surface,
        log_means=(float(x_I.mean()), float(y_I.mean())),
        starts=len(start_P5),
        agreeing=int((minima.value_P <= least * (1 + _SAME_VALUE) + _NO_VALUE).sum()),
        converged=bool(minima.converged_P[best]),
    )


def resample(run_I: NDArray[np.int64], count: int, *, seed: int) -> Array:
    """How often each row is in each of `count` draws of as many runs as there are, with replacement: [count, I]."""
    runs = int(run_I.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(runs, np.full(runs, 1 / runs), size=count)
    return drawn[:, run_I].astype(np.float64)


def fit_resamples(fitted: Fitted, weight_PI: Array, *, progress: Progress) -> Law:
    """The law of each resample, from the minimum of all runs."""
    found = []
    for begin in range(0, len(weight_PI), _CHUNK):
        weights = weight_PI[begin : begin + _CHUNK]
        found.append(minimise(fitted.surface, np.tile(fitted.theta_5, (len(weights), 1)), weights).theta_P5)
        progress.add(len(weights))
    return fitted.law_of(np.concatenate(found))


def _starts(surface: Surface) -> Array:
    """[P, 5]: for each pair of exponents least squares of relative errors, which are linear in the three terms."""
    loss_I = np.exp(surface.log_loss_I)
    starts = []
    for alpha in _START_EXPONENTS:
        for beta in _START_EXPONENTS:
            columns = np.stack([np.ones_like(loss_I), np.exp(-alpha * surface.x_I), np.exp(-beta * surface.y_I)], axis=1)
            terms = np.linalg.lstsq(columns / loss_I[:, None], np.ones_like(loss_I))[0]
            starts.append([*np.log(np.maximum(terms, 0.02 * loss_I.min())), alpha, beta])
    return np.array(starts)
