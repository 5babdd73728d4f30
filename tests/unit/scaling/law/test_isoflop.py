"""The groups of runs, their parabolas, and when law and parabolas are said to disagree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mmar_megatron.scaling.law.budgets import group, largest
from mmar_megatron.scaling.law.fitting import fit_points
from mmar_megatron.scaling.law.isoflop import cross_check
from mmar_megatron.scaling.law.remarks import on_check
from tests.unit.scaling.law.surfaces import Array, Truth, isoflop_grid, measured, points_of


def parabolic(params: Array, tokens: Array, *, exponent: float) -> Array:
    """Losses whose logarithm is a parabola along each budget, lowest at 1e8 parameters for 1e18 FLOPs, and then as C^exponent."""
    log_flops = np.log(6 * params * tokens / 1e18)
    u = np.log(params / 1e8) - exponent * log_flops
    return np.exp(1.0 - 0.05 * log_flops + 0.02 * u**2)


def test_parabolas_are_found_exactly_and_their_power_law() -> None:
    params, tokens = isoflop_grid(Truth())
    loss = parabolic(params, tokens, exponent=0.5)
    loss[4] *= 5
    budgets = group(points_of(params, tokens, loss=loss))
    same = np.broadcast_to(loss, (100, len(loss)))
    found = cross_check(params, loss, budgets=budgets, law_loss_I=loss, weight_PI=np.ones_like(same), law_loss_PI=same)
    assert found.exponent is not None and found.difference is not None
    assert found.exponent.value == pytest.approx(0.5, abs=2e-3)
    assert found.difference.value == 0 and found.agrees
    for parabola in found.parabolas[1:]:
        assert parabola.best is not None
        assert parabola.best.value == pytest.approx(1e8 * (parabola.budget.flops / 1e18) ** 0.5)
    shifted = parabolic(params, tokens, exponent=0.6)
    of_law = np.broadcast_to(shifted, same.shape)
    found = cross_check(params, loss, budgets=budgets, law_loss_I=shifted, weight_PI=np.ones_like(same), law_loss_PI=of_law)
    assert found.difference is not None and found.difference.value == pytest.approx(-0.1, abs=3e-3) and not found.agrees

    # Too little to be seen at any one budget, but of all together the growth differs.
    middle = np.exp(0.012 * np.log(4.0) * 2.5)
    tilted = parabolic(params * middle, tokens / middle, exponent=0.512)
    of_law = np.broadcast_to(tilted, same.shape)
    found = cross_check(params, loss, budgets=budgets, law_loss_I=tilted, weight_PI=np.ones_like(same), law_loss_PI=of_law)
    assert found.differing == [] and not found.agrees


def test_off_centre_grids_bias_parabolas_but_are_no_disagreement() -> None:
    truth, rng = Truth(alpha=0.5, A=6000.0), np.random.default_rng(3)
    params, tokens = isoflop_grid(truth, off=3.0, factor=8.0, span=12.0)
    points = points_of(params, tokens, loss=measured(truth, params, tokens, rng=rng, noise=0.001))
    (fit,) = fit_points(points, flops=[1e23], resamples=200, seed=0)
    assert fit.check.agrees and len(fit.check.parabolas) == 6
    best_of_law = np.array([parabola.best_of_law or np.nan for parabola in fit.check.parabolas])
    flops = np.array([parabola.budget.flops for parabola in fit.check.parabolas])
    assert (np.abs(np.log(best_of_law / truth.best_params(flops))) > 0.05).all(), "the plain parabolas are off"


def test_losses_of_another_shape_are_a_disagreement() -> None:
    """A best size that grows as C^0.2 at first and as C^0.8 in the end; of a law the exponent is the same everywhere."""
    log_flops = np.repeat(np.log(4.0) * np.arange(6), 7)
    best = 1e8 * np.exp(0.2 * log_flops + 0.3 / 6.9 * log_flops**2)
    params = best * np.tile(np.geomspace(0.1, 10, 7), 6)
    u = np.log(params / best)
    noise = 0.001 * np.random.default_rng(0).standard_normal(42)
    loss = np.exp(1.0 - 0.05 * log_flops + 0.02 * u**2 + noise)
    points = points_of(params, 1e18 * np.exp(log_flops) / 6 / params, loss=loss)
    (fit,) = fit_points(points, flops=[1e23], resamples=200, seed=0)
    assert not fit.check.agrees
    assert any("DISAGREE" in said for said in on_check(fit))


def test_without_budgets_there_is_no_cross_check_and_it_is_said() -> None:
    rng = np.random.default_rng(0)
    params = 10 ** rng.uniform(7, 9, 40)
    tokens = np.geomspace(1e17, 1e21, 40) / 6 / params
    points = points_of(params, tokens, loss=measured(Truth(), params, tokens, rng=rng, noise=0.003))
    (fit,) = fit_points(points, flops=[1e23], resamples=100, seed=0)
    assert not fit.check.possible
    assert "not possible" in on_check(fit)[0]


def test_runs_are_grouped_by_their_flops_or_as_the_column_says() -> None:
    params, tokens = isoflop_grid(Truth(), budgets=3, sizes=4)
    steps = tokens * np.random.default_rng(0).uniform(0.97, 1.03, 12)  # whole steps
    order = np.random.default_rng(1).permutation(12)
    points = points_of(params[order], steps[order], loss=np.ones(12))
    budgets = group(points)
    assert [sorted(order[budget.members]) for budget in budgets] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert sorted(order[largest(points, budgets)]) == [8, 9, 10, 11]
    named = group(replace(points, budgets=tuple("xy"[row % 2] for row in order)))
    assert {budget.name: sorted(order[budget.members] % 2) for budget in named} == {"x": [0] * 6, "y": [1] * 6}
    dense = points_of(np.geomspace(1e7, 1e9, 60), np.geomspace(1e9, 2e9, 60), loss=np.ones(60))
    assert all(len(budget.members) == 1 for budget in group(dense)), "a chain over decades is no budget"
    with pytest.raises(ValueError, match=r"run-2: `budget` is missing"):
        group(replace(points, budgets=("x", "x", "", *"y" * 9)))
