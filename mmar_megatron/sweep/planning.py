"""`plan`: a specification in, a directory of runs that are ready to be started out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from mmar_megatron.scaling.tables import columns
from mmar_megatron.sweep.grid import lay_out, settings_of
from mmar_megatron.sweep.journal import has_begun
from mmar_megatron.sweep.measuring import measure
from mmar_megatron.sweep.records import PLAN, RUN_CONFIG, SweepPlan, default_launch, read_plan, write_whole
from mmar_megatron.sweep.shapes import shapes_of
from mmar_megatron.sweep.spec import read_spec

HEADS = ("run", "parameters", "lr", "steps", "tokens", "tokens/param", "FLOPs", "of all", "epochs")


def make_plan(spec_path: Path, *, out: Path, say: Callable[[str], None]) -> str:
    """Writes `plan.json` and each run's `run.yaml`, and returns the table to be printed.

    A directory that has a plan takes another one as long as no run that has begun would change or be forgotten: budgets and
    shapes can be added.

    Raises:
        ValueError: something in the specification, or the directory has runs that this plan would change.
    """
    spec = read_spec(spec_path)
    measured = measure(spec, shapes_of(spec), say=say)
    runs, remarks = lay_out(spec, measured)
    of_shape = {each.shape.name: each for each in measured}
    plan = SweepPlan(
        directory=out.resolve(),
        configs=[str(Path(config).resolve()) for config in spec.configs],
        launch=shlex.split(spec.launch) or default_launch(spec.processes),
        working_directory=str(Path.cwd()),
        retries=spec.retries,
        max_epochs=spec.max_epochs,
        slurm=spec.slurm,
        setup=spec.setup,
        remarks=remarks,
        runs=runs,
    )
    files = {
        plan.run_dir(run) / RUN_CONFIG: yaml.safe_dump(
            settings_of(spec, run, of_shape[run.shape], run_dir=str(plan.run_dir(run))), sort_keys=False, allow_unicode=True
        )
        for run in runs
    }
    _refuse_to_change(plan, files)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    plan.write()
    return plan_table(plan)


def plan_table(plan: SweepPlan) -> str:
    """Every run, and what is to be said."""
    total = sum(run.flops for run in plan.runs)
    rows: list[Sequence[str]] = [HEADS]
    rows += [
        (
            run.name,
            f"{run.n_params:,}",
            f"{run.learning_rate:.2e}",
            f"{run.steps:,}",
            f"{run.tokens:,}",
            f"{run.tokens / run.n_params:.3g}",
            f"{run.flops:.3e}",
            f"{run.flops / total:.1%}",
            f"{run.epochs:,.2f}" + ("*" if run.epochs > plan.max_epochs else " "),
        )
        for run in plan.runs
    ]
    lines = [*columns(rows), "", f"{len(plan.runs)} runs, {total:.3e} FLOPs with recomputation, counted part by part"]
    lines += plan.remarks
    return "\n".join([*lines, f"start them: python tools/sweep.py run {shlex.quote(str(plan.directory))}"])


def _refuse_to_change(plan: SweepPlan, files: dict[Path, str]) -> None:
    if not (plan.directory / PLAN).exists():
        return
    before = read_plan(plan.directory)
    for run in before.runs:
        path = before.run_dir(run) / RUN_CONFIG
        same_start = (before.configs, before.working_directory) == (plan.configs, plan.working_directory)
        if has_begun(before.run_dir(run)) and not (same_start and path.exists() and files.get(path) == path.read_text()):
            raise ValueError(
                f"{plan.directory} has begun the run {run.name}, which this plan would change or leave out: "
                "give --out another directory"
            )
