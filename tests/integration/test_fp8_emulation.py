"""Training with emulated FP8, and what FP8 does to a trained model: whole commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmar_megatron.benchmarks.fp8_training import RECORD
from mmar_megatron.training.metrics import read_metrics
from tests.distributed.common import MODEL, make_data

ROOT = Path(__file__).resolve().parents[2]
BF16 = ("--precision.dtype", "bf16")
FP8 = (*BF16, "--model.backbone.transformer_impl", "transformer_engine", "--precision.fp8")
ALL_IN_BF16 = ("--model.backbone.num_layers_at_start_in_bf16", "4")
LOSSES = ("loss", "grad_norm", "val_loss_text", "val_loss_image")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fp8")
    make_data(place / "data")
    return place


def run(*words: str, place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def trained(command: tuple[str, ...], *options: str, place: Path, name: str) -> list[list[float]]:
    """Losses of each step of a short run."""
    settings = (
        *("--data.path", "data", "--run_dir", name, "--train.steps", "3", "--train.log_every", "1", "--preview.every", "0"),
        *("--validation.every", "3", "--validation.samples", "8", "--optimizer.warmup_steps", "0"),
    )
    result = run(*command, *MODEL, *settings, *options, place=place)
    assert result.returncode == 0, result.stderr
    return [[row[loss] for loss in LOSSES if loss in row] for row in read_metrics(place / name)]


@pytest.fixture(scope="module")
def plain(place: Path) -> list[list[float]]:
    return trained((str(ROOT / "pretrain_mmar.py"),), *BF16, place=place, name="plain")


EMULATED = (str(ROOT / "tools" / "numerics.py"), "train")


def test_with_all_layers_spared_a_run_is_a_plain_one(place: Path, plain: list[list[float]]) -> None:
    assert trained(EMULATED, *FP8, "tensorwise", *ALL_IN_BF16, place=place, name="spared") == plain
    assert json.loads((place / "spared" / RECORD).read_text())["layers_in_bf16"] == [0, 1, 2, 3]


def test_a_run_in_fp8_is_near_it(place: Path, plain: list[list[float]]) -> None:
    found = trained(EMULATED, *FP8, "blockwise", place=place, name="blockwise")
    assert found != plain
    assert [value for row in found for value in row] == pytest.approx([value for row in plain for value in row], rel=0.1)
    record = json.loads((place / "blockwise" / RECORD).read_text())
    assert (record["precision.fp8"], record["layers_in_bf16"]) == ("blockwise", [0])
    assert record["recipe"]["gradients"] == "float8_e4m3fn"


def test_effect_on_a_trained_model(place: Path, plain: list[list[float]]) -> None:
    tool = (str(ROOT / "tools" / "numerics.py"), "model", "--run_dir", "plain", "--out", "out")
    options = ("--fp8", "tensorwise", "delayed", "--layers_in_bf16", "none", "0,1,2,3", "--samples", "8", "--warmup", "1")
    result = run(*tool, *options, place=place)
    assert result.returncode == 0, result.stderr
    assert (place / "out" / "fp8.md").read_text() in result.stdout
    found = json.loads((place / "out" / "fp8.json").read_text())
    bf16, tensorwise, spared, delayed = found["rows"]
    assert [row["format"] for row in found["rows"]] == ["bf16", "tensorwise", "tensorwise", "delayed"]
    figures = [name for name in bf16 if name not in ("format", "layers in bf16")]
    assert {name: spared[name] for name in figures} == {name: bf16[name] for name in figures}
    assert 0 < bf16["z error"] < min(tensorwise["z error"], delayed["z error"]) < 0.2
    assert 0.9 < tensorwise["gradient cosine"] < bf16["gradient cosine"] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", *MODEL, *BF16], "precision.fp8 is off, so that there is nothing to emulate: set it, or run pretrain_mmar.py."),
        (["train", *MODEL, *FP8, "delayed", "--dry_run"], "There is no plan of an emulation: leave out --dry_run, or run"),
        (["model", "--run_dir", "nowhere", "--out", "out2"], "There is no checkpoint at nowhere: give a directory"),
    ],
)
def test_mistakes(words: list[str], message: str, place: Path) -> None:
    result = run(str(ROOT / "tools" / "numerics.py"), *words, place=place)
    assert result.returncode == 1
    assert result.stderr.strip().startswith(f"numerics.py: {message}")
    assert "\n" not in result.stderr.strip()
