"""What is told of the way, on a terminal and elsewhere."""

from __future__ import annotations

import sys
import time

import pytest

from mmar_megatron.progress import Progress

AFTER_8 = "4 of 4,000 pictures, 18.8 a minute, 3:33:06 left"
AFTER_13 = "28 of 4,000 pictures, 2 a second, 33:06 left"


@pytest.mark.parametrize(
    ("live", "told"),
    [
        (False, f"{AFTER_8}\n{AFTER_13}\n"),
        (
            True,
            "\r2 of 4,000 pictures\033[K\r3 of 4,000 pictures, 30.0 a minute, 2:13:14 left\033[K"
            f"\r{AFTER_8}\033[K\r{AFTER_13}\033[K\r\033[K",
        ),
    ],
)
def test_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], live: bool, told: str) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: live)
    progress = Progress.on_stderr(4000, done=2, what="pictures")
    for seconds, done in ((0.6, 2.0), (2.0, 3.0), (2.3, 3.5), (8.0, 4.5), (8.2, 5.0)):
        now = 100.0 + seconds
        progress.at(done)
    now = 113.0
    progress.add(23)
    progress.close()
    assert capsys.readouterr().err == told
