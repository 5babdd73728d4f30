"""`run --slurm`: one array job, a task for each run that is not done."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby

from mmar_megatron.sweep import journal
from mmar_megatron.sweep.attempt import STOPPED
from mmar_megatron.sweep.records import ROOT, SweepPlan, write_whole

SCRIPT = "slurm.sh"
_DEFAULTS = ("--open-mode=append", "--requeue", "--signal=B:USR1@300")
"""Where the specification says nothing else; the signal leaves five minutes to save before the time limit."""


def submit(plan: SweepPlan, *, jobs: int | None) -> str:
    """Writes the script and, where sbatch is there, submits it; what is to be said.

    Args:
        jobs: at a time; none: as many as the cluster likes.

    Raises:
        ValueError: there is nothing to be trained, or sbatch refuses.
    """
    states = [journal.read_state(plan.run_dir(run), steps=run.steps, retries=plan.retries) for run in plan.runs]
    numbers = [number for number, state in enumerate(states) if state.condition in ("waiting", "stopped")]
    if not numbers:
        raise ValueError(f"{plan.directory} has no run that could be started: see `python tools/sweep.py status`")
    path = plan.directory / SCRIPT
    write_whole(path, script(plan, numbers, jobs=jobs))
    words = ["sbatch", str(path)]
    if shutil.which("sbatch") is None:
        return f"{path} is written, for {len(numbers)} runs; where there is SLURM: {shlex.join(words)}"
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sbatch does not take {path}: {done.stderr.strip()}")
    return f"{len(numbers)} runs: {done.stdout.strip()}"


def script(plan: SweepPlan, numbers: Sequence[int], *, jobs: int | None) -> str:
    """For these runs, by their numbers in the plan."""
    array = _ranges(numbers) + (f"%{jobs}" if jobs else "")
    output = plan.directory / "slurm-%A_%a.log"
    # The first of one name counts.
    options = [f"--array={array}", f"--chdir={plan.working_directory}", f"--output={output}", *plan.slurm]
    options += [f"--job-name=sweep-{plan.directory.name}", *_DEFAULTS]
    named = {option.partition("=")[0]: option for option in reversed(options)}
    attempt = shlex.join([sys.executable, "-m", "mmar_megatron.sweep.attempt", str(plan.directory)])
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {option}" for option in reversed(named.values())),
            "",
            "# Written by tools/sweep.py run --slurm. A run goes on by itself; one that has to stop is put back into the queue.",
            "set -u",
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            *plan.setup,
            f'{attempt} "$SLURM_ARRAY_TASK_ID" & attempt=$!',
            "asked=0",
            "trap 'asked=1; kill -USR1 \"$attempt\"' USR1 TERM",
            'wait "$attempt"; status=$?',
            "# A signal ends `wait`, not what it waits for.",
            'while ((asked)); do asked=0; wait "$attempt"; status=$?; done',
            f'if ((status == {STOPPED})); then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; fi',
            'exit "$status"',
            "",
        ]
    )


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> 0-2,5."""
    pieces = []
    for _, group in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        pieces.append(f"{members[0]}" if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(pieces)
