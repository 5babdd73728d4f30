"""A run's checkpoint as a Hugging Face model: exported, verified, and used where there are torch and transformers alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mmar_megatron import parallel, platform
from mmar_megatron.config import Config, parse_command_line
from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.held_out import HeldOut
from mmar_megatron.data.source import DataSource
from mmar_megatron.engine.base import Engine
from mmar_megatron.inference.images import ImageSampling, paint
from mmar_megatron.inference.text import caption
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training import checkpoint
from mmar_megatron.training.building import build_engine, open_source
from mmar_megatron.training.metrics import read_metrics
from tests.clean_environment import make_environment, run_in
from tests.distributed.common import MODEL, make_data, means
from tests.integration import clean_export
from tests.unit.hf.checkpoints import make_checkpoint
from tests.unit.tiny import Documents
from tools import convert_ckpt

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
TRAINING = [
    *("--train.steps", str(STEPS), "--train.log_every", "1", "--optimizer.ema_decay", "0.5"),
    *("--validation.every", str(STEPS), "--validation.samples", "8", "--preview.every", "0"),
]
CAPTIONS = ["a small red circle", "", "two blue squares"]
CAPTION_TOKENS = 12
SAMPLING: dict[str, Any] = {"guidance_scale": 2.5, "rounds": 6, "steps": 4, "seed": 7}
TEXTS = ["a red circle", " two  spaces", "猫 🐈\n"]
NAMES_OF_SPECIAL_TOKENS = ["<image> </s>", "a<pad>"]
"""Which in a caption are text like any other."""
CHECKS = [check.__name__ for check in clean_export.CHECKS]
PLAIN, AVERAGE = "plain", "average"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A run, and exports of it by name."""

    root: Path

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    @property
    def checkpoint(self) -> Path:
        return self.run_dir / "checkpoints" / f"step_{STEPS:08d}"

    def export(self, name: str) -> Path:
        return self.root / name


def command(script: str, *options: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, str(ROOT / script), *map(str, options)]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(root=tmp_path_factory.mktemp("export"))
    data = make_data(place.root / "shapes")
    # Of initial weights many are zero: after three steps the pictures would hardly depend on the captions.
    start = make_checkpoint(place.root / "start", data=data)
    places: list[str | Path] = ["--checkpoint.init_from", start, "--data.path", data, "--run_dir", place.run_dir]
    trained = command("pretrain_mmar.py", *MODEL, *TRAINING, *places, cwd=place.root)
    assert trained.returncode == 0, trained.stderr
    exported = command(
        "tools/convert_ckpt.py", "to-hf", "--checkpoint", place.run_dir, "--out", place.export(PLAIN), cwd=place.root
    )
    assert (exported.returncode, exported.stderr) == (0, "")
    assert exported.stdout.endswith(f"{place.export(PLAIN)}: {place.checkpoint} as a Hugging Face model\n")
    average = ["--ema", "--dtype", "bfloat16", "--shard_gb", "0.00005"]
    convert_ckpt.main(["to-hf", "--checkpoint", str(place.checkpoint), "--out", str(place.export(AVERAGE)), *average])
    return place


@pytest.fixture(scope="module")
def given(place: Place) -> dict[str, Any]:
    """What the training model makes of some inputs, with the weights of the checkpoint."""
    before = dict(os.environ)  # which joining a group changes
    config = parse_command_line(["--config", str(place.checkpoint / "config.yaml")]).config
    groups = parallel.initialize(config.parallel)
    try:
        return _by_training(place, config, groups)
    finally:
        parallel.leave()
        os.environ.clear()
        os.environ.update(before)


def _by_training(place: Place, config: Config, groups: ParallelGroups) -> dict[str, Any]:
    platform.seed_everything(config.seed, tensor_rank=0)
    source = open_source(config)
    engine = build_engine(config, source=source, groups=groups)
    checkpoint.load_weights(engine, place.checkpoint)
    held_out = HeldOut(source)
    pictures = [held_out.read(number).image_HW3 for number in range(5)]
    with engine.evaluating():
        painted = paint(engine, CAPTIONS, source=source, groups=groups, sampling=ImageSampling(**SAMPLING))
        read = caption(engine, pictures, source=source, groups=groups, max_tokens=CAPTION_TOKENS)
    return {
        **_forward(engine, source),
        "dtype": torch.float32,
        "pictures": torch.from_numpy(np.stack(pictures)),
        "captions": CAPTIONS,
        "sampling": SAMPLING,
        "painted": torch.from_numpy(painted),
        "caption_tokens": CAPTION_TOKENS,
        "read": read,
        "ids_of_texts": {text: source.tokenizer.encode(text) for text in TEXTS},
        "prompts": {text: _prompt(source, text) for text in (*TEXTS, *NAMES_OF_SPECIAL_TOKENS)},
    }


def _forward(engine: Engine, source: DataSource) -> dict[str, Any]:
    """A painted and a described image, as the exported model takes them, and what comes of them in training."""
    batch = Documents(source.tokenizer).mixed_batch()
    losses = means(engine.evaluate([batch]))
    with engine.evaluating():
        h_SBD, model = engine.hidden_states(batch), engine.last_stage
        assert isinstance(h_SBD, Tensor) and model is not None
        h_BSD = h_SBD.transpose(0, 1)
        masked_K = batch.image_positions_MN[batch.masked_MN]
        expected = {
            "logits": model.text_logits(h_BSD.flatten(0, 1)).unflatten(0, h_BSD.shape[:2]),
            "conditions": model.image_condition(h_BSD.flatten(0, 1)[masked_K]),
            "text_loss": torch.tensor(losses["text"]),
            "image_loss": torch.tensor(losses["image"]),
        }
    return {"inputs": as_inputs(batch), "expected": expected}


def _prompt(source: DataSource, text: str) -> list[int]:
    return [source.tokenizer.bos_id, *source.tokenizer.encode(text), source.tokenizer.begin_image_id]


def as_inputs(batch: Batch) -> dict[str, Tensor]:
    """A batch of training as arguments of the exported model, which shifts labels by itself."""
    labels_BS = torch.full_like(batch.labels_BS, IGNORE)
    labels_BS[:, 1:] = batch.labels_BS[:, :-1]
    return {
        "input_ids": batch.tokens_BS,
        "attention_mask": (batch.document_ids_BS >= 0).long(),
        "labels": labels_BS,
        "image_latents": batch.latents_MNC,
        "image_masked": batch.masked_MN,
        "timesteps": batch.timesteps_MNR,
        "noise": batch.noise_MNRC,
    }


# --- where there are torch and transformers alone -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a clean environment."""
    return make_environment(tmp_path_factory.mktemp("clean") / "environment")


@pytest.fixture(scope="module")
def outcomes(place: Place, given: dict[str, Any], clean: Path) -> dict[str, str | None]:
    """Of each check in `clean_export.py`."""
    home = place.root / "home"
    home.mkdir()
    torch.save(given, place.root / "given.pt")
    exports = [place.export(PLAIN), place.export(AVERAGE)]
    before = [contents(export) for export in exports]
    script = ROOT / "tests/integration/clean_export.py"
    finished = run_in(clean, script, *exports, place.root / "given.pt", home / "again", home=home)
    assert finished.returncode == 0, finished.stderr
    assert [contents(export) for export in exports] == before, "something was written into an export"
    outcomes: dict[str, str | None] = json.loads(finished.stdout.splitlines()[-1])
    assert list(outcomes) == CHECKS
    return outcomes


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", CHECKS)
def test_with_torch_and_transformers_alone(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]


def test_what_is_compared_is_worth_it(given: dict[str, Any]) -> None:
    """A model that says the same of everything would pass all of the above."""
    assert given["painted"].unique().numel() > 100
    assert given["expected"]["conditions"].std(dim=0).max() > 1e-3
    assert any(given["read"])


# --- the directory --------------------------------------------------------------------------------------------------------------


def test_shards_hold_all_that_the_index_says(place: Place) -> None:
    directory = place.export(AVERAGE)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 2
    assert [shard.name for shard in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    found: dict[str, str] = {}
    nbytes = 0
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), shard.name)
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118  no dictionary
            assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert sum(sizes) <= 50_000 or len(sizes) == 1
        nbytes += sum(sizes)
    assert found == index["weight_map"]
    assert nbytes == index["metadata"]["total_size"]
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_model_card_has_the_losses_of_the_step(place: Place) -> None:
    card = (place.export(PLAIN) / "README.md").read_text()
    last = read_metrics(place.run_dir)[-1]
    for name in ("val_loss_text", "val_loss_image", "loss_text", "loss_image"):
        assert f" {last[name]:.4f} |" in card
    assert f"| step | {STEPS} |" in card
    assert "| data | shapes |" in card
    assert "moving average" in (place.export(AVERAGE) / "README.md").read_text()


def test_everyone_may_read_the_files(place: Place) -> None:
    modes = {path.stat().st_mode & 0o777 for path in place.export(PLAIN).iterdir()}
    assert len(modes) == 1


# --- verify ---------------------------------------------------------------------------------------------------------------------


def test_an_export_equals_its_checkpoint(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    convert_ckpt.main(["verify", "--checkpoint", str(place.run_dir), "--hf", str(place.export(PLAIN))])
    assert "tensors compared, " in capsys.readouterr().out
    convert_ckpt.main(["verify", "--checkpoint", str(place.run_dir), "--hf", str(place.export(AVERAGE)), "--ema"])


def test_the_average_is_not_the_weights_themselves(place: Place) -> None:
    with pytest.raises(SystemExit, match=r"^error: .* is not .*: export it again$"):
        convert_ckpt.main(["verify", "--checkpoint", str(place.run_dir), "--hf", str(place.export(AVERAGE))])


def test_the_command_names_the_tensor_in_which_a_bit_is_flipped(place: Place) -> None:
    damaged = shutil.copytree(place.export(PLAIN), place.root / "flipped")
    flip_sign_bit(damaged / "model.safetensors", "model.layers.2.mlp.up_proj.weight")
    verified = command("tools/convert_ckpt.py", "verify", "--checkpoint", place.run_dir, "--hf", damaged, cwd=place.root)
    assert (verified.returncode, verified.stderr) == (1, f"error: {damaged} is not {place.run_dir}: export it again\n")
    assert "worst model.layers.2.mlp.up_proj.weight: differs by " in verified.stdout


def flip_sign_bit(file: Path, name: str) -> None:
    """Of the tensor's last number."""
    content = bytearray(file.read_bytes())
    header_size = int.from_bytes(content[:8], "little")
    _, end = json.loads(content[8 : 8 + header_size])[name]["data_offsets"]
    content[8 + header_size + end - 1] ^= 0x80
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["vision.py", "tokenizer.json", "generation_config.json", "README.md"])
def test_a_missing_file_is_named(name: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = shutil.copytree(place.export(PLAIN), tmp_path / "export")
    (damaged / name).unlink()
    with pytest.raises(SystemExit, match=f"^error: {damaged} is not "):
        convert_ckpt.main(["verify", "--checkpoint", str(place.run_dir), "--hf", str(damaged)])
    assert f"\nnot as an export has it: {name}\n" in capsys.readouterr().out


def test_a_missing_shard_is_named(place: Place, tmp_path: Path) -> None:
    damaged = shutil.copytree(place.export(AVERAGE), tmp_path / "export")
    shard = min(damaged.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(SystemExit, match=f"^error: {shard} is missing"):
        convert_ckpt.main(["verify", "--checkpoint", str(place.run_dir), "--hf", str(damaged), "--ema"])
