"""A table of runs in, a directory of what they tell out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmar_megatron.scaling.law.fitting import fit_points
from mmar_megatron.scaling.law.page import render
from mmar_megatron.scaling.law.plots import as_png, draw_all, names_of_files
from mmar_megatron.scaling.law.points import read_points
from mmar_megatron.scaling.law.tables import as_csv, as_json, as_text

FEWEST_RESAMPLES = 100
_FURTHER = (10.0, 100.0)
"""Budgets to answer for where none is asked, by the largest of the runs."""


def fit_table(path: Path, *, losses: Sequence[str], flops: Sequence[float] | None, resamples: int, seed: int, out: Path) -> str:
    """Fits, writes all files, and returns what is to be printed.

    Args:
        path: CSV file of the runs.
        losses: columns to fit.
        flops: budgets to answer for.
        resamples: of the runs, for intervals.
        seed: of these.
        out: directory for the files.

    Raises:
        ValueError: the table or a column of it cannot be fitted; nothing is written then.
    """
    if resamples < FEWEST_RESAMPLES:
        raise ValueError(f"--resamples {resamples} are too few for the ends of an interval: give {FEWEST_RESAMPLES} or more")
    points = read_points(path, losses=list(dict.fromkeys(losses)))
    asked = flops or [times * float(points.flops_I.max()) for times in _FURTHER]
    fits = fit_points(points, flops=asked, resamples=resamples, seed=seed)
    plots = [{name: as_png(figure) for name, figure in draw_all(points, fit).items()} for fit in fits]
    text = as_text(points, fits)
    files: dict[str, bytes] = {
        "fit.json": (json.dumps(as_json(points, fits, source=path.name), indent=1, allow_nan=False) + "\n").encode(),
        "table.txt": text.encode(),
        "runs.csv": as_csv(points, fits).encode(),
        "report.html": render(points, fits, plots=plots, source=path.name).encode(),
    }
    for stem, of_fit in zip(names_of_files([fit.column for fit in fits]), plots, strict=True):
        files |= {f"{name}-{stem}.png": png for name, png in of_fit.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        partial = out / f".unfinished-{name}"
        partial.write_bytes(content)
        partial.replace(out / name)
    return text
