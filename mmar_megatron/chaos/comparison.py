"""Two runs, step by step, but for what a clock decides."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from mmar_megatron.training.metrics import CLOCKED

Row = dict[str, Any]


def differences(expected: list[Row], found: list[Row]) -> list[str]:
    """One sentence for each step that is missing, doubled, too many, out of order or not equal; the numbers of both are in it."""
    of_step = {row["step"]: row for row in expected}
    times = Counter(row["step"] for row in found)
    sentences = [f"step {step} is missing" for step in of_step if not times[step]]
    sentences += [f"step {step} stands there {count} times" for step, count in times.items() if count > 1]
    sentences += [f"step {step} is in this run alone" for step in times if step not in of_step]
    steps = [row["step"] for row in found]
    sentences += [f"step {after} comes after step {before}" for before, after in pairwise(steps) if after < before]
    for row in found:
        if row["step"] in of_step:
            sentences += _changed(of_step[row["step"]], row)
    return sentences


def _changed(expected: Row, found: Row) -> list[str]:
    columns = [name for name in {**expected, **found} if name not in CLOCKED]
    unequal = [name for name in columns if expected.get(name) != found.get(name) or (name in expected) != (name in found)]
    if not unequal:
        return []
    values = ", ".join(f"{name} {found.get(name)} instead of {expected.get(name)}" for name in unequal)
    return [f"step {expected['step']} has {values}"]
