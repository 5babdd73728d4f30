"""Whether a step is taken: what is not finite, or leaps, is left out.

Loss and gradient norm are the same on all ranks, to the bit, and so is the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from mmar_megatron.config import TrainConfig
from mmar_megatron.engine.base import finite

_MAD_OF_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_SPREAD = 0.01
"""Of the median. Losses that hardly vary, or mostly not at all, have next to no deviation, against which anything is a leap."""


class TooManyBadSteps(Exception):
    """The run went from one bad step to the next."""


def judge(loss: float, grad_norm: float, *, recent_losses: Sequence[float], config: TrainConfig) -> str | None:
    """Why a step must not be taken, or None.

    Args:
        loss: the weighted sum that is minimised.
        grad_norm: before clipping.
        recent_losses: of the good steps before, oldest first.
        config: with `spike_zscore` and `spike_window`; nothing leaps before there are as many losses as that.
    """
    if reason := finite(loss, grad_norm):
        return reason
    if not config.spike_zscore or len(recent_losses) < config.spike_window:
        return None
    middle = median(recent_losses)
    spread = max(robust_spread(recent_losses), _LEAST_SPREAD * abs(middle))
    # Not as a quotient: where all losses are 0 there is no scale to judge by, and only then may the spread be 0.
    if spread == 0 or loss - middle <= config.spike_zscore * spread:
        return None
    return f"the loss is {loss:.4g}, {(loss - middle) / spread:.1f} deviations above the recent {middle:.4g}"


def robust_spread(values: Sequence[float]) -> float:
    """The standard deviation of normally distributed values, from their median absolute deviation: single leaps do not count."""
    middle = median(values)
    return _MAD_OF_NORMAL * median(abs(value - middle) for value in values)
