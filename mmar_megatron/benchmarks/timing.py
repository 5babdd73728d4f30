"""Actions take turns and are timed; medians and quartiles say what came out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from mmar_megatron import platform

WARM_UP = 3


def in_turn(
    actions: Sequence[Callable[[], object]],
    *,
    rounds: int,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Seconds of each action in each round; the first action of a round changes from one to the next.

    Args:
        before, after: each action, and not counted.
    """
    seconds: list[list[float]] = [[] for _ in actions]
    for number in range(-WARM_UP, rounds):
        order = list(range(len(actions)))
        for which in order[number % len(order) :] + order[: number % len(order)]:
            before()
            platform.synchronize()
            start = time.perf_counter()
            actions[which]()
            platform.synchronize()
            if number >= 0:
                seconds[which].append(time.perf_counter() - start)
            after()
    return seconds


def median(values: Sequence[float]) -> float:
    """To four digits."""
    return float(f"{statistics.median(values):.4g}")


def ratio(values: Sequence[float], to: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of the ratios within a round."""
    ratios = [value / base for value, base in zip(values, to, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(statistics.median(ratios), 4), "ratio_quartiles": [round(low, 4), round(high, 4)]}
