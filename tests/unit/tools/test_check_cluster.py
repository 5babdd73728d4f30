"""The check as a command, in one process: what it says of the room that checkpoints have."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from mmar_megatron.cluster.checking import checkpoint_size
from mmar_megatron.config import parse_command_line
from tests.distributed.common import MODEL
from tests.unit.command_line import share_parser
from tools.check_cluster import main

Usage = namedtuple("Usage", "total used free")
Said = Callable[..., list[str]]


@pytest.fixture
def said(coarse_shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """What is said of the room of a run that keeps its last three checkpoints, of which some are there."""
    share_parser(monkeypatch)
    options = [*MODEL, "--data.path", str(coarse_shapes_dir), "--run_dir", str(tmp_path / "run"), "--checkpoint.keep_last", "3"]
    size = checkpoint_size(parse_command_line(options).config).num_bytes

    def of_room(*, room: float, there: list[str]) -> list[str]:
        """With room for so many checkpoints, beside those that are there."""
        for name in there:
            (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(room * size)))
        main(options)
        return [line for line in capsys.readouterr().out.splitlines() if "has room for" in line]

    return of_room


def test_a_run_that_begins_needs_room_for_those_it_keeps_and_the_next(said: Said) -> None:
    assert said(room=4, there=[]) == []
    (warning,) = said(room=3.9, there=[])
    assert warning.startswith("warning: ") and "the 4 further checkpoints that are kept take" in warning


def test_a_run_that_goes_on_needs_room_beside_those_that_are_there(said: Said) -> None:
    there = ["step_00000010", "step_00000020", "step_00000030.part"]  # the last one is none yet
    assert said(room=2, there=there) == []
    (warning,) = said(room=1.9, there=[])
    assert "the 2 further checkpoints that are kept take" in warning
    # The oldest of what is kept goes only when a new one is there.
    assert said(room=1, there=["step_00000030", "step_00000040"]) == []


def test_there_must_be_room_for_one_whatever_is_there(said: Said, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        said(room=0.9, there=[f"step_{step:08d}" for step in range(10, 60, 10)])
    out = capsys.readouterr().out
    assert "error: " in out and "but a checkpoint takes" in out
