"""The command line of `tools/convert_ckpt.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmar_megatron.hf.storage import CheckpointReader
from tests.unit.hf.checkpoints import make_checkpoint
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


def test_checkpoint_and_configuration_need_places_of_their_own(tmp_path: Path) -> None:
    save_pretrained("qwen2", tmp_path / "hf")
    place = str(tmp_path / "made")
    with pytest.raises(SystemExit, match=f"^error: --out and --write-config are both {place}: choose another --write-config$"):
        main(["from-hf", "--hf", str(tmp_path / "hf"), "--out", place, "--write-config", place, *IMAGES])
    assert [*tmp_path.iterdir()] == [tmp_path / "hf"]


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_files_of_weights_have_a_size(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["to-hf", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "model"), "--shard_gb", size])
    assert f"argument --shard_gb: {size} is not a size above 0" in capsys.readouterr().err


def test_a_value_that_a_type_cannot_hold_is_refused(
    coarse_shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read = tmp_path / "run", CheckpointReader.read
    make_checkpoint(run, data=coarse_shapes_dir)

    def with_a_large_value(self: CheckpointReader, key: str, layer: int | None = None) -> torch.Tensor:
        tensor = read(self, key, layer)
        if key == "decoder.final_layernorm.weight":
            tensor[3] = -70000.0
        return tensor

    monkeypatch.setattr(CheckpointReader, "read", with_a_large_value)
    convert = ["to-hf", "--checkpoint", str(run), "--out", str(tmp_path / "model"), "--dtype"]
    message = r"^error: model.norm.weight has the value 7e\+04, which torch.float16 cannot hold: take another --dtype$"
    with pytest.raises(SystemExit, match=message):
        main([*convert, "float16"])
    assert [*tmp_path.iterdir()] == [run]
    main([*convert, "bfloat16"])
