"""A short trial by chaos: a run that is killed, told to stop and given damaged checkpoints is the undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmar_megatron.chaos.damage import KINDS

ROOT = Path(__file__).resolve().parents[2]


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
    assert report["damages"] == report["fallbacks"] == dict.fromkeys(KINDS, 1)
    assert report["steps_compared"] == 60
