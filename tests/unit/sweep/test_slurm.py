"""The job's script: its words, and what it does under a shell."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mmar_megatron.sweep import journal
from mmar_megatron.sweep.slurm import script, submit
from tests.unit.sweep.sweeps import pretended, wait_until


def test_words(tmp_path: Path) -> None:
    plan = replace(
        pretended(tmp_path / "sweep", names=("a",)),
        slurm=["--nodes=2", "--time=24:00:00", "--signal=B:USR1@60"],
        setup=["module load x"],
    )
    lines = script(plan, [0, 1, 2, 5, 7, 8], jobs=4).splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert options[:3] == ["--array=0-2,5,7-8%4", f"--chdir={plan.directory}", f"--output={plan.directory}/slurm-%A_%a.log"]
    assert {"--nodes=2", "--time=24:00:00", "--signal=B:USR1@60", "--requeue", "--job-name=sweep-sweep"} <= set(options)
    assert len(options) == len({option.split("=")[0] for option in options})
    assert lines[0] == "#!/usr/bin/env bash" and "module load x" in lines
    assert "--array=3" in script(plan, [3], jobs=None).splitlines()[1]


def test_only_what_is_open_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pretended(tmp_path / "sweep", names=("a", "b", "c"), retries=0)
    journal.begin(plan.run_dir(plan.runs[1]))
    journal.end(plan.run_dir(plan.runs[1]), status=1, asked=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "is written, for 2 runs; where there is SLURM: sbatch" in submit(plan, jobs=None)
    assert "#SBATCH --array=0,2\n" in (plan.directory / "slurm.sh").read_text()

    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "Submitted $1"\n')
    sbatch.chmod(0o755)
    assert submit(plan, jobs=None) == f"2 runs: Submitted {plan.directory}/slurm.sh"
    sbatch.write_text("#!/bin/sh\necho no such partition >&2\nexit 1\n")
    with pytest.raises(ValueError, match=r"sbatch does not take .*: no such partition"):
        submit(plan, jobs=None)


def test_a_warned_job_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    """Under bash, with an scontrol that notes what it is asked for: warned before the time limit, then to the end."""
    plan = pretended(tmp_path / "sweep", names=("other", "a"), steps=60, step_s=0.05)
    scontrol, asked = tmp_path / "scontrol", tmp_path / "asked"
    scontrol.write_text(f'#!/bin/sh\necho "$*" >> {asked}\n')
    scontrol.chmod(0o755)
    path = tmp_path / "slurm.sh"
    path.write_text(script(plan, [1], jobs=None))
    job = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run_dir = plan.run_dir(plan.runs[1])

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(["bash", str(path)], env={**os.environ, **job})

    process = start()
    wait_until(lambda: journal.read_state(run_dir, steps=60, retries=1).step >= 2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 75
    assert asked.read_text() == "requeue 12_1\n"
    state = journal.read_state(run_dir, steps=60, retries=1)
    assert state.condition == "stopped" and 2 <= state.step < 60

    assert start().wait(timeout=60) == 0
    assert journal.read_state(run_dir, steps=60, retries=1).condition == "done"
    assert asked.read_text() == "requeue 12_1\n"
