"""The directory of pictures goes on after the last whole one, and takes no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmar_megatron.generation.files import MANIFEST, Folder, record_of

PIXELS = np.zeros((4, 4, 3), dtype=np.uint8)


def records(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [{"file": f"{k}.png", "prompt": f"猫 {k}", "steps": 3, "model": "a", "version": "1", **changes} for k in range(count)]


def fill(path: Path, wanted: list[dict[str, Any]], *, stop: int | None = None) -> int:
    """Adds those that are missing, up to `stop`; the number of those that were there."""
    with Folder(path, records=wanted) as folder:
        for record in wanted[folder.done : stop]:
            folder.add(PIXELS, record=record)
        return folder.done


def test_goes_on_after_the_last_whole_picture(tmp_path: Path) -> None:
    assert fill(tmp_path / "out", records(5), stop=3) == 0
    assert fill(tmp_path / "out", records(5)) == 3
    assert fill(tmp_path / "out", records(5, model="moved", version="2")) == 5
    lines = (tmp_path / "out" / MANIFEST).read_text().splitlines()
    assert [json.loads(line) for line in lines] == records(5)
    assert record_of(tmp_path / "out" / "4.png") == records(5)[4]
    assert fill(tmp_path / "out", records(7)) == 5  # more prompts at the end


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_a_torn_line_is_written_anew(tmp_path: Path, kept: float) -> None:
    fill(tmp_path, records(3))
    *lines, last = (tmp_path / MANIFEST).read_bytes().splitlines(keepends=True)
    (tmp_path / MANIFEST).write_bytes(b"".join(lines) + last[: int(kept * (len(last) - 1))])
    assert fill(tmp_path, records(3)) == 2
    assert len((tmp_path / MANIFEST).read_text().splitlines()) == 3


def test_a_missing_picture_is_painted_anew(tmp_path: Path) -> None:
    fill(tmp_path, records(3))
    (tmp_path / "1.png").unlink()
    assert fill(tmp_path, records(3)) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.png", "1.png", "2.png", MANIFEST]


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    fill(tmp_path, records(2))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"0.png was painted with other settings \(steps was 3 and is 4, vary was None and is 0.5"
    ):
        fill(tmp_path, records(2, steps=4, vary=0.5))
    with pytest.raises(ValueError, match="has 2 pictures, and 1 are asked for"):
        fill(tmp_path, records(1))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", ["my notes", "no JSON\n", "[1]\n", '{"mine": 1}\n'])
def test_a_foreign_file_stays_as_it_is(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"choose another --out|other settings \(mine was 1 and is None"):
        Folder(tmp_path, records=records(1))
    assert (tmp_path / MANIFEST).read_text() == content


def test_two_processes_do_not_paint_into_one_directory(tmp_path: Path) -> None:
    with Folder(tmp_path, records=records(1)), pytest.raises(ValueError, match="another process writes"):
        Folder(tmp_path, records=records(1))
