"""Programs that stand in for those of a cluster, in a folder that goes first in PATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]

SRUN = """
import contextlib, os, signal, subprocess, sys, time
import psutil
words = sys.argv[1:]
nodes = int(words[words.index("--nodes") + 1])
command = words[words.index("bash"):]
tasks = []
for node in range(nodes):
    step = {"SLURM_STEP_ID": "0", "SLURM_NODEID": str(node), "SLURM_STEP_NUM_NODES": str(nodes)}
    step |= {"SLURM_STEP_NUM_TASKS": str(nodes), "SLURM_STEP_NODELIST": "n[0-9]"}
    tasks.append(subprocess.Popen(command, env=os.environ | step, start_new_session=True))

def tell_everyone(number):  # every process of the step; one that has just ended needs no telling
    for task in (task for task in tasks if task.poll() is None):
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(task.pid)
            for process in (*first.children(recursive=True), first):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

signal.signal(signal.SIGUSR1, lambda number, frame: tell_everyone(number))
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):  # --kill-on-bad-exit
        tell_everyone(signal.SIGKILL)
    time.sleep(0.05)
sys.exit(max(task.wait() for task in tasks))
"""
"""One task on each of its nodes, which are all this machine."""

SCONTROL = """
import os, sys
if sys.argv[1] == "show":
    print("127.0.0.1\\nsecond\\nthird")
else:
    with open(os.environ["REQUEUED"], "a") as file:
        print(*sys.argv[1:], file=file)
"""


def stand_in(folder: Path, name: str, program: str) -> None:
    """A program of that name, in Python."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)


def environment(folder: Path, **settings: Any) -> dict[str, str]:
    """With the stand-ins first, and nothing of a scheduler that may have started the tests."""
    ours = ("SLURM_", "NNODES", "NPROC", "NODE_RANK", "MASTER_", "STAGE", "INIT_FROM", "SETUP", "CHECK", "LOG_DIR", "RANK")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**inherited, "PATH": path, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in settings.items()}}


def job(nodes: int, *, number: int = 4242) -> dict[str, Any]:
    """What SLURM says to a batch script."""
    return {
        **{"SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": nodes, "SLURM_NNODES": nodes, "SLURM_PROCID": 0},
        **{"SLURM_SUBMIT_DIR": ROOT, "SLURM_GPUS_ON_NODE": 8},
    }


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """srun and scontrol, and a torchrun and a python that say what they are asked for."""
    folder = tmp_path / "bin"
    stand_in(folder, "srun", SRUN)
    stand_in(folder, "scontrol", SCONTROL)
    # In one write: several tasks say it into one pipe.
    said = "import os, sys; os.write(1, (' '.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + chr(10)).encode()); "
    asked = said + "exec(os.environ.get('{}', ''))"
    stand_in(folder, "torchrun", asked.format("TORCHRUN"))
    stand_in(folder, "python", asked.format("PYTHON"))
    return folder
