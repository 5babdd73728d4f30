"""A training of a few steps: what it leaves, and that a killed one ends as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.index import Index
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.data.shards import ShardReader
from mmar_megatron.data.vae import WEIGHTS_NAMES, VAECodec
from mmar_megatron.evaluation.reconstruction import psnr, ssim
from tools import train_vae

SIZE = 32
TINY = ["--steps", "6", "--save_every", "2", "--batch_size", "4", "--channels", "8", "8", "8", "8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(out, codec=PatchCodec(image_size=SIZE, patch_size=4), train=40, validation=20, log=lambda _: None)
    return out


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vae") / "models" / "vae"
    train_vae.main(["--data", str(data), "--out", str(out), *TINY])
    return out


def pictures(data: Path, split: str) -> np.ndarray:
    reader = ShardReader(data, index=Index.load(data), split=split)  # type: ignore[arg-type]
    return np.stack([reader.read(number).image_HW3 for number in range(len(reader))])


def test_what_it_leaves(trained: Path, data: Path) -> None:
    names = {"config.json", WEIGHTS_NAMES[0], "report.json", "reconstructions.png"}
    assert {file.name for file in trained.iterdir()} == names
    assert [file.name for file in trained.parent.iterdir()] == ["vae"]
    codec = VAECodec(trained, image_size=SIZE)
    assert (codec.num_tokens, codec.channels) == (16, 16)

    moments_B2NC = codec.moments(pictures(data, "train")).astype(np.float64)
    mean, variance = moments_B2NC[:, 0], np.exp(moments_B2NC[:, 1])
    np.testing.assert_allclose(mean.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(mean.var() + variance.mean(), 1, rtol=1e-5)

    report = json.loads((trained / "report.json").read_text())
    held_out_BHW3 = pictures(data, "validation")
    again_BHW3 = codec.decode(codec.encode(held_out_BHW3))
    np.testing.assert_allclose(report["psnr"], psnr(held_out_BHW3, again_BHW3).mean(), rtol=1e-6)
    np.testing.assert_allclose(report["ssim"], ssim(held_out_BHW3, again_BHW3).mean(), rtol=1e-6)
    np.testing.assert_allclose(report["noise_share_of_token_variance"], variance.mean(), rtol=1e-5)
    assert (report["held_out_pictures"], report["settings"]["steps"]) == (20, "6")

    sheet_HW3 = np.asarray(Image.open(trained / "reconstructions.png"))[::2, ::2]
    np.testing.assert_array_equal(sheet_HW3[:SIZE, :SIZE], held_out_BHW3[0])
    assert sheet_HW3.shape[0] == 2 * SIZE


def test_a_killed_training_goes_on_to_the_same_end(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(data), "--out", str(tmp_path / "vae")]
    one_step = train_vae.Training._one_step

    def dies(training: train_vae.Training) -> tuple[float, float]:
        if training.step == 5:
            raise KeyboardInterrupt
        return one_step(training)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_vae.Training, "_one_step", dies)
        train_vae.main([*command, *TINY])
    assert [file.name for file in tmp_path.iterdir()] == [".vae.training.pt"]

    with pytest.raises(SystemExit, match=r"was begun with --lr 0\.001: give that, or --fresh to begin anew"):
        train_vae.main([*command, *TINY, "--lr", "1e-4"])
    capsys.readouterr()
    train_vae.main([*command, *TINY])
    assert capsys.readouterr().out.startswith("going on from step 4\n")
    assert (tmp_path / "vae" / WEIGHTS_NAMES[0]).read_bytes() == (trained / WEIGHTS_NAMES[0]).read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["vae"]


def test_fresh_begins_anew(data: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / ".vae.training.pt").write_bytes(b"of another training")
    command = ["--data", str(data), "--out", str(tmp_path / "vae"), *TINY]
    with pytest.raises(SystemExit, match="of a killed training is damaged: give --fresh to begin anew"):
        train_vae.main(command)
    train_vae.main([*command, "--fresh"])
    assert (tmp_path / "vae" / WEIGHTS_NAMES[0]).read_bytes() == (trained / WEIGHTS_NAMES[0]).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--channels", "8", "12"], r"--channels \[8, 12\] are not all multiples of 8, the groups of a norm: change them"),
        (["--channels", *["8"] * 7], "the 32 pixels of .* are not a multiple of the 64 that 7 --channels make one latent of"),
        (["--steps", "0"], "must be at least 1: raise them"),
    ],
)
def test_mistakes(data: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        train_vae.main(["--data", str(data), "--out", str(tmp_path / "vae"), *options])
    assert [*tmp_path.iterdir()] == []


def test_what_is_there_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exists: remove it or choose another --out"):
        train_vae.main(["--data", str(data), "--out", str(tmp_path)])
