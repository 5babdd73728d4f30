"""A run under DeepSpeed by the commands as they are typed: its launcher, torchrun, another stage; and where the weights go."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from mmar_megatron.training.metrics import read_metrics
from tests.distributed.common import MODEL, make_data
from tests.distributed.launch import ROOT, end_processes, run_group
from tools.convert_ckpt import main as convert

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def by_deepspeed(*options: str) -> str:
    """What `deepspeed --num_gpus 2 pretrain_mmar.py` prints; it leaves no process behind."""
    tag = uuid.uuid4().hex
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_addr", "127.0.0.1"]
    environment = {
        **os.environ,
        **{"MMAR_TEST_ZERO": tag, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    try:
        ran = subprocess.run(
            [*launcher, "--master_port", str(free_port()), "pretrain_mmar.py", *options],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    finally:
        end_processes(f"MMAR_TEST_ZERO={tag}")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def alone(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "pretrain_mmar.py", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_run_from_launcher_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    options = [
        *(*MODEL, "--data.path", str(make_data(tmp_path / "shapes")), "--run_dir", str(run_dir), "--validation.every", "2"),
        *("--validation.samples", "8", "--preview.images", "2", "--preview.rounds", "2", "--preview.sampling_steps", "2"),
        *("--preview.every", "2", "--train.log_every", "1"),
    ]
    ours = ["--engine", "deepspeed"]
    said = by_deepspeed(*options, *ours, "--deepspeed.zero_stage", "3", "--train.steps", "2")
    assert f"{run_dir} stands at step 2" in said
    assert (run_dir / "previews" / "step_00000002.png").is_file()

    said = run_group("pretrain_mmar.py", *options, *ours, "--deepspeed.zero_stage", "2", "--train.steps", "4", nproc=2)
    assert "deepspeed.zero_stage: 3 -> 2" in said
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2, 3, 4]
    assert all("val_loss_image" in row for row in read_metrics(run_dir)[1::2])

    by_itself = alone(*options, *ours, "--train.steps", "5")  # without a launcher
    assert by_itself.returncode == 0, by_itself.stderr
    assert f"{run_dir} stands at step 5" in by_itself.stdout
    refused = alone(*options, "--train.steps", "6")
    assert refused.returncode == 1
    assert "has the optimizer's state of the engine deepspeed: continue with --engine deepspeed, or" in refused.stderr
    taken = alone(*options, "--train.steps", "1", "--checkpoint.init_from", str(run_dir), "--run_dir", str(tmp_path / "native"))
    assert taken.returncode == 0, taken.stderr
    assert "tensors loaded\n" in taken.stdout  # none is new, none unused

    convert(["to-hf", "--checkpoint", str(run_dir), "--out", str(tmp_path / "hf")])
    capsys.readouterr()
    convert(["verify", "--checkpoint", str(run_dir), "--hf", str(tmp_path / "hf")])
    compared = re.search(r"(\d+) tensors compared, (\d+) equal to the bit", capsys.readouterr().out)
    assert compared is not None
    assert compared[1] == compared[2]
