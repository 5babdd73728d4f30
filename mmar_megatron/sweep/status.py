"""`status`: what has become of each run, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from mmar_megatron.scaling.tables import columns, duration
from mmar_megatron.sweep import journal
from mmar_megatron.sweep.journal import RunState
from mmar_megatron.sweep.queueing import failure
from mmar_megatron.sweep.records import PlannedRun, SweepPlan

HEADS = ("run", "state", "step", "of", "done", "attempts", "val_loss_text", "val_loss_image", "left")
_RECENT = 20
"""Logged steps by which a run's pace is measured."""


def status(plan: SweepPlan) -> str:
    """The table, the whole sweep in a sentence, and the last lines of runs that have failed."""
    states = [journal.read_state(plan.run_dir(run), steps=run.steps, retries=plan.retries) for run in plan.runs]
    rows: list[Sequence[str]] = [HEADS]
    rows += [_row(run, state) for run, state in zip(plan.runs, states, strict=True)]
    failed = [failure(plan, run) for run, state in zip(plan.runs, states, strict=True) if state.condition == "failed"]
    return "\n".join([*columns(rows, left=2), "", _whole(plan, states), *failed])


def seconds_left(run: PlannedRun, state: RunState) -> float | None:
    """At its latest pace, without validations and checkpoints; None: not known."""
    pace = _step_time(state)
    return None if pace is None else pace * max(0, run.steps - state.step)


def _row(run: PlannedRun, state: RunState) -> tuple[str, ...]:
    left = seconds_left(run, state) if state.condition == "running" else None
    return (
        run.name,
        state.condition,
        f"{state.step:,}",
        f"{run.steps:,}",
        f"{min(1.0, state.step / run.steps):.0%}",
        f"{state.attempts}" + (f", {state.failures} failed" if state.failures else ""),
        *(_loss(state, name) for name in ("val_loss_text", "val_loss_image")),
        "" if left is None else duration(left),
    )


def _whole(plan: SweepPlan, states: Sequence[RunState]) -> str:
    conditions = [state.condition for state in states]
    counts = [f"{count} {condition}" for condition in dict.fromkeys(sorted(conditions)) if (count := conditions.count(condition))]
    of_all = sum(run.flops for run in plan.runs)
    share = sum(run.flops * min(1.0, state.step / run.steps) for run, state in zip(plan.runs, states, strict=True)) / of_all
    said = f"{', '.join(counts)} of {len(states)} runs; {share:.1%} of the FLOPs are done"
    eta = sweep_seconds_left(plan, states)
    return said if eta is None else f"{said}, about {duration(eta)} left at this pace"


def sweep_seconds_left(plan: SweepPlan, states: Sequence[RunState]) -> float | None:
    """Of all that is waiting or running, with as many runs at a time as now; None: none is running, or its pace is not known.

    Each run is taken to be as fast in FLOP/s as the mean of those whose pace is known, where its own is not.
    """
    pairs = list(zip(plan.runs, states, strict=True))
    running = sum(state.condition == "running" for state in states)
    speeds = {run.name: run.flops / run.steps / pace for run, state in pairs if (pace := _step_time(state))}
    if not running or not speeds:
        return None
    usual = fmean(speeds.values())
    left = [
        run.flops * max(0.0, 1 - state.step / run.steps) / speeds.get(run.name, usual)
        for run, state in pairs
        if state.condition in ("waiting", "running", "stopped")
    ]
    return max(sum(left) / running, max(left))


def _step_time(state: RunState) -> float | None:
    times = [row["step_time_s"] for row in state.metrics[-_RECENT:] if row.get("step_time_s")]
    return median(times) if times else None


def _loss(state: RunState, name: str) -> str:
    value = next((row[name] for row in reversed(state.metrics) if row.get(name) is not None), None)
    return "" if value is None else f"{value:.4f}"
