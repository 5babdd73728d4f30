"""One run of a sweep, until it is done, fails for good, or is told to stop.

    python -m mmar_megatron.sweep.attempt DIR NAME      # or its number in the plan

This is what the local queue and SLURM start. It holds the run's lock, hands it down to the training, writes down how each attempt
ends, and tries again. SIGTERM, SIGINT and SIGUSR1 have the training save and stop.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from mmar_megatron.sweep import journal
from mmar_megatron.sweep.records import PlannedRun, SweepPlan, read_plan

DONE, FAILED, STOPPED, HELD = 0, 1, 75, 76
"""Exit statuses. STOPPED: the same command goes on. HELD: someone else trains it."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class _Attempt:
    """The training that is under way, and whether it was told to stop."""

    def __init__(self) -> None:
        self.asked = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def run(self, plan: SweepPlan, run: PlannedRun, *, lock: int) -> int:
        """Exit status of one attempt."""
        run_dir = plan.run_dir(run)
        # torchrun gives its processes this long to save after a signal.
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120", **os.environ}
        with (run_dir / journal.LOG).open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}: {run.name} is started\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                plan.command(run),
                cwd=plan.working_directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
            )
        if self.asked:  # between the last look and the start
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


def attend(plan: SweepPlan, run: PlannedRun) -> int:
    """Trains a run; the exit status."""
    run_dir = plan.run_dir(run)
    attempt = _Attempt()
    with journal.locked(run_dir) as lock:
        if lock is None:
            return HELD
        while not journal.is_done(run_dir, steps=run.steps):
            if journal.failures(run_dir) > plan.retries:
                return FAILED
            if attempt.asked:
                return STOPPED
            journal.begin(run_dir)
            try:
                status = attempt.run(plan, run, lock=lock)
            except OSError as error:
                with (run_dir / journal.LOG).open("a") as log:
                    log.write(f"error: {error}\n")
                status = 127
            journal.end(run_dir, status=status, asked=attempt.asked)
            if status == 0 and not journal.is_done(run_dir, steps=run.steps):
                return STOPPED
    return DONE


def main(argv: list[str]) -> None:
    """Exits with one of the statuses above; 2 for a mistake."""
    if len(argv) != 2:
        sys.exit("usage: python -m mmar_megatron.sweep.attempt DIR NAME")
    try:
        plan = read_plan(Path(argv[0]))
        run = plan.find(argv[1])
        status = attend(plan, run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
