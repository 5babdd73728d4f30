"""Measures how much a low-precision network output disturbs a sampling step, for each thing the network may predict.

    python tools/numerics.py --out runs/numerics
    python tools/numerics.py model --run_dir RUN_DIR --out runs/numerics   what FP8 does to a trained model; see its --help
    python tools/numerics.py train --config FILE ...                       trains as with FP8, emulated; see its --help

The first prints a table and writes numerics.json (every step), numerics.md (the table) and numerics.png (closed form and
measurement). The theory is in docs/numerics.md and in the docstring of mmar_megatron/diffusion/numerics.py. It takes a few
seconds on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
from numpy.typing import NDArray

from mmar_megatron import parallel
from mmar_megatron.benchmarks.fp8_effect import RECIPES, measure_effect
from mmar_megatron.benchmarks.fp8_report import effect_table
from mmar_megatron.benchmarks.fp8_training import train_emulated
from mmar_megatron.data.index import BadDataError
from mmar_megatron.diffusion import NoiseSchedule, ScheduleName
from mmar_megatron.diffusion.numerics import (
    DTYPES,
    StepErrors,
    TargetName,
    Trajectory,
    edm_coefficients,
    relative_rounding_error,
    root_sum_of_squares,
    step_errors,
)
from mmar_megatron.training.guard import TooManyBadSteps
from mmar_megatron.training.saving import SaveError
from mmar_megatron.training.watchdog import RanksLost

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TABLE_ROWS = 12
LABELS: dict[TargetName, str] = {"eps": "eps", "x": "x", "v": "v", "flow": "flow", "edm": "EDM"}
COLORS: dict[TargetName, str] = {"eps": "#D55E00", "x": "#009E73", "v": "#0072B2", "flow": "#0072B2", "edm": "#6B6B6B"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """All measurements of one command. `baseline` is the schedule's own velocity: v, or flow on the straight path."""

    schedule: NoiseSchedule
    trajectory: Trajectory
    data_std: float
    samples: int
    baseline: TargetName
    errors: dict[str, dict[TargetName, StepErrors]]
    """By number format, then by target."""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the three files go; made if missing")
    parser.add_argument("--schedule", choices=get_args(ScheduleName), default="cosine", help="noise schedule (default: cosine)")
    parser.add_argument("--timesteps", type=int, default=1000, metavar="T", help="noise levels of the schedule (default: 1000)")
    parser.add_argument("--steps", type=int, default=100, metavar="K", help="sampling steps, evenly spaced (default: 100)")
    parser.add_argument(
        "--dtype",
        default="bf16,fp8",
        metavar="LIST",
        help=f"number formats, comma-separated, of {', '.join(DTYPES)} (default: bf16,fp8)",
    )
    parser.add_argument(
        "--data-std", type=float, default=0.5, metavar="D", help="standard deviation of the tokens (default: 0.5)"
    )
    parser.add_argument("--samples", type=int, default=65536, metavar="N", help="tokens measured at each step (default: 65536)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and their noise (default: 0)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.dtype.split(",")) - DTYPES.keys():
        parser.error(f"unknown number format {', '.join(sorted(unknown))}: choose from {', '.join(DTYPES)}")
    return arguments


def measure(arguments: argparse.Namespace) -> Report:
    """Runs every target in every number format."""
    schedule = NoiseSchedule(arguments.schedule, num_timesteps=arguments.timesteps)
    trajectory = Trajectory.of(schedule, steps=arguments.steps)
    baseline: TargetName = "flow" if schedule.name == "linear_interpolation" else "v"
    targets: list[TargetName] = [baseline, "eps", "x", "edm"]
    errors = {
        name: {
            target: step_errors(
                target,
                trajectory=trajectory,
                dtype=DTYPES[name],
                data_std=arguments.data_std,
                samples=arguments.samples,
                seed=arguments.seed,
            )
            for target in targets
        }
        for name in arguments.dtype.split(",")
    }
    return Report(
        schedule=schedule,
        trajectory=trajectory,
        data_std=arguments.data_std,
        samples=arguments.samples,
        baseline=baseline,
        errors=errors,
    )


def summarize(report: Report, *, dtype: str) -> dict[str, dict[str, Any]]:
    """For each target, over the whole trajectory (root sum of squares): ratios to the baseline, and the closed form's fit."""
    baseline = report.errors[dtype][report.baseline]
    summary = {}
    for target, errors in report.errors[dtype].items():
        fit_K = errors.measured_K / errors.closed_form_K
        summary[LABELS[target]] = {
            "amplification_ratio": _ratio(errors.amplification_K, baseline.amplification_K),
            "amplification_ratio_without_first_step": _ratio(errors.amplification_K[1:], baseline.amplification_K[1:]),
            "error_ratio": _ratio(errors.measured_K, baseline.measured_K),
            "error_ratio_without_first_step": _ratio(errors.measured_K[1:], baseline.measured_K[1:]),
            "error_ratio_low_precision_state": _ratio(errors.measured_low_state_K, baseline.measured_low_state_K),
            "low_precision_state_over_fp32_state": _ratio(errors.measured_low_state_K, errors.measured_K),
            "measured_over_closed_form": [float(np.nanmin(fit_K)), float(np.nanmax(fit_K))],
        }
    return summary


def _ratio(errors_K: NDArray[np.float64], reference_K: NDArray[np.float64]) -> float:
    return root_sum_of_squares(errors_K) / root_sum_of_squares(reference_K)


def markdown(report: Report) -> str:
    """For each number format, steps spread evenly along the trajectory, then the trajectory as a whole."""
    base = LABELS[report.baseline]
    lines = [
        f"Schedule `{report.schedule.name}`, {report.schedule.num_timesteps} timesteps, "
        f"{len(report.trajectory.timesteps)} DDIM steps; "
        f"Gaussian tokens of standard deviation {report.data_std:g}, {report.samples} of them. "
        f"Multiples are of {base}'s, those of the amplification B in brackets. "
        "The whole trajectory is the root of the sum of the steps' squares.",
    ]
    for dtype in report.errors:
        lines += [
            "",
            f"**{dtype}** (relative rounding error {relative_rounding_error(DTYPES[dtype]):.3g}), RMS error of one step",
        ]
        lines += [
            "",
            *_step_table(report, dtype=dtype),
            "",
            f"**{dtype}**, whole trajectory",
            "",
            *_trajectory_table(report, dtype=dtype),
        ]
    return "\n".join(lines) + "\n"


def _step_table(report: Report, *, dtype: str) -> list[str]:
    """Measured errors: of the baseline as they are, of the others as multiples, with those of |B| in brackets."""
    by_target = report.errors[dtype]
    base, baseline = LABELS[report.baseline], by_target[report.baseline]
    others = [target for target in by_target if target != report.baseline]
    last = len(report.trajectory.timesteps) - 1
    lines = _table_head("t", base, *(f"{LABELS[target]} / {base}" for target in others))
    for k in np.unique([1, *np.linspace(0, last, TABLE_ROWS).round().astype(int)]):
        multiples = [
            f"{_number(errors.measured_K[k] / baseline.measured_K[k])} "
            f"({_number(errors.amplification_K[k] / baseline.amplification_K[k])})"
            for errors in map(by_target.__getitem__, others)
        ]
        lines.append(_row(str(report.trajectory.timesteps[k]), f"{baseline.measured_K[k]:.2e}", *multiples))
    return lines


def _trajectory_table(report: Report, *, dtype: str) -> list[str]:
    state = f"error, state in {dtype} too"
    lines = _table_head(
        "predicts", "B", "B, first step left out", "error", "error, first step left out", state, "measured / closed form"
    )
    summary = summarize(report, dtype=dtype)
    for label, row in summary.items():
        low, high = row["measured_over_closed_form"]
        lines.append(_row(label, *(_number(value) for key, value in row.items() if "_ratio" in key), f"{low:.3f} to {high:.3f}"))
    base = LABELS[report.baseline]
    cost = _number(summary[base]["low_precision_state_over_fp32_state"])
    return [*lines, "", f"Rounding the sampler's state to {dtype} after each step too multiplies {base}'s error by {cost}."]


def _table_head(*cells: str) -> list[str]:
    return [_row(*cells), _row(*["---:"] * len(cells))]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    """Three digits, or all before the point; where the target does not determine the step there is no finite error."""
    if not np.isfinite(value):
        return "infinite"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def as_json(report: Report) -> dict[str, Any]:
    """Everything measured. What is infinite or does not exist is null."""
    alpha_K, sigma_K = report.trajectory.alpha_t_K, report.trajectory.sigma_t_K
    c_x_K, c_eps_K = edm_coefficients(alpha=alpha_K, sigma=sigma_K, data_std=1.0)
    deviation_K = np.maximum(np.abs(c_x_K - sigma_K), np.abs(c_eps_K + alpha_K))
    return {
        "schedule": report.schedule.name,
        "num_timesteps": report.schedule.num_timesteps,
        "data_std": report.data_std,
        "samples": report.samples,
        "baseline": report.baseline,
        "edm_target_plus_v_at_unit_data_std": float(deviation_K.max()) if report.baseline == "v" else None,
        "timesteps": report.trajectory.timesteps,
        "dtypes": {
            dtype: {
                "relative_rounding_error": relative_rounding_error(DTYPES[dtype]),
                "summary": _nullable(summarize(report, dtype=dtype)),
                "steps": {
                    LABELS[target]: _nullable({name.removesuffix("_K"): value.tolist() for name, value in vars(errors).items()})
                    for target, errors in by_target.items()
                },
            }
            for dtype, by_target in report.errors.items()
        },
    }


def _nullable(value: Any) -> Any:
    match value:
        case dict():
            return {key: _nullable(item) for key, item in value.items()}
        case list():
            return [_nullable(item) for item in value]
        case float() if not np.isfinite(value):
            return None
    return value


def plot(report: Report, *, path: Path) -> None:
    """|B|, then the error in each number format: lines are the closed form, dots are measured."""
    count = 1 + len(report.errors)
    figure, panels = plt.subplots(1, count, figsize=(4.6 * count, 4.6), squeeze=False, layout="constrained")
    timesteps = report.trajectory.timesteps
    axes = panels[0, 0]
    for target, errors in next(iter(report.errors.values())).items():
        axes.plot(timesteps, errors.amplification_K, label=LABELS[target], **_line(target, report=report))
    axes.set_title("amplification |B| of a step, x_s = A x_t + B u", fontsize=10, loc="left")
    axes.legend(frameon=False, title="the network predicts", alignment="left", loc="upper center")
    for axes, (dtype, by_target) in zip(panels[0, 1:], report.errors.items(), strict=True):
        axes.sharey(panels[0, 1])
        for target, errors in by_target.items():
            line = _line(target, report=report)
            axes.plot(timesteps, errors.closed_form_K, **line)
            every = slice(0, None, max(1, len(timesteps) // 25))
            axes.plot(timesteps[every], errors.measured_K[every], "o", color=line["color"], zorder=line["zorder"], markersize=3.6)
        axes.set_title(f"RMS error of a step, {dtype} (relative rounding error {_rounding(dtype)})", fontsize=10, loc="left")
    for axes in panels[0]:
        _finish(axes)
    figure.suptitle(
        f"{report.schedule.name} schedule, {len(timesteps)} of {report.schedule.num_timesteps} steps, "
        f"tokens of standard deviation {report.data_std:g}\nLines: closed form, nothing fitted. Dots: measured against float64.",
        fontsize=10.5,
        x=0.008,
        ha="left",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(target: TargetName, *, report: Report) -> dict[str, Any]:
    """The baseline lies on top; EDM is dashed, so that what it hides can be seen."""
    order = {report.baseline: 4, "edm": 3}
    style = (0, (4, 2)) if target == "edm" else "-"
    return {"color": COLORS[target], "linewidth": 1.7, "linestyle": style, "zorder": order.get(target, 2)}


def _rounding(dtype: str) -> str:
    return f"{relative_rounding_error(DTYPES[dtype]):.2g}"


def _finish(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_xlabel("timestep (0: nearly clean; last: nearly or quite pure noise)", fontsize=9)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


TRAIN_HELP = """usage: numerics.py train --config FILE [--section.key VALUE ...]

Trains as pretrain_mmar.py does with the same options, on any machine, with the FP8 that precision.fp8 asks for emulated: the
operands of the matrix products in the backbone's layers are rounded to the same values, and all sums are in fp32. It is for
loss curves where there is no GPU with FP8, and saves no time. One process; `fp8_emulation.json` in the run directory says
what was emulated.

    python tools/numerics.py train --config examples/configs/tiny.yaml --precision.dtype bf16 \\
        --model.backbone.transformer_impl transformer_engine --precision.fp8 tensorwise --run_dir runs/tensorwise
"""


def train(options: list[str]) -> None:
    """The subcommand of that name."""
    if not options or {"-h", "--help"} & set(options):
        print(TRAIN_HELP)
        return
    try:
        train_emulated(options)
    except (ValueError, OSError, BadDataError, SaveError, TooManyBadSteps, RanksLost) as error:
        sys.exit(f"numerics.py: {error}")


MODEL_HELP = """What bf16 and FP8 do to a trained model, beside fp32 with the same weights and held-out batches.

    python tools/numerics.py model --run_dir runs/quickstart --out runs/numerics

FP8 is emulated in the matrix products of the backbone's layers: operands are rounded to the same values as by Transformer Engine,
and all sums are in fp32, so that any machine will do. Prints a table and writes it as OUT/fp8.md, and OUT/fp8.json:

  z error, v error    of the head's condition and of its prediction, relative to their root mean square
  image, text loss    held-out, and their change
  gradient            cosine to that of fp32, and error relative to its norm
"""


def model(argv: list[str]) -> None:
    """The subcommand of that name."""
    parser = argparse.ArgumentParser(
        prog="numerics.py model", description=MODEL_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run_dir", required=True, type=Path, help="of a run of pretrain_mmar.py, or one of its checkpoints")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the two files go; made if missing")
    parser.add_argument("--fp8", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES), help="recipes (default: all)")
    parser.add_argument(
        "--layers_in_bf16",
        nargs="+",
        default=["none", "ends"],
        metavar="LAYERS",
        help="spared from FP8: none, ends (the first and the last), or numbers from 0 such as 0,3 (default: none ends)",
    )
    parser.add_argument("--samples", type=int, default=240, help="held-out samples, each for both tasks (default 240)")
    parser.add_argument(
        "--warmup", type=int, default=16, help="passes over training data before delayed scaling is measured (default 16)"
    )
    parser.add_argument("--average", action="store_true", help="take the moving average of the weights in their place")
    options = parser.parse_args(argv)
    if options.samples < 1 or options.warmup < 1:
        parser.error("--samples and --warmup must be 1 or more")
    try:
        found = measure_effect(
            options.run_dir,
            recipes=options.fp8,
            layers_in_bf16=options.layers_in_bf16,
            samples=options.samples,
            warmup=options.warmup,
            average=options.average,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"numerics.py: {error}")
    table = effect_table(found)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fp8.md").write_text(table)
    (options.out / "fp8.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(table)
    print(f"Written: {options.out}/fp8.json, fp8.md")
    parallel.leave()


def main(argv: list[str]) -> None:
    """One of the three."""
    match argv:
        case ["model", *options]:
            model(options)
        case ["train", *options]:
            train(options)
        case _:
            sampling_step(argv)


def sampling_step(argv: list[str]) -> None:
    """Measures, prints the table, writes the three files."""
    arguments = parse_arguments(argv)
    try:
        report = measure(arguments)
    except ValueError as error:
        raise SystemExit(f"numerics.py: {error}") from None
    table = markdown(report)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "numerics.md").write_text(table)
    (arguments.out / "numerics.json").write_text(json.dumps(as_json(report), indent=1, allow_nan=False) + "\n")
    plot(report, path=arguments.out / "numerics.png")
    print(table)
    print(f"Written: {arguments.out}/numerics.json, numerics.md, numerics.png")


if __name__ == "__main__":
    main(sys.argv[1:])
