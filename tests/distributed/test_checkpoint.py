"""Checkpoints hold everything, and any layout goes on from any other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.common import make_data
from tests.distributed.launch import run_group
from tests.distributed.test_layouts import INTERLEAVED, PP2, SP, TP2

WORKER = Path(__file__).with_name("checkpoint_worker.py")
# Several gradient buckets: megatron-core loses its place among them (engine/optimizer.py).
BUCKETS = ["--parallel.overlap_grad_reduce", "true", "--parallel.grad_bucket_size", "5000"]
LAYOUTS = {
    "DP2 buckets": BUCKETS,
    "TP2 SP": [*TP2, *SP],
    "PP2": PP2,
    "PP2 interleaved": INTERLEAVED,
    "PP2 split 0 4": [*PP2, "--parallel.pipeline_split", "[0, 4]"],
    "PP2 interleaved split 0 2 2 0": [*INTERLEAVED, "--parallel.pipeline_split", "[0, 2, 2, 0]"],
    "DP2": [],
    "DP2 overlap": [*BUCKETS, "--parallel.overlap_param_gather", "true"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the worker found, layout by layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    data = make_data(folder / "shapes")
    output = run_group(WORKER, str(data), str(folder), json.dumps(LAYOUTS), nproc=2, timeout=240)
    return {k: v for line in output.splitlines() if line.startswith("{") for k, v in json.loads(line).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_loaded_is_what_was_saved(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[name]["tensors"] > 100
    assert results[name]["different"] == 0


@pytest.mark.distributed
def test_ranks_that_see_other_storage_are_told_so(results: dict[str, Any]) -> None:
    """A missing mount is no damage, and nothing is set aside for it."""
    of_checkpoint, of_path, of_run = results["other storage"]
    assert "Rank 1 finds the checkpoint" in of_checkpoint
    assert "(manifest.json is missing) and rank 0 does not: see that all machines have the same storage" in of_checkpoint
    assert of_path == of_checkpoint
    assert "Rank 1 sees no checkpoint in" in of_run


@pytest.mark.distributed
@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_another_layouts_checkpoint_goes_on(name: str, results: dict[str, dict[str, Any]]) -> None:
    expected = results["DP2 buckets"]["third"]
    assert results[name]["third"] == pytest.approx(expected, rel=1e-5)
    assert results[name]["average"] == pytest.approx(results["DP2 buckets"]["average"], rel=1e-6)
