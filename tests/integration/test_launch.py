"""The launch scripts as commands: a plan for a thousand GPUs; a run that two nodes begin and a SLURM job continues."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.data.vae import VAECodec
from tests.distributed.common import make_data
from tests.distributed.launch import end_processes
from tests.unit.data.autoencoders import make_autoencoder
from tests.unit.examples.clusters import ROOT, SCONTROL, SRUN, environment, job, stand_in
from tests.unit.sweep.sweeps import tiny_options, wait_until


def test_a_plan_for_a_thousand_gpus(tmp_path: Path) -> None:
    """With small data and an auto-encoder of the right shape; the vocabulary is padded to Llama's."""
    make_autoencoder(tmp_path / "vae")
    codec = VAECodec(tmp_path / "vae", image_size=256, patch_size=2)
    make_shapes(tmp_path / "shapes", codec=codec, train=24, validation=2, vocab_size=300, log=lambda _: None)
    data: dict[str, Any] = {"sources": {"capfusion": {"path": str(tmp_path / "shapes")}}, "tokenizer": None}
    data["codec"] = {"path": str(tmp_path / "vae")}
    local = tmp_path / "local.yaml"
    local.write_text(yaml.safe_dump({"data": data, "model": {"make_vocab_size_divisible_by": 32000}}))
    command = ["bash", "examples/pretrain_mmar_13b.sh", "--config", str(local), "--dry_run"]
    said = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path, NNODES=128), capture_output=True, text=True, check=True, timeout=240
    ).stdout
    assert said.startswith("TP 4 x PP 1 x DP 256 = 1,024 processes, bf16\n")
    words = said.split()
    assert 13.3e9 < int(words[words.index("parameters") + 1].replace(",", "")) < 13.5e9
    assert "FLOPs of a step" in said and "GiB" in said


@pytest.mark.distributed
@pytest.mark.timeout(600)  # four groups of processes, each of which starts for many seconds
def test_two_nodes_then_a_job_that_is_warned_and_put_back(tmp_path: Path) -> None:
    data, run_dir, requeued = make_data(tmp_path / "shapes"), tmp_path / "run", tmp_path / "requeued"
    values: dict[str, Any] = {**tiny_options()}
    values["data"] |= {
        "path": str(data),
        "sources": {},
        "tokenizer": None,
        "codec": {**values["data"]["codec"], "kind": "patch", "path": None},
    }
    values |= {"preview": {"every": 0}, "validation": {"every": 0}}
    # What the model of the launcher has and the tiny one has not.
    values["model"]["backbone"]["add_qkv_bias"] = False
    values["data"] |= {"packing": False, "num_workers": 0}
    values["precision"], values["checkpoint"] = {"dtype": "fp32"}, {"every": 2, "keep_every": 0, "keep_last": 2}
    values["train"] |= {"log_every": 1}
    local = tmp_path / "local.yaml"
    local.write_text(yaml.safe_dump(values))
    programs = tmp_path / "bin"
    stand_in(programs, "srun", SRUN)
    stand_in(programs, "scontrol", SCONTROL)
    port = free_port()
    tag = f"tests-{tmp_path.name}-{os.getpid()}"
    common: dict[str, Any] = {
        **{"NPROC": 1, "INIT_FROM": "scratch", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1},
        **{"REQUEUED": requeued, "TAG": tag, "LOG_DIR": tmp_path / "logs"},
    }

    def start(name: str, *options: str, **settings: Any) -> subprocess.Popen[bytes]:
        words = ["--config", str(local), "--run_dir", str(run_dir), *options]
        with (tmp_path / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                ["bash", str(ROOT / "examples" / "pretrain_mmar_0.5b.sh"), *words],
                env=environment(programs, **{**common, **settings}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said(name: str) -> str:
        return (tmp_path / f"{name}.log").read_text()

    try:
        place = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        nodes = [start(f"node{rank}", "--train.steps", "3", NODE_RANK=rank, **place) for rank in (0, 1)]
        assert [node.wait(timeout=200) for node in nodes] == [0, 0], said("node1")
        assert "clocks within" in said("node1") and "GB/s on each" in said("node1")
        assert f"{run_dir} stands at step 3" in said("node1") and "step 3" not in said("node0"), "the last rank speaks"

        slurm = {**job(2, number=port - 20000), "CHECK": 0}
        warned = start("warned", "--train.steps", "5000", **slurm)
        wait_until(lambda: len(steps(run_dir)) >= 5, seconds=120)
        warned.send_signal(signal.SIGUSR1)
        assert warned.wait(timeout=100) == 0, said("warned")
        assert requeued.read_text() == f"requeue {port - 20000}\n"
        assert f"continues {run_dir}/checkpoints/step_00000003 at step 3" in said("warned")
        last = steps(run_dir)[-1]
        assert f"SIGUSR1: {run_dir} stands at step {last}; the same command goes on from there" in said("warned")
        assert (run_dir / "checkpoints" / f"step_{last:08d}" / "manifest.json").exists()
        assert steps(run_dir) == list(range(1, last + 1)), "each step once"
        ranks = {path.relative_to(tmp_path / "logs").parts[0] for path in (tmp_path / "logs").rglob("stderr.log")}
        assert ranks == {"node_0", "node_1"}
    finally:
        end_processes(f"TAG={tag}")


def steps(run_dir: Path) -> list[int]:
    """That are logged, but for a line that is being written."""
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line)["step"] for line in lines]


def free_port() -> int:
    """Among those that the launcher gives to jobs."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")
