"""Sweeps whose trainings are pretended: a script that writes what the trainer would."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mmar_megatron.sweep.records import RUN_CONFIG, PlannedRun, SweepPlan
from mmar_megatron.sweep.shapes import Options
from tests.distributed.common import MODEL

TRAINER = """\
import json, os, signal, sys, time
import yaml
values = yaml.safe_load(open(sys.argv[-1]))
run_dir, steps = values["run_dir"], values["train"]["steps"]
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
metrics = os.path.join(run_dir, "metrics.jsonl")
step = len(open(metrics).readlines()) if os.path.exists(metrics) else 0
print("continues at step", step, flush=True)
while step < steps and not asked:
    if os.path.exists(values["fails_while"]) and step >= values["fails_at"]:
        print("the reason of the failure", flush=True)
        sys.exit(3)
    time.sleep(values["step_s"])
    step += 1
    with open(metrics, "a") as file:
        row = {"step": step, "consumed_tokens": 7 * step, "step_time_s": 2.0, "val_loss_text": 1.5, "val_loss_image": 0.5}
        file.write(json.dumps(row) + "\\n")
    checkpoint = os.path.join(run_dir, "checkpoints", f"step_{step:08d}")
    os.makedirs(checkpoint)
    open(os.path.join(checkpoint, "manifest.json"), "w").close()
if step < steps:
    sys.exit(values["stops_with"])
"""


def pretended(
    directory: Path,
    *,
    names: tuple[str, ...],
    steps: int = 4,
    step_s: float = 0.02,
    fails_at: int = 0,
    stops_with: int = 0,
    retries: int = 1,
) -> SweepPlan:
    """A sweep of these runs.

    Args:
        fails_at: a step at which a run fails while there is a file FAIL-NAME in the sweep's directory.
        stops_with: exit status of a training that was told to stop.
    """
    directory.mkdir(exist_ok=True)
    trainer = directory / "trainer.py"
    trainer.write_text(TRAINER)
    plan = SweepPlan(
        directory=directory,
        configs=[],
        launch=[sys.executable, str(trainer)],
        working_directory=str(directory),
        retries=retries,
        max_epochs=4.0,
        slurm=[],
        setup=[],
        remarks=[],
        runs=[planned(name, steps=steps) for name in names],
    )
    plan.write()
    for run in plan.runs:
        plan.run_dir(run).mkdir(parents=True)
        values = {"run_dir": str(plan.run_dir(run)), "train": {"steps": steps}, "step_s": step_s}
        values |= {"fails_while": str(directory / f"FAIL-{run.name}"), "fails_at": fails_at, "stops_with": stops_with}
        (plan.run_dir(run) / RUN_CONFIG).write_text(yaml.safe_dump(values))
    return plan


def planned(name: str, *, steps: int, budget: float = 1e12, n_params: int = 1000) -> PlannedRun:
    return PlannedRun(
        name=name,
        budget=budget,
        shape=name,
        seed=1,
        n_params=n_params,
        steps=steps,
        tokens=7 * steps,
        flops=round(budget),
        learning_rate=1e-3,
        epochs=1.0,
    )


def tiny_options() -> Options:
    """`tests.distributed.common.MODEL` as a configuration file has it."""
    values: dict[str, Any] = {}
    for option, word in zip(MODEL[::2], MODEL[1::2], strict=True):
        *sections, name = option.removeprefix("--").split(".")
        inside = values
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[name] = float(word) if "e" in word else yaml.safe_load(word)
    return values


def wait_until(condition: Callable[[], object], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
