"""Runs whose law is known."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.scaling.law.points import Points

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """L = E + A / N^alpha + B / D^beta."""

    E: float = 1.7
    A: float = 400.0
    B: float = 410.0
    alpha: float = 0.34
    beta: float = 0.28

    def loss(self, params: Array, tokens: Array) -> Array:
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Truth:
        """With terms of like size at 1e8 parameters and 2e9 tokens."""
        alpha, beta = rng.uniform(0.25, 0.5, 2)
        a, b = 0.4 * rng.uniform(0.7, 1.4, 2)
        return cls(rng.uniform(1.2, 2.2), a * 1e8**alpha, b * 2e9**beta, alpha, beta)

    def best_params(self, flops: NDArray[np.floating] | float) -> Array:
        """Of each budget of 6 N D, by search and not by the formula."""
        sizes = np.geomspace(1e4, 1e14, 200_001)
        return np.array([sizes[self.loss(sizes, each / 6 / sizes).argmin()] for each in np.atleast_1d(flops)])


def isoflop_grid(
    truth: Truth, *, budgets: int = 6, sizes: int = 7, factor: float = 4.0, off: float = 1.0, span: float = 10.0
) -> tuple[Array, Array]:
    """N and D of runs along budgets from 1e18 FLOPs, at sizes from 1 / `span` to `span` times `off` times the best one."""
    flops = 1e18 * factor ** np.arange(budgets)
    params = (truth.best_params(flops)[:, None] * off * np.geomspace(1 / span, span, sizes)).ravel()
    return params, np.repeat(flops, sizes) / 6 / params


def measured(
    truth: Truth, params: Array, tokens: Array, *, rng: np.random.Generator, noise: float, outliers: int = 0, diverged: int = 0
) -> Array:
    """Losses with log-normal noise; some are 3 to 10 % too high, some several times too high."""
    loss = truth.loss(params, tokens) * np.exp(noise * rng.standard_normal(len(params)))
    rows = rng.permutation(len(params))
    loss[rows[:outliers]] *= rng.uniform(1.03, 1.1, outliers)
    loss[rows[outliers : outliers + diverged]] *= rng.uniform(2, 5, diverged)
    return loss


def points_of(params: Array, tokens: Array, *, run: list[int] | None = None, **losses: Array) -> Points:
    """As if they had been read."""
    return Points(
        names=tuple(f"run-{number}" for number in range(len(params))),
        params_I=params,
        tokens_I=tokens,
        losses=losses,
        flops_I=6 * params * tokens,
        flops_are_given=False,
        run_I=np.array(run if run is not None else range(len(params))),
        budgets=None,
    )


def write_csv(path: Path, columns: Mapping[str, Iterable[object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path
