"""The command line of `tools/convert_ckpt.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.hf.pretrained import IMAGES, save_pretrained
from tools.convert_ckpt import main


def test_from_hf_with_files_and_options_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained("qwen2", tmp_path / "hf")
    (tmp_path / "run.yaml").write_text("seed: 5\nmodel: {backbone: {num_layers: 7, init_method_std: 0.06}}\n")
    places = ["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "made"), "--write-config", str(tmp_path / "written.yaml")]
    main(["from-hf", *places, "--config", str(tmp_path / "run.yaml"), *IMAGES])
    assert "image parts drawn with seed 5" in capsys.readouterr().out
    kept = (tmp_path / "made" / "config.yaml").read_text()
    assert "init_method_std: 0.06" in kept
    assert "num_layers: 4" in kept
    assert (tmp_path / "written.yaml").is_file()


def test_mistakes_end_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["from-hf", "--hf", str(tmp_path), "--out", str(tmp_path / "made")])
    assert raised.value.code == f"error: {tmp_path} has no config.json: give the directory of a Hugging Face model"


def test_unknown_option_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained("qwen2", tmp_path / "hf")
    with pytest.raises(SystemExit) as raised:
        main(["from-hf", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "made"), "--model.head.dept", "3"])
    assert raised.value.code == 2
    assert "there is no option 'model.head.dept'; did you mean 'model.head.depth'?" in capsys.readouterr().err
