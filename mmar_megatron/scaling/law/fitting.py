"""All that is found out about one loss: the law with intervals, the held-out budget, the cross-check, the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmar_megatron.progress import Progress
from mmar_megatron.scaling.law.budgets import Budget, group, largest
from mmar_megatron.scaling.law.frontier import allocate, exponents
from mmar_megatron.scaling.law.huber import DELTA, Array
from mmar_megatron.scaling.law.intervals import LEVEL, Interval, bias_corrected
from mmar_megatron.scaling.law.isoflop import CrossCheck, cross_check
from mmar_megatron.scaling.law.points import Points
from mmar_megatron.scaling.law.surface import EXPONENTS, FEWEST_POINTS, Fitted, Law, fit_law, fit_resamples, resample

PARAMETERS = ("E", "A", "B", "alpha", "beta")
_TERMS = {"alpha": "A", "beta": "B"}
FEWEST_RUNS = 8
"""Of which intervals were measured to hold."""
_WIDE = 3.0
"""Times that the upper end of an exponent's interval may be the lower one, for it to be called determined."""
_FAR = 6.0
"""Standard deviations of the scatter at which a run is pointed out."""


@dataclass(frozen=True)
class HeldOut:
    """How the law of all other runs predicts those of the largest budget."""

    rows: tuple[int, ...]
    predicted: tuple[float, ...]
    errors: tuple[float, ...]
    """Relative: predicted by measured, less 1."""

    @property
    def mean(self) -> float:
        """Of the errors' sizes."""
        return float(np.mean(np.abs(self.errors)))


@dataclass(frozen=True)
class Answer:
    """What a budget is best spent on for a loss; an entry without an interval is not determined."""

    flops: float
    params: Interval | None
    tokens: Interval | None
    tokens_per_param: Interval | None
    loss: Interval | None
    others: Mapping[str, Interval | None] = field(default_factory=dict)
    """The other losses expected at this size and these tokens."""


@dataclass(frozen=True, kw_only=True)
class LossFit:
    """Of one column."""

    column: str
    fitted: Fitted
    samples: Law
    """Of the resamples."""
    parameters: dict[str, Interval]
    a: Interval
    """Of the best size, N ~ C^a."""
    b: Interval
    """Of the best tokens, D ~ C^b."""
    undetermined: tuple[str, ...]
    """Parameters that the runs do not tell, with the reason."""
    loss_I: Array
    predicted_I: Array
    scatter: float
    """Standard deviation of a run's log loss about the law, from the median: outliers do not count."""
    far: tuple[int, ...]
    """Rows far off the law, the furthest first."""
    held_out: HeldOut | str
    """Or why there is none."""
    budgets: tuple[Budget, ...]
    check: CrossCheck
    answers: tuple[Answer, ...] = ()

    @property
    def residual_I(self) -> Array:
        """Relative: measured by predicted, less 1."""
        return np.asarray(self.loss_I / self.predicted_I - 1)


def fit_points(points: Points, *, flops: Sequence[float], resamples: int, seed: int) -> list[LossFit]:
    """Of each loss; the same resamples for all.

    Args:
        flops: budgets to answer for.
        resamples: of the runs, for intervals.
        seed: of these.

    Raises:
        ValueError: the runs are too few, do not tell the parameters, or have a loss that rises.
    """
    runs = int(points.run_I.max()) + 1
    if runs < FEWEST_RUNS:
        raise ValueError(
            f"{runs} runs are too few for intervals, which are made by drawing runs anew: give {FEWEST_RUNS} or more"
        )
    weight_PI = resample(points.run_I, resamples, seed=seed)
    progress = Progress.on_stderr(resamples * len(points.losses), what="resamples fitted")
    fits = [fit_column(points, column, weight_PI=weight_PI, progress=progress) for column in points.losses]
    progress.close()
    k = points.flops_per_product
    return [replace(fit, answers=tuple(_answer(fit, each, fits=fits, flops_per_product=k) for each in flops)) for fit in fits]


def fit_column(points: Points, column: str, *, weight_PI: Array, progress: Progress) -> LossFit:
    """The law of one column, but for the answers."""
    loss_I = points.losses[column]
    _check_falls(points, column)
    budgets = group(points)
    held_out = _hold_out(points, loss_I, budgets)
    fitted = fit_law(points.params_I, points.tokens_I, loss_I)
    samples = fit_resamples(fitted, weight_PI, progress=progress)
    parameters = {name: _interval(getattr(fitted.law, name), getattr(samples, name)) for name in PARAMETERS}
    (a, b), (a_P, b_P) = exponents(fitted.law), exponents(samples)
    a_and_b = _interval(a, a_P), _interval(b, b_P)
    missing = [exponent for exponent, term in _TERMS.items() if _is_missing(getattr(samples, term))]
    for name in missing:  # of a term that is nought the exponent may be anything
        parameters[name] = Interval(parameters[name].value, *EXPONENTS)
        a_and_b = Interval(a_and_b[0].value, 0.0, 1.0), Interval(a_and_b[1].value, 0.0, 1.0)
    predicted_I = fitted.law.loss(points.params_I, points.tokens_I)[0]
    scatter, far = _scatter(np.log(loss_I / predicted_I))
    return LossFit(
        column=column,
        fitted=fitted,
        samples=samples,
        parameters=parameters,
        a=a_and_b[0],
        b=a_and_b[1],
        undetermined=_undetermined(parameters, smallest_loss=float(loss_I.min())),
        loss_I=loss_I,
        predicted_I=predicted_I,
        scatter=scatter,
        far=far,
        held_out=held_out,
        budgets=budgets,
        check=cross_check(
            points.params_I,
            loss_I,
            budgets=budgets,
            law_loss_I=predicted_I,
            weight_PI=weight_PI,
            law_loss_PI=samples.loss(points.params_I, points.tokens_I),
        ),
    )


def _interval(value_1: Array, samples_P: Array) -> Interval:
    interval = bias_corrected(float(value_1[0]), samples_P)
    assert interval is not None, "the parameters of a law are finite"
    return interval


def _is_missing(term_P: Array) -> bool:
    """Whether it is nought in so many resamples that it may be so altogether."""
    return bool(np.mean(term_P == 0) > (1 - LEVEL) / 2)


def _check_falls(points: Points, column: str) -> None:
    """Raises ValueError where the column rises with compute: no law of this form does."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (points.flops_I, points.losses[column])]
    if np.ptp(points.losses[column]) == 0:
        raise ValueError(f"`{column}` is the same in all runs: there is nothing to fit")
    if np.corrcoef(ranks[0], ranks[1])[0, 1] > 0.5:
        raise ValueError(f"`{column}` rises with compute, and the law falls: give a column that falls, such as 1 - accuracy")


def _hold_out(points: Points, loss_I: Array, budgets: tuple[Budget, ...]) -> HeldOut | str:
    rows = largest(points, budgets)
    rest = np.setdiff1d(np.arange(len(loss_I)), rows)
    if len(rest) < FEWEST_POINTS:
        return f"without the largest budget {len(rest)} runs are left, too few for a law"
    try:
        law = fit_law(points.params_I[rest], points.tokens_I[rest], loss_I[rest]).law
    except ValueError as error:
        return f"without the largest budget, {error}"
    predicted = law.loss(points.params_I[rows], points.tokens_I[rows])[0]
    return HeldOut(tuple(map(int, rows)), tuple(map(float, predicted)), tuple(map(float, predicted / loss_I[rows] - 1)))


def _scatter(error_I: Array) -> tuple[float, tuple[int, ...]]:
    """The standard deviation that the median of the errors' sizes tells, and the rows far beyond it."""
    freedom = len(error_I) / (len(error_I) - len(PARAMETERS))
    scatter = 1.4826 * float(np.median(np.abs(error_I))) * freedom**0.5
    # Below the Huber loss's own delta a run is treated as exact.
    far = np.flatnonzero(np.abs(error_I) > max(_FAR * scatter, DELTA))
    return scatter, tuple(sorted(map(int, far), key=lambda row: -abs(error_I[row])))


def _undetermined(parameters: dict[str, Interval], *, smallest_loss: float) -> tuple[str, ...]:
    found = []
    for name, term in _TERMS.items():
        interval = parameters[name]
        said = f"its 90 % interval is {interval.low:.3g} to {interval.high:.3g}"
        if interval.low <= 1.01 * EXPONENTS[0] or interval.high >= 0.99 * EXPONENTS[1]:
            found.append(f"{name} is not determined, nor is {term}: {said}, which ends where the search does")
        elif interval.high > _WIDE * interval.low:
            found.append(f"{name} is hardly determined, nor is {term}: {said}")
    if parameters["E"].low < 1e-3 * smallest_loss:
        found.append("E is not told from nought: its 90 % interval begins there")
    return tuple(found)


def _answer(fit: LossFit, flops: float, *, fits: Sequence[LossFit], flops_per_product: float) -> Answer:
    budget_1 = np.array([flops])
    best, best_P = (allocate(law, budget_1, flops_per_product=flops_per_product) for law in (fit.fitted.law, fit.samples))

    def interval(value: Array, samples: Array) -> Interval | None:
        return bias_corrected(float(value[0, 0]), samples[:, 0])

    return Answer(
        flops=flops,
        params=interval(best.params, best_P.params),
        tokens=interval(best.tokens, best_P.tokens),
        tokens_per_param=interval(best.tokens / best.params, best_P.tokens / best_P.params),
        loss=interval(best.loss, best_P.loss),
        others={
            other.column: interval(*(law.loss(best.params[0], best.tokens[0]) for law in (other.fitted.law, other.samples)))
            for other in fits
            if other is not fit
        },
    )
