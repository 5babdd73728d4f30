"""The command line of `tools/generate.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from mmar_megatron.diffusion import SamplerKind
from mmar_megatron.diffusion.painting import GuidanceSchedule, Order
from mmar_megatron.generation import painting
from mmar_megatron.generation.files import Folder
from tests.unit.hf.checkpoints import make_checkpoint
from tools.generate import build_parser, main

QUICK = ["--rounds", "2", "--steps", "2"]


@pytest.fixture
def model(coarse_shapes_dir: Path, tmp_path: Path) -> list[str]:
    """The option that names it."""
    make_checkpoint(tmp_path / "run", data=coarse_shapes_dir, average=True)
    return ["--model", str(tmp_path / "run")]


def pictures_in(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_stopped_command_goes_on(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle", "id": "x"}\n{"prompt": "two", "seed": 3}\n')
    line = [*model, "--prompts", str(tmp_path / "prompts.jsonl"), "--images", "3", "--batch_size", "2", *QUICK, "--ema"]
    main([*line, "--out", str(tmp_path / "whole"), "--grid"])

    add = Folder.add

    def stops(folder: Folder, pixels: np.ndarray, *, record: dict[str, object]) -> None:
        if record["file"] == "000001-1.png":
            raise KeyboardInterrupt
        add(folder, pixels, record=record)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "add", stops)
        with pytest.raises(SystemExit) as raised:
            main([*line, "--out", str(tmp_path / "out")])
    assert raised.value.code == "stopped: the same command goes on from here"
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in pictures_in(tmp_path / "out")}
    assert len(before) == 5

    capsys.readouterr()
    main([*line, "--out", str(tmp_path / "out"), "--grid"])
    assert capsys.readouterr().out == f"{tmp_path}/out: 6 pictures of 2 prompts, 4 of them before\n"
    assert pictures_in(tmp_path / "out") == pictures_in(tmp_path / "whole")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in before.items() if name.endswith("png"))
    records = [json.loads(row) for row in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [(row["file"], row["seed"], row["number"], row.get("id")) for row in records] == [
        *((f"000000-{k}.png", 0, k, "x") for k in range(3)),
        *((f"000001-{k}.png", 3, k, None) for k in range(3)),
    ]
    with Image.open(tmp_path / "out" / "grid-0.png") as sheet:
        assert sheet.width > sheet.height

    monkeypatch.setattr(painting, "_paint", None)  # nothing is left to paint
    main([*line, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"000000-0.png was painted with other settings \(temperature was 1.0 and is 0.5\)"):
        main([*line, "--out", str(tmp_path / "out"), "--temperature", "0.5"])


def test_a_picture_is_changed(model: list[str], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    line = [*model, *QUICK, "--prompt", "a red circle", "--start", str(tmp_path / "start.png"), "--dtype", "bfloat16"]
    main([*line, "--outpaint", "0.5,0,0,0.5", "--out", str(tmp_path / "wider")])
    main([*line, "--vary", "0.25", "--order", "raster", "--guidance_schedule", "linear", "--out", str(tmp_path / "varied")])
    small, varied = (np.asarray(Image.open(tmp_path / name / "000000-0.png")) for name in ("wider", "varied"))
    shrunk = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(small[:16, 16:].astype(int), shrunk.astype(int), atol=1)
    changed = (varied != pixels).any(axis=2).reshape(4, 8, 4, 8).any(axis=(1, 3))
    assert changed.sum() == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--rounds", "17"], "17 rounds asked for 16 tokens"),
        (["--prompt", "a red circle " * 20], "--prompt 1 has "),
        (["--prompt", "a", "--vary", "0.5"], "--redraw, --outpaint and --vary change a picture: give it by --start"),
        (["--prompt", "a", "--batch_size", "0"], "--batch_size is 0"),
        (["--prompt", "a", "--guidance_scale", "nan"], "The guidance scale is nan"),
        (
            ["--prompt", "a", "--guidance_scale", "3e38"],
            "--prompt 1 ('a'), picture 000000-0.png: The image tokens just drawn are not",
        ),
        (["--prompts", "none.txt"], "none.txt cannot be read"),
    ],
)
def test_mistakes_end_in_one_sentence(model: list[str], tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main([*model, *QUICK, *options, "--out", str(tmp_path / "out")])
    assert str(raised.value.code).startswith(f"error: {message}")
    assert list(tmp_path.glob("out/*.png")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--sampler", "euler"], "argument --sampler: invalid choice: 'euler'"),
        (["--prompt", "a", "--outpaint", "0.5,0"], "argument --outpaint: '0.5,0' are not four numbers"),
        ([], "one of the arguments --prompt --prompts is required"),
    ],
)
def test_options_are_checked_first(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "none", "--out", "none", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "known"), [("sampler", SamplerKind), ("order", Order), ("guidance_schedule", GuidanceSchedule)]
)
def test_choices_are_what_the_model_knows(option: str, known: object) -> None:
    assert [action.choices for action in build_parser()._actions if action.dest == option] == [get_args(known)]
