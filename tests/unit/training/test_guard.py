"""Which steps are not taken."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmar_megatron.config import TrainConfig
from mmar_megatron.training.guard import judge, robust_spread

RECENT = (2.0, 2.1, 1.9, 2.2, 1.8, 2.0, 2.1, 1.9)
"""Median 2, median absolute deviation 0.1."""
STRICT = TrainConfig(spike_zscore=4.0, spike_window=len(RECENT))
LIMIT = 2.0 + 4.0 * 1.4826 * 0.1


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (1.0, 1.0, None),
        (math.nan, 1.0, "the loss is nan, the gradient norm 1"),
        (math.inf, 1.0, "the loss is inf, the gradient norm 1"),
        (1.5, math.nan, "the loss is 1.5, the gradient norm nan"),
        (1.5, -math.inf, "the loss is 1.5, the gradient norm -inf"),
    ],
)
def test_what_is_not_finite(loss: float, grad_norm: float, reason: str | None) -> None:
    assert judge(loss, grad_norm, recent_losses=(), config=TrainConfig()) == reason
    assert judge(loss, grad_norm, recent_losses=RECENT, config=STRICT) == reason


def test_a_leap_is_one_beyond_the_limit() -> None:
    assert judge(LIMIT - 0.001, 1.0, recent_losses=RECENT, config=STRICT) is None
    reason = judge(LIMIT + 0.001, 1.0, recent_losses=RECENT, config=STRICT)
    assert reason == "the loss is 2.594, 4.0 deviations above the recent 2"


def test_a_fall_is_welcome() -> None:
    assert judge(0.0, 1.0, recent_losses=RECENT, config=STRICT) is None


def test_nothing_leaps_by_default_or_before_there_is_a_past() -> None:
    assert judge(1e9, 1.0, recent_losses=RECENT, config=TrainConfig(spike_window=len(RECENT))) is None
    assert judge(1e9, 1.0, recent_losses=RECENT[1:], config=STRICT) is None


def test_one_leap_in_the_past_does_not_hide_the_next() -> None:
    past = (*RECENT[:-1], 1e6)
    assert judge(3.0, 1.0, recent_losses=past, config=STRICT) is not None


def test_losses_that_do_not_vary_may_rise_by_a_little() -> None:
    """They have no deviation: 1 % of them stands for it."""
    still = (2.0,) * 8
    assert robust_spread(still) == 0
    assert judge(2.0 * 1.039, 1.0, recent_losses=still, config=STRICT) is None
    assert judge(2.0 * 1.041, 1.0, recent_losses=still, config=STRICT) is not None


def test_losses_of_zero_are_no_scale() -> None:
    assert judge(5.0, 1.0, recent_losses=(0.0,) * 8, config=STRICT) is None


def test_the_spread_is_the_standard_deviation_of_a_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.7, 20_000)
    assert robust_spread(values.tolist()) == pytest.approx(0.7, rel=0.02)
