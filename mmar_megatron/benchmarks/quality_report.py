"""What the painted pictures come to: numbers, tables, curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mmar_megatron.benchmarks.quality import ATTRIBUTES, Arrays, Painted, QualityPlan, paint_all
from mmar_megatron.evaluation.features import CONTENT, DEPTHS, DETAIL
from mmar_megatron.evaluation.frechet import Distance, knee, measure_distance

_COLOURS = {"ddim": "#0072B2", "ancestral": "#D55E00", "dpm_solver++": "#009E73"}
_MEANING = {
    DETAIL: "third stage of EfficientNet-Lite0, 40 features",
    CONTENT: "last feature map of EfficientNet-Lite0, 1,280 features",
}
FILES = ("quality.md", "quality.png")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model with one sampler, in each number of steps."""

    model: str
    predicts: str
    sampler: str
    distances: dict[str, list[Distance]]
    """By depth."""
    right: list[list[float]]
    """Shares of `ATTRIBUTES`; empty for other data than shapes."""
    to_path: list[float]
    """Root mean square distance of a picture's latents to those of the path, median of pictures; empty where there is none.

    In a mean, one whose shape tips over into another would count more than all others.
    """
    seconds: list[float]
    """Of a picture."""

    def knee(self, depth: str) -> int:
        """Which of the numbers of steps it is."""
        return knee(self.distances[depth])


def measure_quality(options: Sequence[str], *, plan: QualityPlan, out: Path) -> dict[str, Any]:
    """Paints what is not painted yet, writes tables and curves into `out`, and returns the numbers. Errors as `paint_all`'s."""
    true, painted = paint_all(options, plan=plan, out=out / "cells")
    floor = {depth: measure_distance(true[f"true_{depth}"], true[f"reference_{depth}"]) for depth in DEPTHS}
    rows = [
        row
        for model, name in zip(painted, short_names(plan.models), strict=True)
        for row in _rows(model, name, true=true, plan=plan)
    ]
    (out / FILES[0]).write_text("\n".join(tables(rows, floor=floor, plan=plan)) + "\n")
    plot(out / FILES[1], rows=rows, floor=floor[DETAIL], steps=plan.steps)
    return {
        "images": plan.images,
        "steps": plan.steps,
        "floor": {depth: _pair(distance) for depth, distance in floor.items()},
        "rows": [_as_json(row, steps=plan.steps) for row in rows],
        "written": [str(out / name) for name in FILES],
    }


def short_names(models: Sequence[str]) -> list[str]:
    """What tells the models from each other: the ends of their paths, as long as need be."""
    parts = [Path(model).absolute().parts for model in models]
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({one[-n:] for one in parts}) == len(set(parts)))
    return ["/".join(one[-length:]) for one in parts]


def _rows(model: Painted, name: str, *, true: Arrays, plan: QualityPlan) -> Iterator[Row]:
    for sampler in plan.samplers:
        cells = [model.cells[sampler, steps] for steps in plan.steps]
        path = None if sampler == "ancestral" or model.path is None else model.path["latents"]
        yield Row(
            model=name,
            predicts=model.predicts,
            sampler=sampler,
            distances={depth: [measure_distance(cell[depth], true[f"reference_{depth}"]) for cell in cells] for depth in DEPTHS},
            right=[cell["right_NA"].mean(axis=0).tolist() for cell in cells if len(cell["right_NA"])],
            to_path=[] if path is None else [_to_path(cell["latents"], path) for cell in cells],
            seconds=[float(cell["seconds"]) / plan.images for cell in cells],
        )


def _to_path(latents_PNC: NDArray[np.float32], path_PNC: NDArray[np.float32]) -> float:
    return float(np.median(np.square(latents_PNC - path_PNC).mean(axis=(1, 2)) ** 0.5))


def _pair(distance: Distance) -> list[float]:
    return [float(f"{distance.value:.4g}"), float(f"{distance.error:.2g}")]


def _as_json(row: Row, *, steps: Sequence[int]) -> dict[str, Any]:
    return {
        "model": row.model,
        "predicts": row.predicts,
        "sampler": row.sampler,
        **{f"{depth}_distance": [_pair(one) for one in distances] for depth, distances in row.distances.items()},
        **{f"{depth}_knee": steps[row.knee(depth)] for depth in row.distances},
        "right": [dict(zip(ATTRIBUTES, shares, strict=True)) for shares in row.right],
        "to_path": [float(f"{distance:.4g}") for distance in row.to_path],
        "seconds": [float(f"{seconds:.4g}") for seconds in row.seconds],
    }


# --- tables ---------------------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row], *, floor: dict[str, Distance], plan: QualityPlan) -> list[str]:
    """Lines of Markdown: a table for each measure."""
    lines = [
        f"{plan.images} pictures of each, {plan.rounds} rounds, guidance scale {plan.guidance_scale:g}; the same captions, order "
        "and noise. Behind +- the standard error over the choice of pictures. The knee: the fewest steps below whose distance "
        "that of no more steps lies by more than its error.",
    ]
    for depth in DEPTHS:
        title = f"Frechet distance, {depth} ({_MEANING[depth]}); true pictures: {_with_error(floor[depth])}"
        cells = [[*map(_with_error, row.distances[depth]), str(plan.steps[row.knee(depth)])] for row in rows]
        lines += _table(title, rows, [*_steps(plan), "knee"], cells)
    if all(row.right for row in rows):
        title = f"Right by the rule, % of pictures of one thing: {' / '.join(ATTRIBUTES)}"
        cells = [[" / ".join(f"{100 * share:.0f}" for share in shares) for shares in row.right] for row in rows]
        lines += _table(title, rows, _steps(plan), cells)
    if followers := [row for row in rows if row.to_path]:
        title = (
            f"Root mean square distance of a picture's latents to ddim's in {plan.path_steps} steps, median of {plan.path_images}"
        )
        cells = [[f"{distance:.4f}" for distance in row.to_path] for row in followers]
        lines += _table(title, followers, _steps(plan), cells)
    cells = [[f"{1000 * seconds:.0f}" for seconds in row.seconds] for row in rows]
    return lines + _table("Milliseconds a picture", rows, _steps(plan), cells)


def _with_error(distance: Distance) -> str:
    return f"{distance.value:.4g} +- {distance.error:.2g}"


def _steps(plan: QualityPlan) -> list[str]:
    return [f"{count} steps" for count in plan.steps]


def _table(title: str, rows: Sequence[Row], columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    head = ["model", "predicts", "sampler", *columns]
    body = [[row.model, row.predicts, row.sampler, *across] for row, across in zip(rows, cells, strict=True)]
    return ["", f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))]


# --- curves ---------------------------------------------------------------------------------------------------------------------


def plot(path: Path, *, rows: Sequence[Row], floor: Distance, steps: Sequence[int]) -> None:
    """The distance of details against the steps, a panel for each model; a ring is at the knee."""
    models = list(dict.fromkeys((row.model, row.predicts) for row in rows))
    figure = Figure(figsize=(2.6 * len(models) + 0.8, 3.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for (model, predicts), axes in zip(models, panels, strict=True):
        for row in (row for row in rows if (row.model, row.predicts) == (model, predicts)):
            values, errors = zip(*((one.value, one.error) for one in row.distances[DETAIL]), strict=True)
            colour, at = _COLOURS[row.sampler], row.knee(DETAIL)
            axes.errorbar(steps, values, yerr=errors, color=colour, marker=".", capsize=2, linewidth=1.4, label=row.sampler)
            axes.plot(steps[at], values[at], "o", color=colour, markersize=9, fillstyle="none")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(steps, [str(count) for count in steps])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E4E4E4", linewidth=0.7)
        axes.set_title(f"predicts {predicts}\n{model}", fontsize=8, loc="left", parse_math=False)
        axes.set_xlabel("steps of the head")
    low, high = panels[0].get_ylim()
    ticks = [tick for power in range(-3, 7) for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].set_ylabel(f"Frechet distance, detail\n(true pictures: {floor.value:.2g})")
    panels[-1].legend(frameon=False, fontsize=8)
    partial = path.with_suffix(".partial")
    FigureCanvasAgg(figure).print_png(str(partial))
    partial.replace(path)
