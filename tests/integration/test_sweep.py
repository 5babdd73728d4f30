"""A sweep of real trainings: planned, killed with all its processes, and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import yaml

from mmar_megatron.sweep import journal
from mmar_megatron.sweep.records import ROOT, read_plan
from tests.distributed.common import make_data
from tests.unit.sweep.sweeps import tiny_options, wait_until

SWEEP = [sys.executable, str(ROOT / "tools" / "sweep.py")]


def test_plan_run_kill_run_status(tmp_path: Path) -> None:
    data = make_data(tmp_path / "shapes")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**tiny_options(), "preview": {"every": 0}}))
    spec = {
        "configs": [str(tmp_path / "base.yaml")],
        "family": {"widths": [16, 32], "head_size": 8, "width_per_layer": 16},
        "budgets": [5e9],
        "min_steps": 10,
        "sizes_per_budget": 2,
        "learning_rate": {"value": 3e-3, "width": 32},
        "checkpoints": 5,
        "options": {"data": {"path": str(data)}, "train": {"log_every": 1}, "validation": {"samples": 16}},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    sweep = tmp_path / "sweep"
    words = ["plan", str(tmp_path / "spec.yaml"), "--out", str(sweep)]
    table = subprocess.run([*SWEEP, *words], env=environment, capture_output=True, text=True, check=True).stdout
    plan = read_plan(sweep)
    small, large = plan.runs
    assert small.name in table and large.name in table and 10 <= large.steps < small.steps

    def state(name: str) -> journal.RunState:
        run = plan.find(name)
        return journal.read_state(plan.run_dir(run), steps=run.steps, retries=plan.retries)

    queue = subprocess.Popen([*SWEEP, "run", str(sweep)], env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: journal.checkpoint_step(plan.run_dir(small)), seconds=120)
    finally:
        processes = [queue.pid, *(child.pid for child in psutil.Process(queue.pid).children(recursive=True))]
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        queue.wait()
    wait_until(lambda: not journal.is_held(plan.run_dir(small)))
    assert (state(small.name).condition, state(large.name).condition) == ("stopped", "waiting"), "killed in the middle"

    words = ["run", str(sweep), "--jobs", "2"]
    said = subprocess.run([*SWEEP, *words], env=environment, capture_output=True, text=True, check=True).stdout
    assert (
        "2 of 2 runs are done" in said and f"{small.name} is continued from step" in said and f"{large.name} is started" in said
    )
    for run in plan.runs:
        logged = state(run.name)
        assert (logged.condition, logged.attempts) == ("done", 2 if run == small else 1)
        assert [row["step"] for row in logged.metrics] == list(range(1, run.steps + 1)), "each step once"
        assert abs(logged.metrics[-1]["consumed_tokens"] / run.tokens - 1) < 0.02, "as planned"
        assert {"val_loss_text", "val_loss_image"} <= logged.metrics[-1].keys()
    assert "continues" in (plan.run_dir(small) / journal.LOG).read_text()
    shown = subprocess.run([*SWEEP, "status", str(sweep)], env=environment, capture_output=True, text=True, check=True).stdout
    assert "2 done of 2 runs; 100.0% of the FLOPs are done" in shown
