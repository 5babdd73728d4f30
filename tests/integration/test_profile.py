"""`train.profile` through the whole command: on each stage of a pipeline, also of a run that goes on within the steps."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.common import MODEL, make_data
from tests.distributed.launch import run_group
from tests.distributed.test_layouts import PP2

STEPS = [*("--train.steps", "4", "--validation.every", "0", "--preview.every", "0"), *("--checkpoint.every", "2", *PP2)]


@pytest.mark.distributed
def test_each_stage_has_a_trace_and_a_table(tmp_path: Path) -> None:
    data = make_data(tmp_path / "shapes")
    run_dir = tmp_path / "run"
    arguments = ["pretrain_mmar.py", *MODEL, *STEPS, "--data.path", str(data), "--run_dir", str(run_dir)]
    run_group(*arguments, "--train.profile", "2:3", nproc=2, timeout=240)
    assert traces(run_dir) == ["steps_00000002-00000003_rank_00000", "steps_00000002-00000003_rank_00001"]
    first, last = (table(run_dir, trace) for trace in traces(run_dir))
    # Work is where it is done, and both stages send and receive.
    assert {"data", "embedding", "attention", "linears", "communication", "optimizer"} <= first.keys()
    assert {"data", "attention", "linears", "logits", "head", "communication", "optimizer"} <= last.keys()
    assert "head" not in first and "embedding" not in last

    shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
    shutil.rmtree(run_dir / "profile")
    output = run_group(*arguments, "--train.profile", "2:4", nproc=2, timeout=240)
    assert "at step 2" in output
    assert traces(run_dir) == ["steps_00000003-00000004_rank_00000", "steps_00000003-00000004_rank_00001"]


def traces(run_dir: Path) -> list[str]:
    names = sorted(path.name.removesuffix(".json.gz") for path in (run_dir / "profile").glob("*.json.gz"))
    for name in names:
        with gzip.open(run_dir / "profile" / f"{name}.json.gz") as file:
            assert json.load(file)["traceEvents"]
    return names


def table(run_dir: Path, name: str) -> dict[str, float]:
    """Milliseconds by part."""
    lines = (run_dir / "profile" / f"{name}.txt").read_text().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines[3:]}
