"""The table, and the time left, of runs whose files are written here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mmar_megatron.scaling.tables import duration
from mmar_megatron.sweep import journal
from mmar_megatron.sweep.records import PlannedRun, SweepPlan
from mmar_megatron.sweep.status import status, sweep_seconds_left
from tests.unit.sweep.sweeps import pretended


def log(plan: SweepPlan, run: PlannedRun, *, steps: int, **columns: Any) -> None:
    rows = ({"step": step, "step_time_s": 2.0, **columns} for step in range(1, steps + 1))
    (plan.run_dir(run) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def finish(plan: SweepPlan, run: PlannedRun) -> None:
    checkpoint = plan.run_dir(run) / "checkpoints" / f"step_{run.steps:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()


def test_table_and_time_left(tmp_path: Path) -> None:
    plan = pretended(tmp_path / "sweep", names=("a", "b", "c", "d", "e"), steps=100, retries=0)
    a, b, c, d, _ = plan.runs
    log(plan, a, steps=100, val_loss_text=1.25, val_loss_image=None)
    finish(plan, a)
    log(plan, b, steps=25)
    journal.begin(plan.run_dir(b))
    log(plan, c, steps=50)
    journal.begin(plan.run_dir(c))
    journal.begin(plan.run_dir(d))
    journal.end(plan.run_dir(d), status=-9, asked=False)
    (plan.run_dir(d) / journal.LOG).write_text("".join(f"line {k}\n" for k in range(100)))
    with journal.locked(plan.run_dir(b)) as lock:
        assert lock is not None
        lines = status(plan).splitlines()
        states = [journal.read_state(plan.run_dir(run), steps=run.steps, retries=0) for run in plan.runs]
        with journal.locked(plan.run_dir(c)) as other:
            assert other is not None
            both = [journal.read_state(plan.run_dir(run), steps=run.steps, retries=0) for run in plan.runs]
    cells = [re.split(r" {2,}", line) for line in lines]
    assert cells[0] == ["run", "state", "step", "of", "done", "attempts", "val_loss_text", "val_loss_image", "left"]
    assert cells[1] == ["a", "done", "100", "100", "100%", "0", "1.2500"]
    assert cells[2] == ["b", "running", "25", "100", "25%", "1", "2:30"]
    assert cells[3] == ["c", "stopped", "50", "100", "50%", "1"]
    assert cells[4] == ["d", "failed", "0", "100", "0%", "1, 1 failed"]
    assert cells[5] == ["e", "waiting", "0", "100", "0%", "0"]
    # One at a time: 75 steps of b, 50 of c, 100 of e, of 2 s each.
    assert lines[7] == (
        "1 done, 1 failed, 1 running, 1 stopped, 1 waiting of 5 runs; 35.0% of the FLOPs are done, about 7:30 left at this pace"
    )
    assert sweep_seconds_left(plan, states) == 450 and sweep_seconds_left(plan, both) == 225
    assert "with status -9" in lines[8] and lines[-1] == "    line 99" and "    line 91" not in lines


def test_nothing_is_known_before_it_begins(tmp_path: Path) -> None:
    plan = pretended(tmp_path / "sweep", names=("a", "b"))
    assert status(plan).splitlines()[-1] == "2 waiting of 2 runs; 0.0% of the FLOPs are done"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (5, 125, 3725, 3600 * 51)] == ["0:05", "2:05", "1:02:05", "2 d 3 h"]
