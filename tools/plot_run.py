"""Draws the curves of one or several runs from their `metrics.jsonl`.

    python tools/plot_run.py RUN_DIR [RUN_DIR ...] [--out curves.png]

Training losses are drawn faint as logged and plainly as a running mean; held-out losses as points. A colour is a run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mmar_megatron.training.metrics import METRICS_FILE, read_metrics

# Okabe and Ito's colours, which people with any colour vision can tell apart.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
GREY = "#777777"
LABEL_SPACING_PT = 9.5


@dataclass(frozen=True)
class Run:
    """The logged steps of one run."""

    name: str
    rows: list[dict[str, Any]]
    colour: str

    @property
    def last_step(self) -> int:
        """Where its curves end."""
        return int(self.rows[-1]["step"])

    def points(self, value: str, *, divided_by: str | None = None) -> list[tuple[int, float]]:
        """(step, value) wherever it was logged and is finite, optionally as a ratio to another value."""
        found = []
        for row in self.rows:
            top, bottom = row.get(value), 1.0 if divided_by is None else row.get(divided_by)
            if top is not None and bottom:
                found.append((row["step"], top / bottom))
        return found


@dataclass(frozen=True)
class Series:
    """One line of a panel. `noisy` is drawn faint with its running mean, `points` and `contrast` (dashed) with markers."""

    label: str
    points: list[tuple[int, float]]
    style: Literal["noisy", "plain", "points", "contrast"]


@dataclass(frozen=True)
class Label:
    """What a line is, written at its end."""

    height: float
    """In the panel's data."""
    text: str
    colour: str


@dataclass(frozen=True)
class Panel:
    """What one of the plots shows of every run."""

    title: str
    unit: str
    series: Callable[[Run], list[Series]]
    scale: Literal["log", "linear", "from zero"]
    level: tuple[float, str] | None = None
    """A horizontal line to compare with, and what it means."""


PANELS = (
    Panel(
        "Text loss",
        "cross-entropy, nats a token",
        lambda run: [
            Series("training", run.points("loss_text"), "noisy"),
            Series("held out", run.points("val_loss_text"), "points"),
        ],
        scale="log",
    ),
    Panel(
        "Image loss",
        "squared error of the prediction, a channel",
        lambda run: [
            Series("training", run.points("loss_image"), "noisy"),
            Series("held out", run.points("val_loss_image"), "points"),
        ],
        scale="log",
    ),
    Panel(
        "Does the image follow its caption?",
        "held-out image loss, as a share of predicting zero",
        lambda run: [
            Series("own caption", run.points("val_loss_image", divided_by="val_loss_image_zero"), "points"),
            Series("another's", run.points("val_loss_image_wrong_text", divided_by="val_loss_image_zero"), "contrast"),
        ],
        scale="log",
        level=(1.0, "predicting zero"),
    ),
    Panel(
        "Does the caption follow its image?",
        "held-out text loss, nats a token",
        lambda run: [
            Series("own image", run.points("val_loss_text"), "points"),
            Series("another's", run.points("val_loss_text_wrong_image"), "contrast"),
        ],
        scale="log",
    ),
    Panel("Gradient norm", "before clipping", lambda run: [Series("", run.points("grad_norm"), "noisy")], scale="log"),
    Panel("Learning rate", "", lambda run: [Series("", run.points("lr"), "plain")], scale="linear"),
    Panel("Throughput", "tokens a second", lambda run: [Series("", run.points("tokens_per_second"), "noisy")], scale="from zero"),
)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours on both sides, a twentieth of all points together, so that it does not lag; fewer at the ends."""
    reach = len(values) // 40
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw_series(axes: Axes, series: Series, *, colour: str) -> None:
    """One line in the run's colour."""
    steps, values = zip(*series.points, strict=True)
    marker = "o" if len(steps) < 60 else None
    if series.style == "noisy":
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(steps, running_mean(values), color=colour, alpha=0.6, linewidth=1.4)
    elif series.style == "plain":
        axes.plot(steps, values, color=colour, linewidth=1.6)
    elif series.style == "points":
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=3.5)
    else:
        axes.plot(steps, values, color=colour, linewidth=1.4, linestyle=(0, (4, 2)), marker=marker, markersize=4, mfc="white")


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> list[Label]:
    """Draws all runs; returns the labels due at the lines' ends."""
    longest = max(runs, key=lambda run: run.last_step)
    labels = []
    for run in runs:
        for series in panel.series(run):
            if not series.points:
                continue
            draw_series(axes, series, colour=run.colour)
            # With several runs a line's kind is told once, in grey, at the longest; its run is told by the colour.
            if series.label and run is longest:
                end = running_mean([value for _, value in series.points])[-1]
                labels.append(Label(end, series.label, run.colour if len(runs) == 1 else GREY))
    if panel.level:
        axes.hlines(panel.level[0], 0, longest.last_step, color=GREY, linewidth=1, linestyle=":")
        labels.append(Label(*panel.level, GREY))
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=18)
    axes.text(0, 1.03, panel.unit, transform=axes.transAxes, fontsize=8.5, color=GREY)
    style_axes(axes, scale=panel.scale, last_step=longest.last_step)
    return labels


def style_axes(axes: Axes, *, scale: str, last_step: int) -> None:
    """A quiet frame: only the axes that are read, and light lines to read heights along. All panels have the same steps."""
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif scale == "from zero":
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xticks([tick for tick in MaxNLocator(5, integer=True).tick_values(0, last_step) if 0 <= tick <= last_step])
    axes.set_xlim(-0.02 * last_step, 1.3 * last_step)  # the labels stand at the right
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, color="#BBBBBB", labelcolor="#444444")
    axes.set_xlabel("step", fontsize=8.5, color="#444444")


def place_labels(axes: Axes, labels: Sequence[Label], *, last_step: int, dpi: float) -> None:
    """Writes each label to the right of its line's end, pushed up where two would overlap."""
    lowest = -math.inf
    for label in sorted(labels, key=lambda label: label.height):
        height_pt = float(axes.transData.transform((last_step, label.height))[1]) * 72 / dpi
        lowest = max(height_pt, lowest + LABEL_SPACING_PT)
        axes.annotate(
            label.text,
            xy=(last_step, label.height),
            xytext=(5, lowest - height_pt),
            textcoords="offset points",
            fontsize=8.5,
            color=label.colour,
            va="center",
        )


def describe(run: Run) -> list[str]:
    """The last figures of a run, in words."""
    lines = [f"{run.last_step:,} steps"]

    def last(value: str, **options: str) -> float | None:
        points = run.points(value, **options)
        return points[-1][1] if points else None

    text, image, share = last("val_loss_text"), last("val_loss_image"), last("val_loss_image", divided_by="val_loss_image_zero")
    if text is not None:
        lines.append(f"held-out text loss {text:.3f}")
    if image is not None:
        lines.append(f"held-out image loss {image:.3f}" + (f", {share:.1%} of zero's" if share is not None else ""))
    wrong_text = last("val_loss_image_wrong_text", divided_by="val_loss_image")
    if wrong_text is not None:
        lines.append(f"another's caption costs {wrong_text:.1f}x in image loss")
    wrong_image = last("val_loss_text_wrong_image")
    if wrong_image is not None:
        lines.append(f"another's image: text loss {wrong_image:.2f}")
    return lines


def draw_summary(axes: Axes, runs: Sequence[Run]) -> None:
    """The runs' names in their colours, each with its last figures."""
    axes.set_axis_off()
    y = 1.1
    for run in runs:
        axes.text(0, y, run.name, transform=axes.transAxes, fontsize=11, fontweight="bold", color=run.colour, va="top")
        y -= 0.025
        for line in describe(run) if len(runs) <= 3 else ():  # more would not fit
            y -= 0.075
            axes.text(0, y, line, transform=axes.transAxes, fontsize=8.5, color="#444444", va="top")
        y -= 0.12


def draw(runs: Sequence[Run]) -> Figure:
    """The whole figure; a panel of which no run has data is left out."""
    panels = [panel for panel in PANELS if any(series.points for run in runs for series in panel.series(run))]
    columns = math.ceil((len(panels) + 1) / 2)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(4.1 * columns, 6.6), dpi=130, layout=layout, facecolor="white")
    grid = figure.subplots(2, columns, squeeze=False).ravel()
    labels = [draw_panel(axes, panel, runs) for axes, panel in zip(grid, panels, strict=False)]
    draw_summary(grid[len(panels)], runs)
    for axes in grid[len(panels) + 1 :]:
        axes.set_axis_off()
    figure.draw_without_rendering()  # labels are kept apart in points, so the layout must stand
    for axes, due in zip(grid, labels, strict=False):
        place_labels(axes, due, last_step=max(run.last_step for run in runs), dpi=figure.dpi)
    return figure


def load_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs with their colours. Raises ValueError where a directory has nothing to draw."""
    names = [directory.name for directory in directories]
    runs = []
    for index, directory in enumerate(directories):
        rows = read_metrics(directory)
        if not rows:
            raise ValueError(f"{directory / METRICS_FILE} has no logged step: give the directory of a run that has trained.")
        name = directory.name if names.count(directory.name) == 1 else str(directory)
        runs.append(Run(name, rows, RUN_COLOURS[index % len(RUN_COLOURS)]))
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="+", type=Path, help="directory of a run; several are drawn into one figure")
    parser.add_argument("--out", type=Path, help="the picture to write (default: curves.png in the first run's directory)")
    options = parser.parse_args(arguments)
    try:
        figure = draw(load_runs(options.run_dir))
    except ValueError as error:
        parser.error(str(error))
    out = options.out or options.run_dir[0] / "curves.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".partial-{out.name}")
    figure.savefig(partial)
    partial.replace(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
