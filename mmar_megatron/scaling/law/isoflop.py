"""The cross-check: a parabola through the runs of each budget, and a power law through its lowest points.

That is approach 2 of Hoffmann et al. (arXiv 2203.15556, section 3.2). A parabola is only near to what a law gives along a budget,
and off by more the further its runs lie to one side of the best size. So the parabolas of the losses are held against those of
the fitted law's own losses at the same runs: this bias is in both, and what remains is where law and runs disagree.

Axes: P resamples, G budgets, K runs of a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmar_megatron.scaling.law.budgets import Budget
from mmar_megatron.scaling.law.huber import Array
from mmar_megatron.scaling.law.intervals import LEVEL, Interval, bias_corrected

_FEWEST_SIZES = 4
"""Of a budget: three always lie on a parabola."""
_DELTA = 0.01
"""Of the parabolas' Huber loss, in log loss: a parabola is not exact, a diverged run must not matter."""
_ROUNDS = 30
_KNOWN = 0.5
"""Share of the resamples that must have the value: of a budget with few runs, many draws have too few sizes."""
_LEVEL = 0.995
"""Of intervals that must hold no difference: two, and one more that all budgets share. Resamples of the few runs of a budget make
them too narrow: docs/scaling.md has how often law and runs that agree are said to disagree."""
_LEAST_EXPONENT = 0.01
_LEAST_RATIO = 1.05
"""Differences below these are of no consequence, however certain."""


@dataclass(frozen=True)
class Parabola:
    """log loss = c0 + c1 u + c2 u^2, with u = log N less `middle`, along a budget."""

    budget: Budget
    middle: float
    coefficients: tuple[float, float, float]
    best: Interval | None
    """The size where it is lowest."""
    best_of_law: float | None
    """Where the parabola of the law's own losses at these runs is lowest, if it is among these sizes."""
    ratio: Interval | None
    """Of the two; this interval must hold 1 in all budgets together."""

    def loss(self, params: Array) -> Array:
        u = np.log(params) - self.middle
        return np.exp(np.polyval(self.coefficients[::-1], u))


@dataclass(frozen=True)
class CrossCheck:
    """What the parabolas say, and whether the law says the same."""

    parabolas: tuple[Parabola, ...]
    skipped: tuple[str, ...]
    """Budgets without one, and why."""
    exponent: Interval | None
    """a of N ~ C^a, through the lowest points."""
    exponent_of_law: float | None
    """The same of the law's own losses at these runs."""
    difference: Interval | None
    """Of these two."""
    ratio: Interval | None
    """Of the best sizes, parabolas of the runs by parabolas of the law's losses: geometric mean."""

    @property
    def possible(self) -> bool:
        """Whether anything could be compared."""
        return self.ratio is not None

    @property
    def agrees(self) -> bool:
        """Whether the law finds the best sizes that the parabolas do."""
        slope = self.difference
        same_slope = slope is None or slope.has(0.0) or abs(slope.value) < _LEAST_EXPONENT
        return same_slope and _is_one(self.ratio) and not self.differing

    @property
    def differing(self) -> list[str]:
        """Budgets of which law and parabola find different best sizes."""
        return [parabola.budget.name for parabola in self.parabolas if not _is_one(parabola.ratio)]


def _is_one(ratio: Interval | None) -> bool:
    """Or may be, or is near enough, or is not known."""
    return ratio is None or ratio.has(1.0) or 1 / _LEAST_RATIO < ratio.value < _LEAST_RATIO


def cross_check(
    params_I: Array, loss_I: Array, *, budgets: Sequence[Budget], law_loss_I: Array, weight_PI: Array, law_loss_PI: Array
) -> CrossCheck:
    """Parabolas through the losses and through the law's, of all runs and of each resample.

    Args:
        budgets: the groups of runs.
        law_loss_I: the law's losses at the runs.
        weight_PI: how often each resample has each run.
        law_loss_PI: the losses of its law.
    """
    usable, skipped = _usable(params_I, loss_I, budgets)
    parabolas, low_P, of_law_P = [], [], []
    for budget in usable:
        rows = budget.members
        log_params = np.log(params_I[rows])
        middle = float(log_params.mean())
        u_K = log_params - middle
        # All runs as one more resample, the first, in which each is once.
        weight_PK = np.concatenate([np.ones((1, len(rows))), weight_PI[:, rows]])
        law_loss_PK = np.concatenate([law_loss_I[None, rows], law_loss_PI[:, rows]])
        found_P3 = _parabolas(u_K, np.log(loss_I[None, rows]), weight_PK)
        low, of_law = middle + _lowest(found_P3, u_K), middle + _lowest(_parabolas(u_K, np.log(law_loss_PK), weight_PK), u_K)
        low_P.append(low)
        of_law_P.append(of_law)
        c0, c1, c2 = map(float, found_P3[0])
        ratio = _exp(_interval(low - of_law, level=1 - (1 - _LEVEL) / len(usable)))
        best = _exp(_interval(low, level=LEVEL))
        parabolas.append(
            Parabola(budget, middle, (c0, c1, c2), best, None if np.isnan(of_law[0]) else math.exp(of_law[0]), ratio)
        )
    if not parabolas:
        return CrossCheck((), skipped, None, None, None, None)
    return _compared(parabolas, skipped, low_PG=np.stack(low_P, axis=1), of_law_PG=np.stack(of_law_P, axis=1))


def _usable(params_I: Array, loss_I: Array, budgets: Sequence[Budget]) -> tuple[list[Budget], tuple[str, ...]]:
    """Budgets whose runs have a parabola with a lowest point among them, and why the others have none."""
    usable, skipped = [], []
    for budget in budgets:
        rows = budget.members
        u_K = np.log(params_I[rows])
        u_K -= u_K.mean()
        sizes = len(np.unique(params_I[rows]))
        if sizes < _FEWEST_SIZES:
            if len(rows) > 1:  # else no budget, but a run by itself
                skipped.append(f"{budget.name} with {sizes} different sizes, where a parabola takes {_FEWEST_SIZES}")
        elif np.isnan(_lowest(_parabolas(u_K, np.log(loss_I[None, rows]), np.ones((1, len(rows)))), u_K)[0]):
            skipped.append(f"{budget.name}, whose losses have no lowest point between its smallest and its largest size")
        else:
            usable.append(budget)
    return usable, tuple(skipped)


def _compared(parabolas: Sequence[Parabola], skipped: tuple[str, ...], *, low_PG: Array, of_law_PG: Array) -> CrossCheck:
    """The power law through the lowest points, and both differences with their intervals; the first of P is of all runs."""
    apart_PG = low_PG - of_law_PG
    has_PG = np.isfinite(apart_PG)
    shift_P = np.where(has_PG, apart_PG, 0.0).sum(axis=1) / np.where(has_PG.any(axis=1), has_PG.sum(axis=1), np.nan)
    ratio = _exp(_interval(shift_P, level=_LEVEL))
    exponent = exponent_of_law = difference = None
    if len(parabolas) > 1:
        log_flops_G = np.log([parabola.budget.flops for parabola in parabolas])
        a_P, a_of_law_P = (_slope(log_flops_G, np.where(has_PG, lows, np.nan)) for lows in (low_PG, of_law_PG))
        exponent, difference = _interval(a_P, level=LEVEL), _interval(a_P - a_of_law_P, level=_LEVEL)
        exponent_of_law = float(a_of_law_P[0]) if np.isfinite(a_of_law_P[0]) else None
    return CrossCheck(tuple(parabolas), skipped, exponent, exponent_of_law, difference, ratio)


def _interval(value_P: Array, *, level: float) -> Interval | None:
    """Of the first of P, from the others."""
    return bias_corrected(float(value_P[0]), value_P[1:], level=level, known=_KNOWN)


def _exp(interval: Interval | None) -> Interval | None:
    return None if interval is None else Interval(*map(math.exp, (interval.value, interval.low, interval.high)))


def _slope(x_G: Array, y_PG: Array) -> Array:
    """Of the line through the points that are there, [P]; nan where they span less than half of the range."""
    has_PG = np.isfinite(y_PG)
    low_P, high_P = np.where(has_PG, x_G, np.inf).min(axis=1), np.where(has_PG, x_G, -np.inf).max(axis=1)
    spans_P1 = (high_P - low_P >= 0.5 * np.ptp(x_G))[:, None]
    x_PG, y_PG = np.where(has_PG, x_G, 0.0), np.where(has_PG, y_PG, 0.0)
    mean_P1 = x_PG.sum(axis=1, keepdims=True) / np.where(spans_P1, has_PG.sum(axis=1, keepdims=True), np.nan)
    centred_PG = np.where(has_PG, x_PG - mean_P1, 0.0)
    with np.errstate(invalid="ignore"):
        return np.asarray((centred_PG * y_PG).sum(axis=1) / (centred_PG**2).sum(axis=1))


def _parabolas(u_K: Array, log_loss_PK: Array, weight_PK: Array) -> Array:
    """Coefficients [P, 3] by reweighted least squares; nan where too few sizes have a weight."""
    powers_K3 = np.stack([np.ones_like(u_K), u_K, u_K**2], axis=1)
    distinct = np.unique(u_K)
    has_size = np.stack([(weight_PK[:, u_K == size] > 0).any(axis=1) for size in distinct], axis=1)
    enough_P = has_size.sum(axis=1) >= _FEWEST_SIZES
    weight_PK = np.where(enough_P[:, None], weight_PK, 1.0)
    log_loss_PK = np.broadcast_to(log_loss_PK, weight_PK.shape)
    weight = weight_PK
    for _ in range(_ROUNDS):
        weighted = powers_K3.T[None] * weight[:, None]
        coefficients = np.linalg.solve(weighted @ powers_K3, weighted @ log_loss_PK[:, :, None])[:, :, 0]
        size_PK = np.abs(coefficients @ powers_K3.T - log_loss_PK)
        weight = weight_PK * np.minimum(1.0, _DELTA / np.maximum(size_PK, _DELTA))
    return np.where(enough_P[:, None], coefficients, np.nan)


def _lowest(coefficients_P3: Array, u_K: Array) -> Array:
    """u where they are lowest, [P]; nan where that is not between the smallest and the largest size."""
    slope_P, curvature_P = coefficients_P3[:, 1], coefficients_P3[:, 2]
    curved_P = np.nan_to_num(curvature_P) > 0
    low_P = -slope_P / (2 * np.where(curved_P, curvature_P, 1.0))
    return np.where(curved_P & (low_P > u_K.min()) & (low_P < u_K.max()), low_P, np.nan)
