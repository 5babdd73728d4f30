"""Intervals from what a value comes to when runs are drawn anew."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.9
_PRECISION = 1e-6
"""Share of a value that the optimiser answers for; no interval is narrower to either side."""


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def has(self, value: float) -> bool:
        """Whether this value is within."""
        return self.low <= value <= self.high


def bias_corrected(value: float, samples_P: Array, *, level: float = LEVEL, known: float = LEVEL) -> Interval | None:
    """Efron's bias-corrected percentile interval (Efron, "Nonparametric standard errors and confidence intervals", 1981).

    Percentiles are those of the plain interval where half of the samples lie below the value, and move with this share elsewhere.

    Args:
        value: from all runs.
        samples_P: from each resample of the runs; nan where it has none.
        level: share of such intervals that should hold the truth.
        known: share of the resamples that must have a value.

    Returns:
        None where too few resamples have a value.
    """
    has_value = samples_P[np.isfinite(samples_P)]
    if not np.isfinite(value) or len(has_value) < known * len(samples_P):
        return None
    normal = NormalDist()
    below = float(np.mean(has_value < value) + 0.5 * np.mean(has_value == value))
    shift = 2 * normal.inv_cdf(min(max(below, 0.5 / len(has_value)), 1 - 0.5 / len(has_value)))
    reach = normal.inv_cdf(0.5 + level / 2)
    low, high = np.quantile(has_value, [normal.cdf(shift - reach), normal.cdf(shift + reach)])
    margin = _PRECISION * abs(value)
    return Interval(value, min(float(low), value - margin), max(float(high), value + margin))
