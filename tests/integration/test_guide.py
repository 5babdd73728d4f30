"""The guide to data is true: every command of docs/data.md runs, in order, as it stands there but for the number of steps."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
import torch
import webdataset
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

from mmar_megatron.data import shapes
from mmar_megatron.training.metrics import read_metrics
from tests.unit.data.object_store import BUCKET, ObjectStore, credentials, object_store
from tests.unit.data.test_emoji import packages_are_cached
from tests.unit.data.test_ldm import original

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "data.md"
PICTURES = 150
STEPS = 3
SHORT = [
    *("--train.log_every", "1", "--validation.samples", "16", "--preview.images", "2", "--preview.rounds", "2"),
    *("--preview.sampling_steps", "2"),
]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def commands() -> list[str]:
    """What stands indented, and begins like a command; a here-document is one command."""
    blocks = re.findall(r"(?:^    .*\n)+", GUIDE.read_text(), flags=re.MULTILINE)
    found: list[str] = []
    for block in blocks:
        lines = [line[4:].rstrip() for line in block.splitlines()]
        while lines:
            command = lines.pop(0)
            if command.endswith("<<'END'"):
                end = lines.index("END") + 1
                command, lines = "\n".join([command, *lines[:end]]), lines[end:]
            while command.endswith("\\"):
                command = command[:-1] + lines.pop(0).strip()
            if re.match(r"(python|torchrun|cat|bash|make) ", command):
                found.append(command.partition("  #")[0].rstrip())
    return found


def shortened(command: str) -> str:
    """With a few steps; a run also with small validations and previews."""
    command = re.sub(r"(--(?:train\.)?steps) \d+", rf"\1 {STEPS}", command)
    is_run = "pretrain_mmar.py" in command and "--dry_run" not in command
    return " ".join([command, *SHORT]) if is_run else command


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands who has pictures, conversations and texts about them, and auto-encoders of small size."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("tools", "examples", "mmar_megatron", "pretrain_mmar.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "pictures").mkdir()
    scenes = list(shapes.draw_scenes(PICTURES, split="train", seed=5))
    for number, scene in enumerate(scenes):
        picture = Image.fromarray(shapes.render(scene, image_size=64))
        picture.save(folder / "pictures" / f"{number:04d}.png")
        (folder / "pictures" / f"{number:04d}.txt").write_text(f"{scene.caption}\n")
    talks = [
        {
            "id": f"talk{number}",
            "image": f"{number:04d}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is there?"},
                {"from": "gpt", "value": scene.caption},
                {"from": "human", "value": "Is that all?"},
                {"from": "gpt", "value": "It is all there is to see."},
            ],
        }
        for number, scene in enumerate(scenes)
    ]
    (folder / "talks.json").write_text(json.dumps(talks))
    others_collections(folder, captions=[scene.caption for scene in scenes])
    notes = [json.dumps({"text": paragraph}) for paragraph in GUIDE.read_text().split("\n\n")]
    (folder / "notes.jsonl").write_text("\n".join(notes))
    torch.save({"model": original("kl16").state_dict()}, folder / "kl16.ckpt")
    torch.save({"state_dict": original("sd").state_dict()}, folder / "sd.ckpt")
    save_file(original("flux").state_dict(), folder / "ae.safetensors")
    return folder


def others_collections(folder: Path, *, captions: list[str]) -> None:
    """The same pictures in the forms in which data sets are handed around."""
    pictures = [(folder / "pictures" / f"{number:04d}.png").read_bytes() for number in range(len(captions))]
    (folder / "cc12m").mkdir()
    with webdataset.TarWriter(str(folder / "cc12m" / "00000.tar")) as tar:
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            tar.write({"__key__": f"{number:05d}", "png": picture, "txt": caption})
    with (folder / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption", "caption_zh"])
        rows.writerows([f"pictures/{number:04d}.png", caption, "图"] for number, caption in enumerate(captions))
    table = {"id": range(len(captions)), "image": pictures, "text1": captions, "text2": captions}
    parquet.write_table(pyarrow.table({name: list(values) for name, values in table.items()}), folder / "train-0.parquet")
    shutil.copy(folder / "talks.json", folder / "llava.json")
    (folder / "coco").mkdir()
    (folder / "coco" / "train2017").symlink_to(folder / "pictures")
    (folder / "books-0.jsonl").write_text(json.dumps({"text": " ".join(captions)}))


def run(command: str, *, folder: Path, environment: dict[str, str]) -> str:
    finished = subprocess.run(["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
    return finished.stdout


def test_every_command_of_the_guide_runs(folder: Path, store: ObjectStore) -> None:
    environment = (
        os.environ | credentials("http://{}:{}".format(*store.address)) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    left_out, outputs = [], {}
    for command in commands():
        if "s3://" in command:
            for file in sorted((folder / "data" / "mine").rglob("*")):
                if file.is_file():
                    store.put(f"mine/{file.relative_to(folder / 'data' / 'mine')}", file.read_bytes())
            command = command.replace("s3://bucket", f"s3://{BUCKET}")
        if "emoji" in command and not packages_are_cached():
            left_out.append(command)
            continue
        outputs[command] = run(shortened(command), folder=folder, environment=environment)
    assert all("emoji" in command for command in left_out), "only what needs 140 MB from npm may be left out"
    assert len(outputs) >= 15

    for name in ("mine", "mix", "latents", "from-s3"):
        assert [row["step"] for row in read_metrics(folder / "runs" / name)] == [1, 2, 3]
    # The same data from another place, and made by other processes, are the same data.
    losses = [[row["loss"] for row in read_metrics(folder / "runs" / name)] for name in ("mine", "from-s3")]
    assert losses[0] == losses[1]
    for file in sorted((folder / "data" / "mine").glob("*.tar")):
        assert file.read_bytes() == (folder / "data" / "mine-too" / file.name).read_bytes()
    assert read_metrics(folder / "runs" / "mix")[-1]["filled_share"] > 0.9
    assert "loss_alignment" in read_metrics(folder / "runs" / "latents")[-1]
    shutil.rmtree(folder)
