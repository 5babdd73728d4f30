"""What keeps a checkpoint from being exported is told in one sentence, and nothing is left; what the model card says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from torch import Tensor

from mmar_megatron.config import parse_command_line
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.data.vae import WEIGHTS_NAMES
from mmar_megatron.hf import exporting
from mmar_megatron.hf.card import model_card
from mmar_megatron.hf.exporting import copies_of, export, open_checkpoint
from mmar_megatron.hf.storage import CheckpointReader
from mmar_megatron.hf.verifying import compare
from mmar_megatron.training import manifest
from mmar_megatron.training.checkpoint import CONFIG
from tests.distributed.common import CODEC, mix
from tests.unit.command_line import share_parser
from tests.unit.data.autoencoders import make_autoencoder
from tests.unit.hf.checkpoints import STEP, make_checkpoint
from tools import convert_ckpt


@pytest.fixture(scope="module", autouse=True)
def parser() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_parser(patch)
        yield


@dataclass(frozen=True, kw_only=True)
class Places:
    """Runs with one checkpoint each, and data for them; nothing of it is changed."""

    tied: Path
    untied: Path
    averaged: Path
    encoded: Path
    """Of images as latents of the auto-encoder `vae`."""
    data: Path
    other_words: Path
    """Data with another tokenizer."""
    vae: Path
    other_vae: Path


@pytest.fixture(scope="module")
def places(coarse_shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("vae", "other_vae")):
        make_autoencoder(root / name, "sd", seed=seed)
    make_shapes(root / "other_words", codec=CODEC, train=64, validation=16, vocab_size=390, log=lambda _: None)
    latents = ["--data.codec.kind", "vae", "--data.codec.path", str(root / "vae"), "--data.codec.patch_size", "1"]
    make_checkpoint(root / "tied", data=coarse_shapes_dir)
    make_checkpoint(root / "untied", "--model.tie_embeddings", "false", data=coarse_shapes_dir)
    make_checkpoint(root / "averaged", data=coarse_shapes_dir, average=True)
    make_checkpoint(root / "encoded", *latents, data=coarse_shapes_dir)
    names = ("tied", "untied", "averaged", "encoded", "other_words", "vae", "other_vae")
    return Places(data=coarse_shapes_dir, **{name: root / name for name in names})


def configure(run: Path, **options: Any) -> None:
    """Change settings in the configuration of its checkpoint, which stays whole; `__` stands for a dot."""
    path = run / "checkpoints" / f"step_{STEP:08d}"
    values = yaml.safe_load((path / CONFIG).read_text())
    for name, value in options.items():
        *sections, last = name.split("__")
        inner = values
        for section in sections:
            inner = inner[section]
        inner[last] = value
    (path / CONFIG).write_text(yaml.safe_dump(values))
    facts = manifest.read(path)
    files = facts.pop("files") | {CONFIG: manifest.record(path / CONFIG)}
    manifest.write(path, files=files, facts=facts)


def damage(run: Path) -> None:
    file = next(run.rglob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# --- what is refused ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A mistake."""

    run: str
    message: str
    """Parts that the sentence has in this order, with `...` between; {...} are paths."""
    change: Callable[[Path], None] = lambda run: None
    options: Sequence[str] = ()


REFUSED = {
    "no checkpoint": Case(run="vae", message="There is no checkpoint at {run}: give a directory step_XXXXXXXX"),
    "no average": Case(
        run="tied", options=["--ema"], message="step_00000004 holds no average of the weights: export without --ema."
    ),
    "wider layers": Case(
        run="tied",
        change=lambda run: configure(run, model__backbone__ffn_hidden_size=80),
        message="has decoder.layers.mlp.linear_fc1.weight of shape (4, 128, 32), and its config.yaml asks for (4, 160, 32).",
    ),
    "wider head": Case(
        run="tied",
        change=lambda run: configure(run, model__head__width=48),
        message="has post_projector. ... and its config.yaml asks for (48",
    ),
    "more layers": Case(
        run="tied",
        change=lambda run: configure(run, model__backbone__num_layers=6),
        message="has decoder.layers. ... of shape (4, 32), and its config.yaml asks for (6, 32).",
    ),
    "fewer layers": Case(
        run="tied",
        change=lambda run: configure(run, model__backbone__num_layers=2),
        message="has decoder.layers. ... of shape (4, 32), and its config.yaml asks for (2, 32).",
    ),
    "untied by its configuration": Case(
        run="tied",
        change=lambda run: configure(run, model__tie_embeddings=False),
        message="has no tensor output_layer.weight, which its config.yaml asks for.",
    ),
    "tied by its configuration": Case(
        run="untied",
        change=lambda run: configure(run, model__tie_embeddings=True),
        message="has the tensor output_layer.weight, which has no place in the model of its config.yaml.",
    ),
    "damaged": Case(
        run="tied",
        change=damage,
        options=["--checkpoint", "{run}/checkpoints/step_00000004"],
        message="step_00000004 is damaged (__0_0.distcp has other content than was written): give another one.",
    ),
    "all damaged": Case(run="tied", change=damage, message="No checkpoint in {run} is good"),
    "other tokenizer": Case(
        run="tied",
        options=["--tokenizer", "{other_words}"],
        message="step_00000004 was trained with the tokenizer ... with the same tokenizer.",
    ),
    "other codec": Case(
        run="tied",
        change=lambda run: configure(run, data__codec__patch_size=16),
        message="was trained with the codec (patch, image_size 32, patch_size 8) ... patch_size 16): give",
    ),
    "data gone": Case(
        run="tied",
        change=lambda run: configure(run, data__path="gone"),
        message="no tokenizer at gone ... if it lies elsewhere now, give --tokenizer",
    ),
    "no tokenizer there": Case(run="tied", options=["--tokenizer", "{vae}"], message="no tokenizer at {vae}: expected a"),
    "auto-encoder gone": Case(
        run="encoded",
        change=lambda run: configure(run, data__codec__path="gone"),
        message="there is no directory gone ... if it lies elsewhere now, give --vae",
    ),
    "other auto-encoder": Case(run="encoded", options=["--vae", "{other_vae}"], message="was trained with the codec (vae, "),
    "no auto-encoder asked for": Case(
        run="tied", options=["--vae", "{vae}"], message="The run's codec is patch, which has no auto-encoder: leave out --vae."
    ),
    "typo": Case(run="tied", options=["--emma"], message="there is no option --emma: see --help"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence_and_nothing_is_written(name: str, places: Places, tmp_path: Path) -> None:
    case = REFUSED[name]
    run = shutil.copytree(getattr(places, case.run), tmp_path / "run")
    case.change(run)
    before = sorted(run.rglob("*"))
    paths = {**vars(places), "run": run}
    options = [option.format(**paths) for option in case.options]
    with pytest.raises(SystemExit) as stopped:
        convert_ckpt.main(["to-hf", "--checkpoint", str(run), "--out", str(tmp_path / "out" / "model"), *options])
    sentence = str(stopped.value)
    assert sentence.startswith("error: ") and "\n" not in sentence
    rest = sentence
    for part in case.message.format(**paths).split(" ... "):
        assert part in rest, sentence
        rest = rest.partition(part)[2]
    assert sorted(tmp_path.rglob("*")) == [run, *before]


def test_what_exists_is_not_overwritten(places: Places, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("mine")
    with pytest.raises(SystemExit, match=r"^error: .*/model exists: remove it or choose another --out$"):
        convert_ckpt.main(["to-hf", "--checkpoint", str(places.tied), "--out", str(tmp_path / "model")])
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["model", "model/mine"]


def test_others_may_read_what_they_may_read_of_other_files(places: Places, tmp_path: Path) -> None:
    """safetensors keeps its files to their owner."""
    before = os.umask(0o027)
    try:
        export(open_checkpoint(places.tied), tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}


def test_what_was_moved_is_found_where_it_lies_now(places: Places, tmp_path: Path) -> None:
    run = shutil.copytree(places.encoded, tmp_path / "run")
    configure(run, data__path="gone", data__codec__path="gone")
    moved = ["--checkpoint", str(run), "--tokenizer", str(places.data), "--vae", str(places.vae)]
    convert_ckpt.main(["to-hf", *moved, "--out", str(tmp_path / "model")])
    convert_ckpt.main(["verify", *moved, "--hf", str(tmp_path / "model")])


def test_full_disk_is_told_before_anything_is_written(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(places.encoded)
    weights = sum(source.nbytes(link) for link in source.links)
    # Enough for the weights, not for the auto-encoder too.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=weights + 1000))
    with pytest.raises(OSError, match=r"/model takes 0\.00 GB, and .* has 0\.00 GB left: make room$"):
        export(source, tmp_path / "model")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("failing", ["save_file", "files_of", "copies_of"])
def test_nothing_is_left_of_what_failed_midway(
    failing: str, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(places.encoded)
    assert copies_of(source)
    original, calls = getattr(exporting, failing), []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(len([*tmp_path.glob(".model.*.partial")]))
        if len(calls) == (1 if failing == "files_of" else 2):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(exporting, failing, fail)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "model", shard_bytes=100_000, say=lambda _: None)
    assert calls[-1] == 1  # it was in the midst
    assert [*tmp_path.iterdir()] == []


def test_no_more_than_a_shard_is_in_memory(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each tensor of the checkpoint is read once."""
    source = open_checkpoint(places.tied)
    read: list[tuple[str, int | None]] = []
    read_when_saved: list[int] = []
    read_one, save_one = CheckpointReader.read, exporting.save_file

    def reading(reader: CheckpointReader, key: str, layer: int | None = None) -> Tensor:
        read.append((key, layer))
        return read_one(reader, key, layer)

    def saving(*arguments: Any, **options: Any) -> None:
        read_when_saved.append(len(read))
        save_one(*arguments, **options)

    monkeypatch.setattr(CheckpointReader, "read", reading)
    monkeypatch.setattr(exporting, "save_file", saving)
    export(source, tmp_path / "model", shard_bytes=100_000, say=lambda _: None)
    assert len(set(read)) == len(read)
    assert len(read_when_saved) > 2 and read_when_saved[0] < len(read) / 2


def test_verify_names_an_autoencoder_that_differs(places: Places, tmp_path: Path) -> None:
    source = open_checkpoint(places.encoded)
    export(source, tmp_path / "model", say=lambda _: None)
    assert compare(source, tmp_path / "model", say=lambda _: None).equal
    file = tmp_path / "model" / "vae" / WEIGHTS_NAMES[0]
    shutil.copyfile(places.other_vae / file.name, file)
    found = compare(source, tmp_path / "model", say=lambda _: None)
    assert (found.equal, found.files) == (False, [f"vae/{file.name}"])
    file.unlink()
    assert compare(source, tmp_path / "model", say=lambda _: None).files == [f"vae/{file.name}"]


# --- the model card -------------------------------------------------------------------------------------------------------------


def card_of(run: Path, *options: str, average: bool = False) -> str:
    checkpoint = run / "checkpoints" / f"step_{STEP:08d}"
    config = parse_command_line(["--config", str(checkpoint / CONFIG), *options]).config
    return model_card(checkpoint, config, average=average)


@pytest.fixture
def logged(places: Places, tmp_path: Path) -> Path:
    """A run that went on after its checkpoint, and was killed while it logged."""
    run = shutil.copytree(places.averaged, tmp_path / "run")
    rows = [
        {"step": STEP - 2, "loss_text": 5.25, "val_loss_text": 4.5, "val_loss_image": 0.75},
        {"step": STEP, "loss_text": 3.25, "loss_image": 0.5, "val_loss_text": None},
        {"step": STEP + 1, "loss_text": 1.125, "loss_image": 0.125, "val_loss_text": 1.0625},
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 7, "lo')
    return run


def test_losses_are_the_newest_up_to_the_step(logged: Path) -> None:
    card = card_of(logged)
    assert f"## Last losses up to step {STEP}\n" in card
    for line in (
        "| text, cross-entropy (nats a token) | 4.5000 |",
        "| image, diffusion loss | 0.7500 |",
        "| text in training | 3.2500 |",
        "| image in training | 0.5000 |",
    ):
        assert line in card
    assert not any(number in card for number in ("5.2500", "1.1250", "0.1250", "1.0625"))


def test_losses_are_not_said_to_be_the_averages(logged: Path) -> None:
    card = card_of(logged, average=True)
    assert f"| step | {STEP}, moving average of the weights |" in card
    assert f"## Last losses up to step {STEP}, of the weights before averaging\n" in card


def test_without_a_log_there_are_no_losses(places: Places) -> None:
    assert "## Losses" not in card_of(places.tied)


def test_the_card_names_the_data_and_what_is_needed(places: Places, tmp_path: Path) -> None:
    card = card_of(places.tied)
    assert f"| data | {places.data.name} |" in card
    assert "| pictures | 32 x 32, patch codec |" in card
    assert "Needs torch, transformers. " in card
    assert str(places.data.parent) not in card  # where these lie is nobody's business
    assert "Needs torch, transformers, diffusers. " in card_of(places.encoded)
    data = shutil.copytree(places.data, tmp_path / "shapes")
    assert "| data | shapes, talks |" in card_of(places.tied, "--config", str(mix(data)))


def test_the_card_begins_with_what_the_hub_reads(places: Places) -> None:
    _, front, _ = card_of(places.tied).split("---\n", maxsplit=2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "any-to-any",
        "tags": ["mmar", "text-to-image", "image-to-text", "masked-autoregressive"],
    }
