"""What examples/launch.sh asks of torchrun and SLURM, which are stand-ins here."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.unit.examples.clusters import ROOT, environment, job, programs, stand_in
from tests.unit.sweep.sweeps import wait_until

__all__ = ["programs"]
SCRIPT = "examples/pretrain_mmar_13b.sh"


def run(programs: Path, *words: str, script: str | Path = SCRIPT, **settings: Any) -> subprocess.CompletedProcess[str]:
    settings = {"INIT_FROM": "scratch", "REQUEUED": programs / "requeued", **settings}
    command = ["bash", str(script), *words]
    return subprocess.run(
        command, env=environment(programs, **settings), cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def started(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_node(programs: Path, tmp_path: Path) -> None:
    check, train = started(run(programs, "--train.steps", "7", "--run_dir", str(tmp_path / "run")))
    configs = [f"examples/configs/{name}.yaml" for name in ("mmar_13b", "data_stage1", "stage1")]
    options = " ".join(f"--config {path}" for path in configs)
    options += f" --run_dir runs/mmar_13b_stage1 --train.steps 7 --run_dir {tmp_path}/run"
    assert check.startswith("torchrun --standalone --nproc-per-node 8 ") and check.endswith(f" tools/check_cluster.py {options}")
    assert train.endswith(f" pretrain_mmar.py {options}")
    assert "--redirects 3 --tee 7:3 --signals-to-handle SIGTERM,SIGINT,SIGUSR1" in train
    assert re.search(rf"--log-dir {tmp_path}/run-logs/node_0/\d+-\d+ ", train)


def test_the_run_directory_may_be_in_a_configuration_file(programs: Path) -> None:
    says = "sys.argv[-1] == '--print_config' and print('engine: native', 'run_dir: runs/of_file', sep=chr(10))"
    _, train = started(run(programs, "--config", "my.yaml", script="examples/launch.sh", NPROC=2, PYTHON=says))
    assert " --log-dir runs/of_file-logs/node_0/" in train


def test_a_node_of_several(programs: Path) -> None:
    place: dict[str, Any] = {"NNODES": 4, "NODE_RANK": 2, "MASTER_ADDR": "first", "NPROC": 4, "CHECK": 0, "LOG_DIR": "here"}
    (train,) = started(run(programs, **place))
    assert train.startswith(
        "torchrun --nnodes 4 --node-rank 2 --master-addr first --master-port 29500 --nproc-per-node 4 --redirects 3 --tee 4:3 "
    )
    assert "--log-dir here/node_2/" in train
    (last,) = started(run(programs, **{**place, "NODE_RANK": 3}))
    assert "--tee 3:3" in last, "the last rank speaks"


def test_a_failed_check_ends_the_start(programs: Path) -> None:
    for nodes, settings in ((1, {}), (1, job(1)), (2, job(2))):
        done = run(programs, TORCHRUN="sys.exit(1)", **settings)
        assert done.returncode == 1 and done.stdout.count("tools/check_cluster.py") <= nodes
        assert "pretrain_mmar.py" not in done.stdout


def test_settings(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text("export NCCL_SOCKET_IFNAME=ib0\n")
    names = ["CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS"]
    say = f"import resource; print([os.environ[n] for n in {names}], len(set(resource.getrlimit(resource.RLIMIT_NOFILE))))"
    settings: dict[str, Any] = {"CHECK": 0, "SETUP": tmp_path / "site.sh", "TORCHRUN": say, "OMP_NUM_THREADS": 2}
    settings["NCCL_DEBUG"] = "INFO"
    assert started(run(programs, **settings))[1] == "['1', 'expandable_segments:True', 'INFO', 'ib0', '2'] 1"


def test_stages_and_first_weights(programs: Path, tmp_path: Path) -> None:
    (train,) = started(run(programs, STAGE=2, INIT_FROM=tmp_path, CHECK=0))
    assert "data_stage2.yaml --config examples/configs/stage2.yaml --" in train and "--run_dir runs/mmar_13b_stage2" in train
    assert f"--checkpoint.init_from {tmp_path} " in train
    for settings, said in (
        (
            {"STAGE": 2, "INIT_FROM": ""},
            "error: runs/mmar_13b_stage1, the weights to begin with, is not there: make it by STAGE=1, or",
        ),
        ({"INIT_FROM": ""}, "error: models/mmar_13b, the weights to begin with, is not there: make it by tools/convert_ckpt.py"),
        ({"INIT_FROM": "nowhere"}, "error: nowhere, the weights to begin with, is not there"),
        ({"STAGE": 3}, "error: STAGE is 3, but must be 1 or 2."),
        ({"NNODES": 2, "NODE_RANK": 0}, "error: NNODES is 2: give each node its NODE_RANK (0 to 1), and all MASTER_ADDR"),
    ):
        done = run(programs, **settings)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith(said) and done.stderr.count("\n") == 1
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    started(run(programs, "--run_dir", str(tmp_path / "run"), INIT_FROM="nowhere", CHECK=0))  # which goes on without them


def test_a_plan_starts_nothing(programs: Path) -> None:
    say = "print(os.environ['RANK'], os.environ['WORLD_SIZE'])"
    (asked, world) = started(run(programs, "--dry_run", NNODES=128, INIT_FROM="nowhere", PYTHON=say))
    assert asked.startswith("python pretrain_mmar.py") and world == "0 1024"
    assert started(run(programs, "--dry_run", NNODES=2, PYTHON=say, **job(64)))[1] == "0 16"


def test_tiny(programs: Path) -> None:
    tiny = "examples/pretrain_mmar_tiny.sh"
    assert started(run(programs, "--train.steps", "3", script=tiny, STAGE=2)) == [
        "python pretrain_mmar.py --config examples/configs/tiny.yaml --config examples/configs/tiny_stage2.yaml --train.steps 3"
    ]
    (train,) = started(run(programs, script=tiny, NPROC=2, CHECK=0))
    assert "--nproc-per-node 2" in train and "--log-dir runs/launch-logs/node_0/" in train


# --- SLURM ----------------------------------------------------------------------------------------------------------------------


def test_a_job(programs: Path, tmp_path: Path) -> None:
    """sbatch runs a copy of the script in a folder of its own; the tasks meet on the first node of the list."""
    copy = Path(shutil.copy(ROOT / SCRIPT, tmp_path / "slurm_script"))
    lines = started(run(programs, script=copy, CHECK=0, **job(2, number=1_204_242)))
    assert len(lines) == 2 and not (programs / "requeued").exists()
    for node, line in enumerate(sorted(lines)):
        assert line.startswith(
            f"torchrun --nnodes 2 --node-rank {node} --master-addr 127.0.0.1 --master-port 24242 --nproc-per-node 8 "
        )
        assert re.search(rf"--log-dir runs/mmar_13b_stage1-logs/node_{node}/\d+-\d+-job1204242 ", line)


def test_srun_by_hand(programs: Path) -> None:
    step: dict[str, Any] = {"SLURM_STEP_ID": 1, "SLURM_NODEID": 1, "SLURM_STEP_NUM_NODES": 3, "SLURM_STEP_NODELIST": "n"}
    (train,) = started(run(programs, CHECK=0, **job(8), **step, SLURM_STEP_NUM_TASKS=3))
    assert train.startswith("torchrun --nnodes 3 --node-rank 1 --master-addr 127.0.0.1 ")
    done = run(programs, **job(8), **step, SLURM_STEP_NUM_TASKS=24)
    assert done.returncode == 1 and done.stderr.startswith("error: srun has 24 tasks on 3 nodes")
    # The shell that salloc gives is a step too, of a number beyond all others.
    shell = {**step, "SLURM_STEP_ID": 0xFFFFFFFA}
    assert len(started(run(programs, CHECK=0, **{**job(2), **shell}, SLURM_STEP_NUM_TASKS=1))) == 2


def test_a_failed_job_goes_back_into_the_queue_if_it_has_got_on(programs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    save = "os.makedirs(os.path.join(os.environ['WHERE'], 'checkpoints', 'step_00000010'), exist_ok=True); sys.exit(3)"
    for expected in ("requeue 77\n", "requeue 77\n"):  # the second time there is nothing new
        stand_in(programs, "srun", f"import os, sys; {save}")
        done = run(programs, "--run_dir", str(run_dir), WHERE=run_dir, **job(2, number=77))
        assert done.returncode == 3 and (programs / "requeued").read_text() == expected
    stand_in(programs, "srun", "")
    assert run(programs, "--run_dir", str(run_dir), **job(2, number=77)).returncode == 0
    assert (programs / "requeued").read_text() == "requeue 77\n"


def test_signals_to_a_job(programs: Path, tmp_path: Path) -> None:
    """A warning is passed on and the job put back; a preemption is left to SLURM, and the end of the tasks waited for."""
    program = "import os, signal, sys, time; touch = lambda name: open(os.environ[name], 'w').close(); "
    program += "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(touch('TOLD'))); touch('READY'); time.sleep(3)"
    stand_in(programs, "srun", program)
    for number, expected in ((signal.SIGUSR1, "requeue 78\n"), (signal.SIGTERM, "")):
        ready, told, requeued = (tmp_path / f"{name}{number}" for name in ("ready", "told", "requeued"))
        requeued.touch()
        settings = {"INIT_FROM": "scratch", "READY": ready, "TOLD": told, "REQUEUED": requeued, **job(2, number=78)}
        process = subprocess.Popen(["bash", str(ROOT / SCRIPT)], env=environment(programs, **settings))
        wait_until(ready.exists)
        process.send_signal(number)
        assert process.wait(timeout=30) == 0 and requeued.read_text() == expected
        assert told.exists() == (number == signal.SIGUSR1)
