"""The runs that a law is fitted to, from a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""Of training, forward and backward, without attention: an approximation (Kaplan et al., arXiv 2001.08361)."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """I rows of a table, one for each run; or several, at different tokens, where the column `run` says so."""

    names: tuple[str, ...]
    """All different."""
    params_I: Array
    tokens_I: Array
    losses: dict[str, Array]
    """By column."""
    flops_I: Array
    """Of training."""
    flops_are_given: bool
    """By a column, and not 6 N D."""
    run_I: NDArray[np.int64]
    """Number of the run that each row is of: these are what is drawn anew for intervals."""
    budgets: tuple[str, ...] | None
    """What the column `budget` says, if there is one."""

    @property
    def flops_per_product(self) -> float:
        """FLOPs divided by N D: their geometric mean over the rows."""
        return float(np.exp(np.log(self.flops_I / (self.params_I * self.tokens_I)).mean()))

    @property
    def flops_spread(self) -> float:
        """How many times larger the largest of these ratios is than the smallest."""
        ratio_I = self.flops_I / (self.params_I * self.tokens_I)
        return float(ratio_I.max() / ratio_I.min())


def read_points(path: Path, *, losses: Sequence[str]) -> Points:
    """From a CSV file with a header: `n_params`, `n_tokens`, the columns of the losses; if there, `flops`, `budget` and `run`.

    Raises:
        ValueError: a column is missing, or a number is missing, not finite or not above 0.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = [(name or "").strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        try:
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: this is no CSV: {error}") from error
    for name in ("n_params", "n_tokens", *losses):
        if name not in columns:
            hint = ": name the column of the loss by --loss" if name in losses else ""
            raise ValueError(f"{path} has no column `{name}`, only {', '.join(columns) or 'an empty first line'}{hint}")
    if not rows:
        raise ValueError(f"{path} has no rows below its header")
    runs = [(row["run"] or "").strip() for _, row in rows] if "run" in columns else [""] * len(rows)
    names = _names(runs)

    def numbers(column: str) -> Array:
        found = []
        for number, (name, (line, row)) in enumerate(zip(names, rows, strict=True), start=1):
            place = f"{path}, row {number}" + ("" if name == f"row {number}" else f" ({name})") + f", line {line}"
            found.append(_number(row[column], column=column, place=place))
        return np.array(found)

    params_I, tokens_I = numbers("n_params"), numbers("n_tokens")
    given = "flops" in columns
    return Points(
        names=names,
        params_I=params_I,
        tokens_I=tokens_I,
        losses={name: numbers(name) for name in losses},
        flops_I=numbers("flops") if given else FLOPS_PER_PARAMETER_AND_TOKEN * params_I * tokens_I,
        flops_are_given=given,
        run_I=_run_numbers(runs),
        budgets=tuple((row["budget"] or "").strip() for _, row in rows) if "budget" in columns else None,
    )


def _number(text: str | None, *, column: str, place: str) -> float:
    said = (text or "").strip()
    if not said:
        raise ValueError(f"{place}: `{column}` is missing; a run without it cannot be fitted, take the row out")
    try:
        value = float(said)
    except ValueError:
        raise ValueError(f"{place}: `{column}` is {said!r}, which is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{place}: `{column}` is {said}, which is not finite; such a run cannot be fitted, take the row out")
    if value <= 0:
        raise ValueError(f"{place}: `{column}` is {said}, but must be above 0, since its logarithm is fitted")
    return value


def _names(runs: Sequence[str]) -> tuple[str, ...]:
    """What the rows are called in tables: by their run where it has one row, else by their number too."""
    return tuple(
        f"row {number}" if not run else run if runs.count(run) == 1 else f"{run}, row {number}"
        for number, run in enumerate(runs, start=1)
    )


def _run_numbers(runs: Iterable[str]) -> NDArray[np.int64]:
    """A row without a run is one of its own."""
    keys = [run or f"\0{number}" for number, run in enumerate(runs)]
    order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([order[key] for key in keys], dtype=np.int64)
