"""`fit --sweep`: the finished runs of a sweep as the table that a law is fitted to."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from mmar_megatron.sweep import journal
from mmar_megatron.sweep.records import SweepPlan
from mmar_megatron.training.metrics import read_metrics

LOSSES = ("val_loss_text", "val_loss_image")
"""What is fitted where nothing else is asked."""


def points_of(plan: SweepPlan, *, losses: Sequence[str]) -> tuple[str, list[str]]:
    """The table as CSV, with the losses after the last step, and what is to be said about it.

    Args:
        losses: columns of `metrics.jsonl`.

    Raises:
        ValueError: no run is done, or none has such a column.
    """
    remarks: list[str] = []
    unfinished = [run.name for run in plan.runs if not journal.is_done(plan.run_dir(run), steps=run.steps)]
    finished = [run for run in plan.runs if run.name not in unfinished]
    if not finished:
        raise ValueError(f"no run of {plan.directory} is done: start them with `python tools/sweep.py run {plan.directory}`")
    if unfinished:
        remarks.append(f"{len(unfinished)} of {len(plan.runs)} runs are not done and are left out: {', '.join(unfinished)}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "budget", "n_params", "n_tokens", "flops", *losses])
    lossless = []
    for run in finished:
        row = read_metrics(plan.run_dir(run))[-1]
        if unknown := [name for name in losses if name not in row]:
            raise ValueError(
                f"{plan.run_dir(run)} has no `{unknown[0]}` at its last step, only {', '.join(sorted(row))}: "
                "name others by --loss"
            )
        if any(row[name] is None for name in losses):  # null: not finite
            lossless.append(run.name)
            continue
        writer.writerow([run.name, f"{run.budget:g}", run.n_params, row["consumed_tokens"], run.flops, *(row[n] for n in losses)])
    if lossless:
        remarks.append(f"{len(lossless)} runs have ended with a loss that is not finite and are left out: {', '.join(lossless)}")
    return text.getvalue(), remarks
