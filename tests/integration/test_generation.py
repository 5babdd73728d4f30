"""Pictures for prompts, and texts for these pictures, by the commands as they are started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.distributed.common import make_data
from tests.unit.hf.checkpoints import STEP, make_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )


def test_paint_and_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "run", data=make_data(tmp_path / "shapes"))
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo small blue squares\n")
    options = ["--images", "2", "--rounds", "3", "--steps", "2", "--batch_size", "3"]
    files: list[str | Path] = ["--model", tmp_path / "run", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    made = run(ROOT / "tools" / "generate.py", *files, *options)
    assert made.stdout == f"{tmp_path}/out: 4 pictures of 2 prompts\n"
    assert made.stderr == ""
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        with Image.open(tmp_path / "out" / row["file"]) as picture:
            assert picture.size == (32, 32)
            assert json.loads(picture.info["Settings"]) == row
    assert [row["prompt"] for row in rows] == ["a red circle"] * 2 + ["two small blue squares"] * 2
    assert {row["step"] for row in rows} == {STEP}

    read = run(ROOT / "tools" / "caption.py", "--model", tmp_path / "run", tmp_path / "out", "--max_tokens", "4")
    assert [line.split("\t")[0] for line in read.stdout.splitlines()] == [f"{tmp_path}/out/{row['file']}" for row in rows]
    assert read.stderr == "read: 4 of 4 inputs\n"
