"""The optimiser against the objective written out anew, in the form that people know."""

from __future__ import annotations

import numpy as np
import pytest

from mmar_megatron.scaling.law.surface import Law, fit_law
from tests.unit.scaling.law.surfaces import Array, Truth, isoflop_grid, measured


def objective(law: Law, params: Array, tokens: Array, loss: Array) -> float:
    total = 0.0
    for size, count, value in zip(params, tokens, loss, strict=True):
        expected = law.E[0] + law.A[0] / size ** law.alpha[0] + law.B[0] / count ** law.beta[0]
        error = abs(np.log(expected) - np.log(value))
        total += error**2 / 2 if error <= 1e-3 else 1e-3 * (error - 5e-4)
    return total


def moved(law: Law, name: str, by: float, params: Array, tokens: Array) -> Law:
    """One number changed by a share; with an exponent its term stays what it is in the middle of the runs."""
    changed = {each: getattr(law, each).copy() for each in ("E", "A", "B", "alpha", "beta")}
    changed[name] *= 1 + by
    if name in ("alpha", "beta"):
        term, place = ("A", params) if name == "alpha" else ("B", tokens)
        changed[term] *= np.exp(by * getattr(law, name) * np.log(place).mean())
    return Law(**changed)


@pytest.mark.parametrize("noise", [0.0005, 0.01])
def test_no_step_away_from_the_minimum_is_down(noise: float) -> None:
    rng = np.random.default_rng(5)
    truth = Truth()
    params, tokens = isoflop_grid(truth)
    loss = measured(truth, params, tokens, rng=rng, noise=noise, outliers=2, diverged=1)
    fitted = fit_law(params, tokens, loss)
    assert fitted.converged
    least = objective(fitted.law, params, tokens, loss)
    for name in ("E", "A", "B", "alpha", "beta"):
        for by in (1e-5, 1e-3, 0.05):
            for sign in (1, -1):
                assert objective(moved(fitted.law, name, sign * by, params, tokens), params, tokens, loss) > least
    together = np.random.default_rng(6).normal(size=(200, 5))
    for step in together:
        law = fitted.law
        for name, by in zip(("E", "A", "B", "alpha", "beta"), 1e-4 * step, strict=True):
            law = moved(law, name, by, params, tokens)
        assert objective(law, params, tokens, loss) > least
    assert fitted.agreeing > fitted.starts / 2, "the minimum does not depend on the start"


@pytest.mark.parametrize(
    "truth",
    [
        Truth(),
        Truth(E=0.13, A=30.0, B=8.0, alpha=0.4, beta=0.25),  # an image loss
        Truth(E=1.82, A=482.0, B=2085.0, alpha=0.3478, beta=0.3658),
        Truth(E=0.5, A=4.0, B=6.0, alpha=0.08, beta=0.1),
        Truth(E=2.0, A=9e5, B=3e9, alpha=0.8, beta=1.0),
    ],
)
@pytest.mark.parametrize("off", [1.0, 5.0, 0.2])
def test_points_without_noise_give_the_law_itself(truth: Truth, off: float) -> None:
    params, tokens = isoflop_grid(Truth(), off=off)
    law = fit_law(params, tokens, truth.loss(params, tokens)).law
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(law, name)[0] == pytest.approx(getattr(truth, name), rel=1e-6), name


def test_the_unit_of_the_loss_does_not_matter() -> None:
    truth, rng = Truth(), np.random.default_rng(8)
    params, tokens = isoflop_grid(truth)
    loss = measured(truth, params, tokens, rng=rng, noise=0.005, diverged=1)
    law, in_bits = fit_law(params, tokens, loss).law, fit_law(params, tokens, loss / np.log(2)).law
    for name, ratio in {"E": np.log(2), "A": np.log(2), "B": np.log(2), "alpha": 1, "beta": 1}.items():
        assert getattr(law, name)[0] == pytest.approx(getattr(in_bits, name)[0] * ratio, rel=1e-6)


def test_resolved_to_few_points_as_to_many() -> None:
    """Of six points no more is asked than of sixty, and five are not fitted at all."""
    truth = Truth()
    params, tokens = (each.ravel() for each in np.meshgrid(np.geomspace(1e7, 1e9, 3), np.geomspace(1e9, 1e11, 3)))
    law = fit_law(params[:8], tokens[:8], truth.loss(params, tokens)[:8]).law
    assert law.alpha[0] == pytest.approx(truth.alpha, rel=1e-6)
    with pytest.raises(ValueError, match="too few"):
        fit_law(params[:5], tokens[:5], truth.loss(params, tokens)[:5])


@pytest.mark.parametrize(
    ("params", "tokens", "said"),
    [
        (np.full(9, 1e8), np.geomspace(1e9, 1e11, 9), r"`n_params` has 1 different value, .* does not tell alpha"),
        (np.geomspace(1e7, 1e9, 9), np.tile([1e9, 2e9], 5)[:9], r"`n_tokens` has 2 different values, .* does not tell beta"),
        (np.geomspace(1e7, 1e9, 9), 20 * np.geomspace(1e7, 1e9, 9), r"one line .*n_tokens / n_params"),
        (np.geomspace(1e7, 1e9, 9), 1e18 / np.geomspace(1e7, 1e9, 9), r"one line .*the budget"),
    ],
)
def test_runs_that_do_not_tell_the_parameters_are_refused(params: Array, tokens: Array, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit_law(params, tokens, Truth().loss(params, tokens))
