"""The queue, with trainings that are pretended; tests/integration/test_sweep.py has real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from mmar_megatron.sweep import journal, queueing
from mmar_megatron.sweep.attempt import DONE, FAILED, STOPPED
from mmar_megatron.sweep.queueing import open_commands, retry_failed, run_queue
from mmar_megatron.sweep.records import ROOT, SweepPlan, read_plan
from mmar_megatron.sweep.status import status
from tests.unit.sweep.sweeps import pretended, wait_until

NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queueing, "POLL_S", 0.02)


def states(plan: SweepPlan) -> dict[str, journal.RunState]:
    return {run.name: journal.read_state(plan.run_dir(run), steps=run.steps, retries=plan.retries) for run in plan.runs}


def conditions(plan: SweepPlan) -> list[str]:
    return [state.condition for state in states(plan).values()]


def train(plan: SweepPlan, *, jobs: int = 3) -> tuple[int, str]:
    said: list[str] = []
    return run_queue(plan, jobs=jobs, gpus_per_run=0, say=said.append), "\n".join(said)


@contextmanager
def queue_process(plan: SweepPlan, *, jobs: int) -> Iterator[subprocess.Popen[str]]:
    """The command; what it leaves behind is killed."""
    words = [sys.executable, str(ROOT / "tools" / "sweep.py"), "run", str(plan.directory), "--jobs", str(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for left in trainings(plan):
            with suppress(psutil.NoSuchProcess):
                left.kill()


def trainings(plan: SweepPlan) -> list[psutil.Process]:
    """All processes of the sweep but the queue: those that attend to a run, and the trainings."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if str(plan.directory) in " ".join(words) and "run" not in words:
                found.append(process)
    return found


def test_all_are_trained_and_a_second_time_nothing_is(tmp_path: Path) -> None:
    plan = pretended(tmp_path / "sweep", names=NAMES)
    result, said = train(plan, jobs=2)
    assert result == DONE and "3 of 3 runs are done" in said
    assert conditions(plan) == ["done"] * 3
    assert [state.attempts for state in states(plan).values()] == [1, 1, 1]
    assert train(plan)[1].startswith("0 of 3 runs are to be trained")
    assert open_commands(plan) == []
    # A run whose last checkpoint is lost is not done, whatever its journal says.
    (plan.run_dir(plan.runs[0]) / "checkpoints" / "step_00000004" / "manifest.json").unlink()
    assert conditions(plan) == ["stopped", "done", "done"]


def test_a_failing_run_is_tried_again_then_marked_and_others_go_on(tmp_path: Path) -> None:
    plan = pretended(tmp_path / "sweep", names=NAMES, retries=2)
    flag = plan.directory / "FAIL-b"
    flag.touch()
    result, said = train(plan, jobs=1)
    assert result == FAILED and conditions(plan) == ["done", "failed", "done"]
    failed = states(plan)["b"]
    assert (failed.attempts, failed.failures, failed.status) == (3, 3, 3)
    assert "b has failed 3 times, the last time with status 3" in said and "    the reason of the failure" in said
    assert "    the reason of the failure" in status(plan)
    assert train(plan)[0] == FAILED and states(plan)["b"].attempts == 3, "it stays marked"
    assert open_commands(plan) == []

    flag.unlink()
    retry_failed(plan)
    assert train(plan)[0] == DONE
    assert states(plan)["b"].attempts == 4


def test_failures_are_counted_anew_where_a_run_gets_further(tmp_path: Path) -> None:
    plan = pretended(tmp_path / "sweep", names=("a",), retries=1)
    run_dir = plan.run_dir(plan.runs[0])
    for step, count in ((0, 1), (2, 1), (2, 2)):
        if step:
            (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
            (run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").touch()
        journal.begin(run_dir)
        journal.end(run_dir, status=1, asked=False)
        assert journal.failures(run_dir) == count
    assert conditions(plan) == ["failed"]


def test_a_torn_line_of_the_journal_is_passed_over(tmp_path: Path) -> None:
    plan = pretended(tmp_path / "sweep", names=("a",), retries=1)
    run_dir = plan.run_dir(plan.runs[0])
    journal.begin(run_dir)
    with (run_dir / journal.ATTEMPTS).open("a") as file:
        file.write('{"event": "en')
    assert conditions(plan) == ["stopped"]
    journal.begin(run_dir)
    assert states(plan)["a"].attempts == 2


def test_a_killed_queue_loses_nothing(tmp_path: Path) -> None:
    """SIGKILL of the queue, of one run's attendant too, and of another's attendant and training."""
    plan = pretended(tmp_path / "sweep", names=NAMES, steps=60, step_s=0.05)
    with queue_process(plan, jobs=3) as queue:
        wait_until(lambda: all(state.step >= 2 for state in states(plan).values()))
        queue.kill()
        queue.communicate(timeout=2)  # whose output nobody holds open
        a, b, c = (states(plan)[name].pid for name in NAMES)
        assert a and b and c
        os.kill(b, signal.SIGKILL)
        os.killpg(c, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(c))
        wait_until(lambda: conditions(plan) == ["running", "running", "stopped"])
        result, said = train(plan, jobs=3)
    assert result == DONE, said
    assert f"a is trained already, by process {a}" in said and "b is trained already" in said and "c is continued" in said
    assert [state.attempts for state in states(plan).values()] == [1, 1, 2]
    for state in states(plan).values():
        assert [row["step"] for row in state.metrics] == list(range(1, 61)), "every step once"


def test_two_queues_do_not_train_the_same_run(tmp_path: Path) -> None:
    plan = pretended(tmp_path / "sweep", names=NAMES, steps=20, step_s=0.05)
    with queue_process(plan, jobs=2), queue_process(plan, jobs=2):
        wait_until(lambda: conditions(plan) == ["done"] * 3)
    assert [state.attempts for state in states(plan).values()] == [1, 1, 1]
    for state in states(plan).values():
        assert [row["step"] for row in state.metrics] == list(range(1, 21))


@pytest.mark.parametrize("stops_with", [0, 1])
def test_a_signal_stops_all_and_the_next_run_goes_on(tmp_path: Path, stops_with: int) -> None:
    """Also under torchrun, which ends with status 1 however well its processes end."""
    plan = pretended(tmp_path / "sweep", names=NAMES, steps=30, step_s=0.05, stops_with=stops_with)
    with queue_process(plan, jobs=2) as queue:
        wait_until(lambda: states(plan)["a"].step >= 2 and states(plan)["b"].step >= 2)
        queue.terminate()
        said, _ = queue.communicate(timeout=30)
        assert queue.returncode == STOPPED and "asks 2 runs to save and stop" in said
        assert trainings(plan) == []
    assert conditions(plan) == ["stopped", "stopped", "waiting"]
    assert [state.failures for state in states(plan).values()] == [0, 0, 0]
    assert len(open_commands(plan)) == 3
    assert open_commands(plan)[0].endswith(f"--config {plan.run_dir(plan.runs[0])}/run.yaml")
    assert train(plan)[0] == DONE


def test_gpus_are_dealt_out(tmp_path: Path) -> None:
    plan = pretended(tmp_path / "sweep", names=("a", "b"))
    trainer = plan.directory / "trainer.py"
    trainer.write_text(
        trainer.read_text().replace("import yaml\n", 'import yaml\nprint("sees", os.environ["CUDA_VISIBLE_DEVICES"])\n')
    )
    run_queue(plan, jobs=2, gpus_per_run=2, say=lambda _: None)
    seen = {run.name: (plan.run_dir(run) / journal.LOG).read_text() for run in plan.runs}
    assert "sees 0,1\n" in seen["a"] and "sees 2,3\n" in seen["b"]


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no plan.json: make it with `python tools/sweep.py plan"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="not a plan of this version"):
        read_plan(tmp_path)
