import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmar_megatron.data.index import Index
from mmar_megatron.data.vae import VAECodec
from tests.unit.data.autoencoders import make_autoencoder
from tests.unit.data.sources import SIZE, contents, picture, samples_of, tokenizer_file, write_tar

ROOT = Path(__file__).resolve().parents[3]


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_shapes_verify_and_a_tokenizer(tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    made = run("prepare_data.py", "shapes", "--out", out, "--train", 100, "--validation", 10, "--image_size", 64)
    assert made.returncode == 0, made.stderr
    assert f"{out}: 100 train, 10 validation" in made.stdout
    assert "vocabulary       400" in made.stdout

    verified = run("prepare_data.py", "verify", out)
    assert verified.stdout == f"{out}: 2 shards are whole (100 train, 10 validation)\n"

    again = run("prepare_data.py", "shapes", "--out", out)
    assert (again.returncode, again.stderr) == (1, f"error: {out} exists: remove it or choose another --out\n")

    trained = run("train_tokenizer.py", "--data", out, "--vocab_size", 400, "--out", tmp_path / "new.model")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "new.model").read_bytes() == (out / "tokenizer.model").read_bytes()

    shard = out / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    broken = run("prepare_data.py", "verify", out)
    assert broken.returncode == 1
    assert broken.stderr.startswith(f"error: shard {shard} has ")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(12):
        (folder / f"{k:02d}.jpg").write_bytes(picture(k))
        (folder / f"{k:02d}.txt").write_text(f"picture number {k}")
    rows = [{"image": f"{k:02d}.jpg", "en": f"number {k}", "zh": [f"第{k}", f"号{k}"], "id": f"k{k}"} for k in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "This one."}]
    (folder / "talk.json").write_text(json.dumps([{"image": row["image"], "conversations": turns} for row in rows]))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": f"text {k} " * 30}) for k in range(12)))
    members = {f"{k}.{kind}": (folder / f"{k:02d}.{kind}").read_bytes() for k in range(12) for kind in ("jpg", "txt")}
    write_tar(folder / "old.tar", members)
    return folder


SMALL = ("--image_size", SIZE, "--patch_size", 8, "--validation", 0.2, "--workers", 0)


@pytest.mark.parametrize(
    ("command", "inputs", "options"),
    [
        ("folder", ".", []),
        ("webdataset", "old.tar", []),
        ("table", "rows.jsonl", ["--captions", "en=en", "zh=zh", "--key", "id", "--keep", "id"]),
        ("conversations", "talk.json", []),
        ("text", "text.jsonl", ["--text_tokens", 50]),
    ],
)
def test_every_kind_of_input(pictures: Path, tmp_path: Path, command: str, inputs: str, options: list[object]) -> None:
    out = tmp_path / "out"
    made = run("prepare_data.py", command, pictures / inputs, *options, "--out", out, "--tokenizer", tokenizer_file(), *SMALL)
    assert made.returncode == 0, made.stderr
    report = json.loads((out / "report.json").read_text())
    assert f"{out}: {report['samples']['train']:,} train, {report['samples']['validation']:,} validation in" in made.stdout
    assert report["pictures"] == (0 if command == "text" else 12)
    verified = run("prepare_data.py", "verify", out, "--tokenizer", tokenizer_file())
    assert f"{out}: 2 shards are whole" in verified.stdout, verified.stderr
    before = contents(out)
    indexed = run("prepare_data.py", "index", out, "--tokenizer", tokenizer_file(), "--workers", 2)
    assert f"{out}: indexed {sum(report['samples'].values())} samples in 2 shards" in indexed.stdout, indexed.stderr
    assert contents(out) == before


def test_moments_of_an_auto_encoder_and_features_of_a_teacher(pictures: Path, tmp_path: Path) -> None:
    make_autoencoder(tmp_path / "vae")
    out, options = tmp_path / "out", ["--tokenizer", tokenizer_file(), "--validation", 0.2, "--image_size", SIZE]
    options += ["--vae", tmp_path / "vae", "--flip", "--keep_images", "--teacher", "efficientnet_lite0", "--encoder_batch", 5]
    made = run("prepare_data.py", "folder", pictures, "--out", out, *options)
    assert made.returncode == 0, made.stderr
    codec = VAECodec(tmp_path / "vae", image_size=SIZE)
    index = Index.load(out)
    assert (index.codec, index.num_tokens, index.channels) == (codec.fingerprint, codec.num_tokens, codec.channels)
    assert (index.moments, index.flipped, index.pictures) == (True, True, True)
    assert index.teacher and index.teacher["fingerprint"].startswith("teacher, ")
    for sample in samples_of(out).values():
        pixels = sample.image_HW3
        for found, expected in ((sample.moments_I2NC, pixels), (sample.flipped_I2NC, pixels[:, ::-1])):
            assert found is not None
            np.testing.assert_allclose(found[0], codec.moments(expected[None])[0], rtol=1e-3, atol=1e-3)
        assert sample.teacher_INF is not None
        assert sample.teacher_INF.shape == (1, index.num_tokens, index.teacher["features"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["folder", "{here}/none", "--out", "{out}"], "error: there is no directory {here}/none: name one with pictures"),
        (
            ["table", "{here}/rows.jsonl", "--image", "file", "--out", "{out}"],
            "error: {here}/rows.jsonl has no column 'file'",
        ),
        (["table", "{here}/talk.xml", "--out", "{out}"], "error: there is no file {here}/talk.xml: name files that exist"),
        (["folder", "{here}", "--out", "{here}"], "error: {here} exists: remove it or choose another --out"),
        (
            ["folder", "{here}", "--flip", "--out", "{out}"],
            "error: --flip and --keep_images say what to store",
        ),
        (["folder", "{here}", "--validation", "2", "--out", "{out}"], "error: --validation 2.0 is not a share in [0, 1)"),
        (["folder", "{here}", "--tokenizer", "{here}/none", "--out", "{out}"], "error: no tokenizer at {here}/none"),
        (["folder", "{here}", "--vocab_size", "9", "--out", "{out}"], "error: vocab_size 9 is too small for these texts: "),
        (["index", "{here}"], "error: {here} has no index that says what its pictures are for: give --image_size, and"),
    ],
)
def test_mistakes_end_in_one_sentence(pictures: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    names = {"here": pictures, "out": tmp_path / "out"}
    failed = run("prepare_data.py", *(argument.format(**names) for argument in arguments))
    assert failed.returncode == 1
    assert failed.stderr.startswith(sentence.format(**names)), failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tokenizer_from_text(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one line\n\nand another line\n" * 20)
    trained = run("train_tokenizer.py", "--text", tmp_path / "lines.txt", "--vocab_size", 290, "--out", tmp_path / "t.model")
    assert "290 pieces; 40 texts" in trained.stdout, trained.stderr
    missing = run("train_tokenizer.py", "--text", tmp_path / "none.txt", "--out", tmp_path / "u.model")
    assert (missing.returncode, missing.stderr) == (1, f"error: no text file at {tmp_path / 'none.txt'}\n")
    assert not (tmp_path / "u.model").exists()


def test_what_the_system_refuses_is_one_sentence(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = run("prepare_data.py", "folder", pictures, "--out", tmp_path / "file" / "out", "--workers", 0)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith("error: [Errno 20] Not a directory")


def test_training_on_a_data_set_of_content(pictures: Path, tmp_path: Path) -> None:
    rows = json.loads((pictures / "talk.json").read_text())
    turns = [{"from": "human", "value": "No picture?"}, {"from": "gpt", "value": "None."}]
    (pictures / "some.json").write_text(json.dumps([*rows, *[{"conversations": turns}] * 12]))
    sizes = ["--image_size", SIZE, "--workers", 0, "--tokenizer", tokenizer_file(), "--validation", 0.2]
    for name, command, file in (("talks", "conversations", "some.json"), ("notes", "text", "text.jsonl")):
        made = run("prepare_data.py", command, pictures / file, "--out", tmp_path / name, *sizes)
        assert made.returncode == 0, made.stderr
        trained = run("train_tokenizer.py", "--data", tmp_path / name, "--vocab_size", 290, "--out", tmp_path / f"{name}.model")
        assert trained.returncode == 0, trained.stderr
    options = ["--steps", 1, "--batch_size", 4]
    trained = run("train_vae.py", "--data", tmp_path / "talks", "--out", tmp_path / "vae", *options)
    assert trained.returncode == 0, trained.stderr
    refused = run("train_vae.py", "--data", tmp_path / "notes", "--out", tmp_path / "other", *options)
    assert refused.stderr.startswith(f"error: {tmp_path / 'notes'} stores no pixels: ")
