"""Shapes and budgets -> an IsoFLOP grid: which sizes each budget trains, for how many steps, and with which settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmar_megatron.sweep.measuring import Measured
from mmar_megatron.sweep.records import PlannedRun
from mmar_megatron.sweep.shapes import merged
from mmar_megatron.sweep.spec import LearningRateSpec, Spec

FEWEST_BUDGETS, FEWEST_SIZES = 5, 6
"""Of a grid that gives narrow intervals."""


def lay_out(spec: Spec, measured: Sequence[Measured]) -> tuple[list[PlannedRun], list[str]]:
    """The runs, smallest budget and smallest size first, and what is to be said about them.

    Args:
        measured: all shapes, smallest first.

    Raises:
        ValueError: there are fewer shapes than sizes of a budget, or a run would have too few steps.
    """
    if len(measured) < spec.sizes_per_budget:
        raise ValueError(
            f"there are {len(measured)} shapes for sizes_per_budget {spec.sizes_per_budget}: add shapes, or lower the latter"
        )
    runs: list[PlannedRun] = []
    remarks: list[str] = []
    if len(spec.budgets) < FEWEST_BUDGETS or spec.sizes_per_budget < FEWEST_SIZES:
        remarks.append(
            f"{len(spec.budgets)} budgets of {spec.sizes_per_budget} sizes give wide intervals: "
            f"{FEWEST_BUDGETS} of {FEWEST_SIZES} are better"
        )
    for budget in sorted(spec.budgets):
        best = expected_optimum(measured, budget=budget, tokens_per_parameter=spec.tokens_per_parameter)
        chosen = choose(measured, around=best, count=spec.sizes_per_budget, spread=spec.spread)
        if not chosen[0].n_params < best < chosen[-1].n_params:
            remarks.append(
                f"budget {budget:g}: the optimum is expected at {best:.2e} parameters, which is not between its smallest size "
                f"{chosen[0].n_params:.2e} and its largest {chosen[-1].n_params:.2e}: add {_missing(chosen, best)} shapes"
            )
        runs += [_run(spec, each, budget=budget, seed=seed) for each in chosen for seed in spec.seeds]
    _refuse_short(runs, spec.min_steps)
    if repeating := [run for run in runs if run.epochs > spec.max_epochs]:
        remarks.append(
            f"{len(repeating)} runs, marked by *, read their data more than {spec.max_epochs:g} times, the most often "
            f"{max(run.epochs for run in repeating):.1f} times: the law takes tokens to be fresh; lower the budgets or get more "
            "data"
        )
    return runs, remarks


def expected_optimum(measured: Sequence[Measured], *, budget: float, tokens_per_parameter: float) -> float:
    """Parameters N at which the budget pays `tokens_per_parameter` x N tokens, between shapes by a power law.

    Beyond the smallest or the largest shape the law through the nearest two goes on.
    """
    log_n = [math.log(each.n_params) for each in measured]
    off = [math.log(each.tokens_per_parameter(budget) / tokens_per_parameter) for each in measured]
    if len(measured) == 1:
        return math.exp(log_n[0] + off[0] / 2)
    # Tokens for each parameter fall as shapes grow: the pair that has the zero between its two, or else the nearest one.
    right = next((k for k in range(1, len(measured) - 1) if off[k] <= 0), len(measured) - 1)
    slope = (off[right] - off[right - 1]) / (log_n[right] - log_n[right - 1])
    return math.exp(log_n[right] - off[right] / slope)


def choose(measured: Sequence[Measured], *, around: float, count: int, spread: float) -> list[Measured]:
    """As many different shapes, each the nearest to one of the sizes from around / spread to around x spread, evenly in log."""
    left = list(measured)
    chosen = []
    shares = [k / (count - 1) for k in range(count)] if count > 1 else [0.5]
    # From the middle outwards: where shapes run out at an end, those near the optimum are not given up for it.
    for share in sorted(shares, key=lambda share: abs(share - 0.5)):
        target = math.log(around) + (2 * share - 1) * math.log(spread)
        nearest = min(left, key=lambda each: abs(math.log(each.n_params) - target))
        left.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen, key=lambda each: each.n_params)


def settings_of(spec: Spec, run: PlannedRun, measured: Measured, *, run_dir: str) -> dict[str, object]:
    """`run.yaml`: all that a run has over the configuration files of the sweep."""
    every = {"every": math.ceil(run.steps / spec.validations)}
    cadence = {
        "validation": every,
        "checkpoint": {"every": math.ceil(run.steps / spec.checkpoints), "keep_last": 1},
        "preview": {"every": 0},
    }
    fixed = {
        "optimizer": {"lr": run.learning_rate, "warmup_steps": math.ceil(spec.warmup * run.steps)},
        "train": {"steps": run.steps},
        "seed": run.seed,
        "run_dir": run_dir,
        "resume": "auto",
    }
    return merged(cadence, measured.options, fixed)


def learning_rate(rule: LearningRateSpec, *, width: int) -> float:
    """Peak of a shape of this width, to six digits."""
    return float(f"{rule.value * (width / rule.width) ** rule.exponent:.6g}")


def _run(spec: Spec, measured: Measured, *, budget: float, seed: int) -> PlannedRun:
    steps = round(budget / measured.step_flops)
    name = f"{budget:g}-{measured.shape.name}".replace("+", "")
    return PlannedRun(
        name=name if len(spec.seeds) == 1 else f"{name}-s{seed}",
        budget=budget,
        shape=measured.shape.name,
        seed=seed,
        n_params=measured.n_params,
        steps=steps,
        tokens=steps * measured.step_tokens,
        flops=steps * measured.step_flops,
        learning_rate=learning_rate(spec.learning_rate, width=measured.width),
        epochs=steps * measured.step_epochs,
    )


def _refuse_short(runs: Sequence[PlannedRun], min_steps: int) -> None:
    if short := [run for run in runs if run.steps < min_steps]:
        named = ", ".join(f"{run.name} ({run.steps})" for run in short[:4]) + (", ..." if len(short) > 4 else "")
        raise ValueError(
            f"{len(short)} runs would have fewer than {min_steps} steps: {named}; raise the budgets, lower "
            "train.global_batch_size, or add smaller shapes"
        )


def _missing(chosen: Sequence[Measured], best: float) -> str:
    return "smaller" if best <= chosen[0].n_params else "larger"
