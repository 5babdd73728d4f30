"""Benchmarks measure what they say, in any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmar_megatron.benchmarks.timing import WARM_UP, in_turn, ratio
from tests.distributed.common import MODEL
from tests.distributed.launch import run_group


def test_actions_take_turns_and_are_all_timed() -> None:
    done: list[str] = []
    seconds = in_turn([lambda: done.append("a"), lambda: done.append("b")], rounds=4, after=lambda: done.append("-"))
    assert [len(of_action) for of_action in seconds] == [4, 4]
    assert "".join(done[2 * 2 * WARM_UP :]) == "a-b-b-a-a-b-b-a-"


def test_ratio_is_that_within_a_round() -> None:
    """A machine that slows down to a hundredth in the middle changes nothing."""
    found = ratio([2.0, 2.2, 200.0, 220.0], [1.0, 1.1, 100.0, 110.0])
    assert found == {"ratio": 2.0, "ratio_quartiles": [2.0, 2.0]}


@pytest.mark.distributed
def test_both_kinds(coarse_shapes_dir: Path, tmp_path: Path) -> None:
    options = ["--rounds", "2", *MODEL, "--data.path", str(coarse_shapes_dir)]
    step = ["step", "--variant", "--optimizer.ema_decay 0.9", *options]
    found = json.loads(run_group("tools/benchmark.py", *step, nproc=1).splitlines()[-1])
    assert found["variant"] == "--optimizer.ema_decay 0.9"
    assert found["step_s"] > 0
    assert found["ratio_quartiles"][0] <= found["ratio"] <= found["ratio_quartiles"][1]

    save = ["save", "--directory", str(tmp_path), *options]
    (line,) = [line for line in run_group("tools/benchmark.py", *save, nproc=2).splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert found["bytes"] > 1_000_000
    assert min(found[name] for name in ("foreground_s", "background_s", "verify_s")) > 0
    assert list(tmp_path.iterdir()) == []
