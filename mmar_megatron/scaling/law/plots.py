"""Drawn: losses along budgets, the best use of compute, residuals."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from mmar_megatron.scaling.law.fitting import LossFit
from mmar_megatron.scaling.law.frontier import allocate
from mmar_megatron.scaling.law.huber import Array
from mmar_megatron.scaling.law.intervals import bias_corrected
from mmar_megatron.scaling.law.points import Points

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
"""Okabe and Ito's colours, which people with any colour vision can tell apart."""
_MOST_BUDGETS = 12
_PLACES = 60
_MOST_LABELS = 6


def as_png(figure: Figure) -> bytes:
    """The file."""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def draw_all(points: Points, fit: LossFit) -> dict[str, Figure]:
    """By name; `isoflop` only where there are budgets with several runs."""
    figures = {"frontier": draw_frontier(points, fit), "residuals": draw_residuals(points, fit)}
    if any(len(budget.members) > 1 for budget in fit.budgets):
        figures = {"isoflop": draw_isoflop(points, fit), **figures}
    return figures


def draw_isoflop(points: Points, fit: LossFit) -> Figure:
    """Losses by size, a colour for each budget: the law's curve, and the parabola with its lowest point."""
    figure = _figure(8.6, 5.2)
    axes = figure.subplots()
    shown = [budget for budget in fit.budgets if len(budget.members) > 1][-_MOST_BUDGETS:]
    near = np.abs(np.log(fit.loss_I / fit.predicted_I)) < 0.2
    for budget, colour in zip(shown, colormaps["viridis"](np.linspace(0, 0.85, len(shown))), strict=True):
        rows = budget.members[near[budget.members]]
        sizes = np.geomspace(points.params_I[budget.members].min() / 1.3, points.params_I[budget.members].max() * 1.3, _PLACES)
        tokens = budget.flops / points.flops_per_product / sizes
        axes.plot(sizes, fit.fitted.law.loss(sizes, tokens)[0], color=colour, linewidth=1.6)
        axes.plot(points.params_I[rows], fit.loss_I[rows], "o", color=colour, markersize=4.5, label=budget.name)
        for parabola in fit.check.parabolas:
            if parabola.budget is budget and parabola.best is not None:
                axes.plot(sizes, parabola.loss(sizes), color=colour, linewidth=1, linestyle=(0, (4, 2)))
                lowest = np.array([parabola.best.value])
                axes.plot(lowest, parabola.loss(lowest), "*", color=colour, markersize=11, mec="white", mew=0.6)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8.5)
    hidden = int(sum((~near[budget.members]).sum() for budget in shown))
    note = f"; {hidden} far above or below left out" if hidden else ""
    _style(axes, f"{fit.column} along budgets", f"line: the law; dashed: parabola with its lowest point{note}", x="parameters N")
    _loss_axis(axes)
    return figure


def draw_frontier(points: Points, fit: LossFit) -> Figure:
    """Best size, best tokens and their loss by compute, with bands."""
    figure = _figure(12.6, 4.2)
    panels = figure.subplots(1, 3)
    ends = [points.flops_I.min(), points.flops_I.max(), *(answer.flops for answer in fit.answers)]
    flops_K = np.geomspace(min(ends) / 1.5, max(ends) * 1.5, _PLACES)
    best, best_P = (allocate(law, flops_K, flops_per_product=points.flops_per_product) for law in (fit.fitted.law, fit.samples))
    named = (
        ("params", "best size N", "parameters"),
        ("tokens", "best tokens D", "tokens"),
        ("loss", f"{fit.column} there", "expected"),
    )
    for axes, (name, title, unit) in zip(panels, named, strict=True):
        value_K, low_K, high_K = _band(getattr(best, name)[0], getattr(best_P, name))
        axes.fill_between(flops_K, low_K, high_K, color=_BLUE, alpha=0.18, linewidth=0)
        axes.plot(flops_K, value_K, color=_BLUE, linewidth=1.8)
        runs = {"params": points.params_I, "tokens": points.tokens_I, "loss": fit.loss_I}[name]
        near = fit.loss_I < 1.5 * fit.predicted_I
        axes.plot(points.flops_I[near], runs[near], ".", color=_GREY, alpha=0.45, markersize=4)
        if name == "params":
            for parabola in fit.check.parabolas:
                if parabola.best is not None:
                    error = [[parabola.best.value - parabola.best.low], [parabola.best.high - parabola.best.value]]
                    place = (parabola.budget.flops, parabola.best.value)
                    axes.errorbar(*place, yerr=error, fmt="*", color=_ORANGE, markersize=9, elinewidth=1)
        for answer in fit.answers:
            interval = getattr(answer, name)
            if interval is not None:
                error = [[interval.value - interval.low], [interval.high - interval.value]]
                axes.errorbar(answer.flops, interval.value, yerr=error, fmt="D", color=_GREEN, markersize=5, capsize=3)
        axes.set_xscale("log")
        axes.axvline(points.flops_I.max(), color=_GREY, linewidth=0.8, linestyle=":")
        _style(axes, title, unit, x="training FLOPs C")
        _loss_axis(axes) if name == "loss" else axes.set_yscale("log")
    stars = "; stars: parabolas" if fit.check.parabolas else ""
    figure.supxlabel(
        f"blue: the law with its 90 % band; grey: the runs, up to the dotted line{stars}; diamonds: the budgets asked for",
        fontsize=8.5,
        color=_GREY,
    )
    return figure


def _band(value_K: Array, samples_PK: Array) -> tuple[Array, Array, Array]:
    """Value, low and high; nan where there is no interval."""
    intervals = [bias_corrected(float(value), samples) for value, samples in zip(value_K, samples_PK.T, strict=True)]
    nothing = (float("nan"),) * 3
    columns = np.array([nothing if each is None else (each.value, each.low, each.high) for each in intervals])
    return columns[:, 0], columns[:, 1], columns[:, 2]


def draw_residuals(points: Points, fit: LossFit) -> Figure:
    """By compute, coloured by size; runs far off stand at the edge with their names."""
    figure = _figure(8.6, 3.8)
    axes = figure.subplots()
    residual_I = fit.residual_I
    rest = np.setdiff1d(np.arange(len(residual_I)), fit.far)
    edge = max(1.25 * float(np.abs(residual_I[rest]).max()), 3 * fit.scatter, 1e-6)
    shown = np.clip(residual_I, -edge, edge)
    dots = axes.scatter(
        points.flops_I, shown, c=np.log10(points.params_I), cmap="viridis", s=24, linewidths=0, zorder=3, clip_on=False
    )
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.axhspan(-fit.scatter, fit.scatter, color=_BLUE, alpha=0.08, linewidth=0)
    for row in fit.far[:_MOST_LABELS]:
        axes.annotate(
            f"{points.names[row]}: {residual_I[row]:+.1%}",
            xy=(points.flops_I[row], shown[row]),
            xytext=(6, -3 if residual_I[row] > 0 else 3),
            textcoords="offset points",
            fontsize=8.5,
            color=_ORANGE,
            va="top" if residual_I[row] > 0 else "bottom",
            parse_math=False,
        )
    axes.set_xscale("log")
    axes.set_ylim(-edge, edge)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar = figure.colorbar(dots, ax=axes, pad=0.02)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.1e}"))
    bar.set_label("parameters N", fontsize=8.5, color="#444444")
    bar.ax.tick_params(labelsize=8, color="#BBBBBB", labelcolor="#444444")
    _style(axes, f"Residuals of {fit.column}", "measured by predicted, less 1; band: the scatter", x="training FLOPs C")
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08), facecolor="white")


def _style(axes: Axes, title: str, unit: str, *, x: str) -> None:
    """A quiet frame: only the axes that are read."""
    if x.startswith("parameters"):
        axes.set_xscale("log")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20, parse_math=False)
    axes.text(0, 1.03, unit, transform=axes.transAxes, fontsize=8.5, color=_GREY, parse_math=False)
    axes.set_xlabel(x, fontsize=8.5, color="#444444")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, color="#BBBBBB", labelcolor="#444444")


def _loss_axis(axes: Axes) -> None:
    """Logarithmic, with plain numbers at enough places."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 8:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def names_of_files(columns: Sequence[str]) -> list[str]:
    """Of each column a name that any file system takes, all different."""
    plain = ["".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in column) for column in columns]
    return [name if plain.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(plain, start=1)]
