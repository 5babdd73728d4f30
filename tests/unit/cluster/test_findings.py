"""What is said of machines that are not as they should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmar_megatron.cluster.facts import Facts, collect, wrong_apex
from mmar_megatron.cluster.findings import Needs, of_clocks, of_machines, of_room

H100 = "NVIDIA H100 80GB HBM3"
NEEDS = Needs(
    transformer_engine=False,
    tensor_parallel=True,
    loader_processes=True,
    run_dir="runs/x",
    checkpoint_bytes=200 * 10**9,
    kept_checkpoints=4,
)


def machine(node: int, **changes: object) -> Facts:
    facts = Facts(
        node=node,
        host=f"h{node}",
        local_rank=0,
        processes=8,
        versions={"torch": "2.13.0", "NCCL": "2.28", "transformer_engine": "2.11.0"},
        driver="580.1",
        gpus=(H100,) * 8,
        gpu_used_bytes=2**29,
        reorders_launches=False,
        wrong_apex=None,
        open_files=65536,
        shared_memory_bytes=2**36,
        sizes={"data/a/index.json": 123},
    )
    return replace(facts, **changes)  # type: ignore[arg-type]


def said(*machines: Facts, needs: Needs = NEEDS) -> list[str]:
    return [str(finding) for finding in of_machines(machines, needs=needs)]


def test_nothing_is_said_of_good_machines() -> None:
    assert said(machine(0), machine(1), replace(machine(1), local_rank=1)) == []


@pytest.mark.parametrize(
    ("changes", "start", "fix"),
    [
        (
            {"versions": {"torch": "2.13.0", "NCCL": "2.27", "transformer_engine": "2.11.0"}},
            "error: NCCL differs, 2.28 on",
            "same",
        ),
        ({"driver": "570.0"}, "warning: the GPUs' driver differs, 580.1 on node 0 (h0), 570.0 on node 1 (h1)", "on one"),
        ({"wrong_apex": "0.9, Pyramid"}, "error: node 1 (h1) has a package named apex (0.9, Pyramid)", "pip uninstall apex"),
        ({"gpus": ()}, "error: torch 2.13.0 cannot use the GPUs of node 1 (h1)", "driver 580.1"),
        ({"gpus": (), "driver": None}, "error: node 1 (h1) has no GPU, but others have", "leave it out"),
        ({"gpus": (H100,) * 7}, "error: node 1 (h1) has 7 GPUs for 8 processes", "set NPROC to 7"),
        ({"processes": 4}, "warning: node 1 (h1) has 8 GPUs, of which 4 stay idle", "raise NPROC"),
        ({"gpus": ("NVIDIA A100-SXM4-80GB",) * 8}, f"error: the GPUs are not alike, {H100} on node 0 (h0), NVIDIA A100", "kind"),
        ({"gpu_used_bytes": 40 * 2**30}, "error: GPU 0 of node 1 (h1) has 40.0 GiB in use by other processes", "end those"),
        ({"reorders_launches": True}, "warning: CUDA_DEVICE_MAX_CONNECTIONS is not 1", "export it"),
        ({"open_files": 1024}, "warning: a process on node 1 (h1) may open 1024 files", "ulimit -n"),
        ({"shared_memory_bytes": 2**26}, "warning: /dev/shm of node 1 (h1) has 64 MiB", "--shm-size"),
        ({"sizes": {"data/a/index.json": None}}, "error: data/a/index.json is not there on node 1 (h1)", "storage that all"),
        ({"sizes": {"data/a/index.json": 9}}, "error: data/a/index.json differs, 123 bytes on node 0 (h0), 9 bytes on", "share"),
    ],
)
def test_one_machine_that_is_otherwise(changes: dict[str, object], start: str, fix: str) -> None:
    sentences = [sentence for sentence in said(machine(0), machine(1, **changes)) if sentence.startswith(start)]
    assert len(sentences) == 1 and fix in sentences[0] and "\n" not in sentences[0]


def test_all_machines() -> None:
    without = {"torch": "2.13.0", "transformer_engine": "not installed"}
    many = [machine(node, gpus=(), driver=None, versions=without, sizes={"vae": None}) for node in range(6)]
    assert said(*many) == [
        "warning: no node has a GPU, so the run will be on CPUs: if that is not meant, ask the scheduler for GPUs",
        "error: vae is not there: make it, or change the option that names it",
    ]
    (needed, *_) = said(*many, needs=replace(NEEDS, transformer_engine=True))
    assert (
        needed.startswith("error: the model's layers are of Transformer Engine, which node 0 (h0), ")
        and "and 2 more lacks" in needed
    )


def test_clocks_and_room() -> None:
    ranks = [machine(0), machine(1), machine(2)]
    (one,) = of_clocks([0.0, 1.5, -30.0], ranks=ranks)
    assert str(one).startswith("warning: the clock of node 2 (h2) is 30.0 s behind node 0 (h0)'s: ")
    assert of_room(800 * 10**9, needs=NEEDS) == []
    (one,) = of_room(799 * 10**9, needs=NEEDS)
    assert one.severity == "warning" and "the 4 further checkpoints that are kept take 800.0 GB" in one.text
    (one,) = of_room(199 * 10**9, needs=NEEDS)
    assert one.severity == "error" and "a checkpoint takes 200.0 GB" in one.text


@pytest.mark.parametrize(
    ("summary", "wrong"),
    [
        ("PyTorch Extensions written by NVIDIA", None),
        ("Pyramid toolkit to add Velruse", "0.9.10dev, Pyramid toolkit to add Velruse"),
    ],
)
def test_the_wrong_apex_is_told_by_its_metadata(
    summary: str, wrong: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong_apex() is None
    information = tmp_path / "apex-0.9.10.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10dev\nSummary: {summary}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert wrong_apex() == wrong


def test_facts_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("12345")
    facts = collect([str(tmp_path), str(tmp_path / "file"), str(tmp_path / "nothing")])
    assert list(facts.sizes.values()) == [0, 5, None]
    assert facts.versions["torch"] and facts.open_files > 0 and facts.shared_memory_bytes > 0
