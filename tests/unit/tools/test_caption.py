"""The command line of `tools/caption.py`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmar_megatron.generation.texts import TextFile
from tests.unit.hf.checkpoints import make_checkpoint
from tools.caption import main


@pytest.fixture
def model(coarse_shapes_dir: Path, tmp_path: Path) -> list[str]:
    """The option that names it."""
    make_checkpoint(tmp_path / "run", "--data.sequence_length", "96", data=coarse_shapes_dir)
    return ["--model", str(tmp_path / "run"), "--max_tokens", "5"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A directory of four."""
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


def test_prints_a_line_for_each_picture(model: list[str], pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "1.png").write_bytes(b"")
    main([*model, str(pictures), "--question", "what?", "--skip_bad"])
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [f"{pictures}/{number}.png" for number in (0, 2, 3)]
    assert f"left out: {pictures}/1.png cannot be read as a picture" in err
    assert err.endswith("read: 3 of 4 inputs, 1 left out\n")
    with pytest.raises(SystemExit, match=r"error: .+1.png cannot be read as a picture"):
        main([*model, str(pictures)])


def test_a_stopped_command_goes_on(model: list[str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"images": ["pictures/0.png"]},
        {"images": ["pictures/1.png", "pictures/2.png"], "text": "<image> and <image>"},
        {"images": ["pictures/3.png"], "question": "where?"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    drawn = ["--temperature", "1.5", "--top_p", "0.9", "--batch_size", "2"]
    line = [*model, "--input", str(tmp_path / "in.jsonl"), *drawn, "--dtype", "bfloat16"]
    main([*line, "--out", str(tmp_path / "whole.jsonl")])

    add = TextFile.add

    def stops(file: TextFile, number: int, text: str) -> None:
        if number == 1:
            raise KeyboardInterrupt
        add(file, number, text)

    with monkeypatch.context() as patch:
        patch.setattr(TextFile, "add", stops)
        with pytest.raises(SystemExit, match="stopped: the same command goes on from here"):
            main([*line, "--out", str(tmp_path / "out.jsonl")])
    main([*line, "--out", str(tmp_path / "out.jsonl")])
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    written = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(row) for row in written] == [
        ["images", "text"],
        ["images", "text_before", "text"],
        ["images", "question", "text"],
    ]
    with pytest.raises(SystemExit, match=r"out.jsonl was begun with other settings \(batch_size was 2 and is 3\)"):
        main([*line, "--batch_size", "3", "--out", str(tmp_path / "out.jsonl")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give pictures, or else --input with a file that names them"),
        (["a.png", "--input", "b.jsonl"], "give pictures, or else --input"),
        (["a.png", "--batch_size", "0"], "--batch_size is 0"),
        (["a.png", "--top_p", "0.5"], "top_p changes nothing at temperature 0"),
        (["a.png"], "There is no checkpoint at none"),
    ],
)
def test_mistakes_end_in_one_sentence(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--model", "none", *options])
    assert str(raised.value.code).startswith(f"error: {message}")
