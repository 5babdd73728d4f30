"""`run` on this machine: a queue that keeps so many runs going. It remembers nothing that is not in the runs' files.

Each run is trained under a process of its own (`attempt.py`), in its own session. So where the queue is killed, what it has
started goes on, and the next queue finds that by its locks, waits for it, and starts the rest.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from mmar_megatron.scaling.tables import duration
from mmar_megatron.sweep import journal
from mmar_megatron.sweep.attempt import DONE, FAILED, HELD, STOPPED
from mmar_megatron.sweep.records import ROOT, PlannedRun, SweepPlan

POLL_S = 0.5
TAIL = 8
"""Lines of a failed run's log that are shown."""


@dataclass
class _Active:
    """A run that this queue has started."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    slot: int
    began: float = field(default_factory=time.monotonic)


def run_queue(plan: SweepPlan, *, jobs: int, gpus_per_run: int, say: Callable[[str], None]) -> int:
    """Trains all runs that are neither done nor failed, `jobs` at a time; the exit status, as of a single run.

    Args:
        gpus_per_run: each run sees as many of the machine's, and no other; 0: all of them.
    """
    waiting = [run for run in plan.runs if _state(plan, run).condition not in ("done", "failed")]
    say(f"{len(waiting)} of {len(plan.runs)} runs are to be trained, {jobs} at a time")
    active: list[_Active] = []
    waits_for: set[str] = set()
    with _signals() as asked:
        while active or (waiting and not asked):
            for each in [each for each in active if each.process.poll() is not None]:
                active.remove(each)
                waiting += _ended(plan, each, say=say)
            if asked:
                if active and not asked[0]:
                    say(f"asks {len(active)} runs to save and stop")
                    asked[0] = True
                    for each in active:
                        each.process.terminate()
            else:
                _start(plan, waiting, active, jobs=jobs, gpus_per_run=gpus_per_run, waits_for=waits_for, say=say)
            time.sleep(POLL_S)
    return _summary(plan, say=say)


def retry_failed(plan: SweepPlan) -> None:
    """Gives each run that has failed as many tries again."""
    for run in plan.runs:
        if _state(plan, run).condition == "failed":
            journal.forgive(plan.run_dir(run))


def open_commands(plan: SweepPlan) -> list[str]:
    """Of each run that is neither done nor failed nor under way, one line of shell, for another scheduler.

    What is started so takes no lock, and is not retried.
    """
    waiting = [run for run in plan.runs if _state(plan, run).condition in ("waiting", "stopped")]
    return [f"cd {shlex.quote(plan.working_directory)} && {shlex.join(plan.command(run))}" for run in waiting]


def _start(
    plan: SweepPlan,
    waiting: list[PlannedRun],
    active: list[_Active],
    *,
    jobs: int,
    gpus_per_run: int,
    waits_for: set[str],
    say: Callable[[str], None],
) -> None:
    """As many runs as there are places; runs of another queue on this machine take places too."""
    mine = {each.run.name for each in active}
    held = {run.name for run in plan.runs if run.name not in mine and journal.is_held(plan.run_dir(run))}
    for run in [run for run in waiting if run.name in held and run.name not in waits_for]:
        waits_for.add(run.name)
        state = _state(plan, run)
        say(f"{run.name} is trained already, by process {state.pid} of {state.host}: waits for it")
    places = jobs - len(active) - sum(_state(plan, run).host == socket.gethostname() for run in plan.runs if run.name in held)
    for run in [run for run in waiting if run.name not in held][: max(0, places)]:
        waiting.remove(run)
        state = _state(plan, run)
        if state.condition in ("done", "failed"):  # by whoever had it
            say(f"{run.name} is {state.condition}")
            continue
        slot = min(set(range(jobs)) - {each.slot for each in active})
        say(
            f"{run.name} is "
            + (f"continued from step {journal.checkpoint_step(plan.run_dir(run))}" if state.attempts else "started")
        )
        active.append(_Active(run, _spawn(plan, run, slot=slot, gpus=gpus_per_run), slot))


def _spawn(plan: SweepPlan, run: PlannedRun, *, slot: int, gpus: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(slot * gpus, (slot + 1) * gpus)))
    words = [sys.executable, "-m", "mmar_megatron.sweep.attempt", str(plan.directory), run.name]
    # Not the queue's own output: what outlives it must not hold a pipe open.
    with (plan.run_dir(run) / journal.LOG).open("ab") as log:
        return subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _ended(plan: SweepPlan, ended: _Active, *, say: Callable[[str], None]) -> list[PlannedRun]:
    """Says how; what is to wait for its turn again."""
    run, status = ended.run, ended.process.returncode
    state = _state(plan, run)
    took = duration(time.monotonic() - ended.began)
    if status == DONE:
        say(f"{run.name} is done, after {took}")
    elif status == FAILED:
        say(failure(plan, run))
    elif status == STOPPED:
        step = journal.checkpoint_step(plan.run_dir(run))
        say(f"{run.name} was stopped at step {step} of {run.steps}; the next `run` goes on with it")
    elif status == HELD or state.condition == "running":
        return [run]
    else:
        say(f"{run.name}: what started it ended with status {status}; the next `run` goes on with it")
    return []


def failure(plan: SweepPlan, run: PlannedRun) -> str:
    """Of a failed run: how it ended, and its last lines."""
    state = _state(plan, run)
    log = plan.run_dir(run) / journal.LOG
    head = f"{run.name} has failed {state.failures} times, the last time with status {state.status}; {log} ends with"
    return "\n".join([head, *(f"    {line}" for line in journal.log_tail(plan.run_dir(run), lines=TAIL))])


def _summary(plan: SweepPlan, *, say: Callable[[str], None]) -> int:
    conditions = [_state(plan, run).condition for run in plan.runs]
    done, failed = conditions.count("done"), conditions.count("failed")
    others = {"have failed": failed, "are trained by another queue's processes": conditions.count("running")}
    said = (f", {count} {what}" for what, count in others.items() if count)
    say(f"{done} of {len(conditions)} runs are done" + "".join(said))
    if done + failed < len(conditions):
        return STOPPED
    return FAILED if failed else DONE


def _state(plan: SweepPlan, run: PlannedRun) -> journal.RunState:
    return journal.read_state(plan.run_dir(run), steps=run.steps, retries=plan.retries)


@contextmanager
def _signals() -> Iterator[list[bool]]:
    """Not empty once the queue was told to stop; what it holds is whether that was passed on."""
    asked: list[bool] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(False)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
