"""The check of a job's machines, by two processes that pose as two nodes, with faults that are really there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.common import MODEL, make_data
from tests.distributed.launch import GroupFailed, run_group

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("cluster") / "shapes")


def errors(found: dict[str, Any]) -> list[str]:
    return [finding for finding in found["findings"] if finding.startswith("error")]


def test_two_nodes_with_one_fault_after_another(data: Path, tmp_path: Path) -> None:
    run_dir, empty = tmp_path / "runs" / "x", tmp_path / "empty"
    run_dir.parent.mkdir()
    empty.mkdir()
    output = run_group("tests.distributed.cluster_worker", str(data), str(run_dir), str(empty), nproc=2, timeout=240)
    found: dict[str, Any] = {}
    for line in output.splitlines():
        found |= json.loads(line)

    good = found["good"]
    assert good["passed"] and good["findings"][0].startswith("warning: no node has a GPU")
    clocks, rate = good["measured"]
    assert clocks.startswith("clocks within 0.") and "a checkpoint takes 0.001 GB" in clocks
    assert rate.startswith("a sum of 4 MiB over all ranks goes at ")
    assert all(each["left"] == [] for each in found.values()), "the run directory is not made, nor anything left in it"

    assert found["clock"]["passed"]
    assert any(
        "s ahead of node 0" in each and each.startswith("warning: the clock of node 1") for each in found["clock"]["findings"]
    )
    (wrong,) = errors(found["sum"])
    assert wrong.startswith("error: a sum over all ranks is wrong on GPU 0 of node 1 (") and not found["sum"]["passed"]
    (elsewhere,) = errors(found["elsewhere"])
    assert (
        elsewhere.startswith("error: on node 1 (")
        and f"{empty}/second does not show what the first node writes there" in elsewhere
    )
    flex = errors(found["flex"])
    assert len(flex) == 1 and flex[0].startswith("error: model.attention flex needs a GPU"), "said once, not by each rank"
    assert any("index.json is not there on node 1" in each for each in errors(found["no data"]))
    assert any("a checkpoint takes " in each and "choose another run_dir" in each for each in errors(found["no room"]))
    assert len(errors(found["no plan"])) == 1 and "nowhere" in errors(found["no plan"])[0]
    (apex,) = errors(found["apex"])
    assert apex.startswith("error: node 1 (") and "a package named apex (0.9, Pyramid toolkit)" in apex
    assert not found["apex"]["passed"] and len(found["apex"]["measured"]) == 1, "GPUs are not tried where something is wrong"


def test_as_a_command(data: Path, tmp_path: Path) -> None:
    """What is found is said, and the exit status tells of it."""
    options = [*MODEL, "--data.path", str(tmp_path / "nowhere"), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(
        GroupFailed, match=r"(?s)exit status 1.*nodes: 1, processes: 2; .*error: .*nowhere/index.json is not there"
    ):
        run_group("tools/check_cluster.py", *options, nproc=2, timeout=120)
