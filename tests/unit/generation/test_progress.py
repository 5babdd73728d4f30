"""What is told of the way, on a terminal and elsewhere."""

from __future__ import annotations

import sys
import time

import pytest

from mmar_megatron.generation.progress import Progress


@pytest.mark.parametrize(
    ("live", "told"),
    [
        (False, "4 of 10 pictures, 33 s left\n7 of 10 pictures, 24 s left\n"),
        (
            True,
            "\r3 of 10 pictures, 14 s left\033[K\r4 of 10 pictures, 33 s left\033[K\r7 of 10 pictures, 24 s left\033[K\r\033[K",
        ),
    ],
)
def test_pictures_and_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], live: bool, told: str) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: live)
    progress = Progress(10, done=2, what="pictures")
    for seconds, done in ((2.0, 3.0), (2.3, 3.5), (15.0, 4.5), (15.2, 5.0), (40.0, 7.0)):
        now = 100.0 + seconds
        progress.at(done)
    progress.close()
    assert capsys.readouterr().err == told
