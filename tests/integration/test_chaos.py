"""A short trial by chaos: a run that is killed, told to stop and given damaged checkpoints is the undisturbed one.

And a trial sees what is wrong with runs that are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmar_megatron.chaos.damage import KINDS

ROOT = Path(__file__).resolve().parents[2]
SEEN = {
    # what the toy does wrong: what the trial must say of it
    "nothing": "[]",
    "forgets": "step 11 has total",
    "skips a row": "step 14 is missing",
    "is silent": "(flipped bit) was not reported",
    "deletes": "1 damaged checkpoints were deleted",
    "writes in place": "step_00000010 is not whole",
    "is deaf": "SIGTERM ended the ranks with [-15] instead of 0",
    "leaves a helper": "1 processes outlived the ranks that had started them",
    "outlives": "rank 0 did not end by itself",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the trials of all toys say; they mostly sleep, so they run at once."""
    environment, root = os.environ | {"PYTHONPATH": str(ROOT)}, tmp_path_factory.mktemp("toys")
    trials = {
        sin: subprocess.Popen(
            [sys.executable, str(ROOT / "tests/integration/toy_chaos.py"), str(root / sin), sin],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for sin in SEEN
    }
    return {sin: trial.communicate(timeout=120)[0] for sin, trial in trials.items()}


@pytest.mark.parametrize("sin", SEEN)
def test_what_is_wrong_is_seen(sin: str, found: dict[str, str]) -> None:
    assert SEEN[sin] in found[sin]


@pytest.mark.distributed
def test_short_trial(tmp_path: Path) -> None:
    command = [sys.executable, "tools/chaos.py", "--out", str(tmp_path / "chaos"), "--kills", "6"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads((tmp_path / "chaos" / "report.json").read_text())
    assert report["passed"]
    assert sum(report["kills"].values()) == 6
    assert report["signals"] == {"SIGTERM": 1, "SIGUSR1": 1}
    assert report["stops_cut_short"] == 1
    assert report["damages"] == report["fallbacks"] == dict.fromkeys(KINDS, 1)
    assert report["steps_compared"] == 60
