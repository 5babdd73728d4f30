"""Which runs were given the same compute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.scaling.law.points import Points

_LARGEST_GAP = 0.1
"""Of log FLOPs between neighbours of a group."""
_LARGEST_SPREAD = 0.25
"""Of log FLOPs within a group: steps are whole, so runs of one budget differ a little."""


@dataclass(frozen=True)
class Budget:
    """Runs of about the same compute."""

    name: str
    flops: float
    """Geometric mean."""
    members: NDArray[np.int64]
    """Numbers of the rows."""


def group(points: Points) -> tuple[Budget, ...]:
    """All rows, by budget, the smallest first: by the column `budget`, or where their FLOPs lie together.

    FLOPs that follow each other closely over a wide range are no budgets: each such row is by itself.

    Raises:
        ValueError: the column has an empty place.
    """
    log_I = np.log(points.flops_I)
    if points.budgets is not None:
        if "" in points.budgets:
            name = points.names[points.budgets.index("")]
            raise ValueError(f"{name}: `budget` is missing; fill it in, or take the column out to group the runs by their FLOPs")
        members = [np.flatnonzero([each == name for each in points.budgets]) for name in dict.fromkeys(points.budgets)]
    else:
        order = np.argsort(log_I, kind="stable")
        clusters = np.split(order, np.flatnonzero(np.diff(log_I[order]) > _LARGEST_GAP) + 1)
        wide = [np.ptp(log_I[cluster]) > _LARGEST_SPREAD for cluster in clusters]
        members = [
            part
            for cluster, is_wide in zip(clusters, wide, strict=True)
            for part in (np.split(cluster, len(cluster)) if is_wide else [np.sort(cluster)])
        ]
    flops = [float(np.exp(log_I[rows].mean())) for rows in members]
    named = points.budgets is not None
    found = [
        Budget(points.budgets[rows[0]] if named and points.budgets else f"{mean:.3g} FLOPs", mean, rows)
        for rows, mean in zip(members, flops, strict=True)
    ]
    return tuple(sorted(found, key=lambda budget: budget.flops))


def largest(points: Points, budgets: tuple[Budget, ...]) -> NDArray[np.int64]:
    """Rows of the largest budget, or where this is a single run with no other near, or several not grouped, all that are near."""
    near = np.flatnonzero(np.log(points.flops_I) >= np.log(points.flops_I.max()) - _LARGEST_SPREAD)
    top = budgets[-1].members
    return top if len(top) > 1 or points.budgets is not None else near
