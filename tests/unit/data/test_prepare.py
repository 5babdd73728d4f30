import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmar_megatron.data.index import Index
from mmar_megatron.data.preparation import folders, look, plan, write
from mmar_megatron.data.preparation.duplicates import describe, find_duplicates
from mmar_megatron.data.preparation.folders import FolderSource
from mmar_megatron.data.preparation.records import CaptionFields
from mmar_megatron.data.preparation.report import REPORT_NAME
from mmar_megatron.data.preparation.training_texts import MOST_RECORDS
from mmar_megatron.data.verify import verify
from tests.unit.data.sources import (
    CODEC,
    SIZE,
    Halves,
    Teacher,
    contents,
    encoded,
    picture,
    prepare,
    samples_of,
    scene,
    tokenizer_file,
)

ROOT = Path(__file__).resolve().parents[3]
EN = CaptionFields.parse(["en=caption"])
COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty good pictures, and one of each kind that is dropped."""
    folder = tmp_path_factory.mktemp("in") / "pictures"
    folder.mkdir()
    for k in range(COUNT):
        (folder / f"{k:03d}.jpg").write_bytes(picture(k))
        (folder / f"{k:03d}.txt").write_text(f"caption {k}\n" + "another one\n" * (k % 2))
    bad = {
        "x-copy.jpg": picture(3),
        "x-small.jpg": picture(100, width=30, height=19),
        "x-wide.jpg": picture(101, width=200, height=50),
        "x-cut.jpg": picture(102)[:-400],
        "x-text.jpg": b"this is no picture",
        "x-silent.jpg": picture(103),
        "x-empty.jpg": picture(104),
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("some caption")
    (folder / "x-silent.txt").unlink()
    (folder / "x-empty.txt").write_text(" \n\n")
    return folder


DROPPED = {
    "duplicate picture": 1,
    "too small": 1,
    "wrong aspect": 1,
    "undecodable picture": 2,
    "missing caption": 1,
    "empty caption": 1,
}
RULES = {"min_size": 20, "max_aspect": 3.0}


def source(folder: Path) -> FolderSource:
    return FolderSource(folder, captions=EN, language="en")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "BLOCK_RECORDS", 5)
    monkeypatch.setattr(FolderSource, "chunk_records", 2)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(out, source(folder), **RULES)
    return out


def test_every_reason_to_drop_a_record(folder: Path, undisturbed: Path) -> None:
    report = json.loads((undisturbed / REPORT_NAME).read_text())
    assert report["dropped"] == DROPPED
    assert report["examples"]["duplicate picture"] == ["x-copy"]
    assert sum(report["samples"].values()) == report["pictures"] == COUNT
    assert report["image_tokens"] == COUNT * CODEC.num_tokens
    index = Index.load(undisturbed)
    assert report["text_tokens"] == index.text_tokens.sum()
    assert report["caption_tokens"]["en"]["texts"] == COUNT + COUNT // 2
    assert 2 <= index.count("validation") <= 16
    assert {shard.samples for shard in index.shards if shard.split == "train"} >= {8}
    assert samples_of(undisturbed).keys() == {f"{k:03d}" for k in range(COUNT)}


def test_the_split_of_a_record_does_not_depend_on_the_others(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    for k in range(0, COUNT, 2):
        (half / f"{k:03d}.jpg").unlink()
    prepare(tmp_path / "out", source(half), **RULES)

    def held_out(directory: Path) -> set[str]:
        index = Index.load(directory)
        return {key for key, sample in samples_of(directory).items() if sample.sample_id in index.ids("validation")}

    of_all = {key for key in held_out(undisturbed) if int(key) % 2}
    assert held_out(tmp_path / "out") == of_all != set()


@pytest.mark.parametrize("workers", [0, 2])
def test_blocks_chunks_and_workers_do_not_matter(
    folder: Path, undisturbed: Path, tmp_path: Path, small_blocks: None, workers: int
) -> None:
    report = prepare(tmp_path / "out", source(folder), workers=workers, **RULES)
    assert report.dropped == DROPPED
    expected, found = contents(undisturbed), contents(tmp_path / "out")
    assert found == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_failure_is_gone_on_from(
    folder: Path, undisturbed: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every block and every shard in turn: nothing that is done is done again."""
    looked: list[int] = []
    written: list[str] = []
    real_look, real_write, stop = look.Looker.__call__, write._write_shard, [0]

    def looker(self: look.Looker, number: int) -> int:
        if len(looked) == stop[0]:
            raise OSError("stop")
        looked.append(number)
        return real_look(self, number)

    def writer(unfinished: object, planned: plan.PlannedShard, *args: object, **kwargs: object) -> None:
        if len(looked) + len(written) == stop[0]:
            raise OSError("stop")
        written.append(planned.name)
        real_write(unfinished, planned, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(look.Looker, "__call__", looker)
    monkeypatch.setattr(write, "_write_shard", writer)
    for stop[0] in range(100):
        try:
            prepare(tmp_path / "out", source(folder), **RULES)
            break
        except OSError:
            assert not (tmp_path / "out").exists()
    shards = [shard.name for shard in Index.load(undisturbed).shards]
    assert (looked, written) == (list(range(10)), shards)
    assert stop[0] == 10 + len(shards)
    assert contents(tmp_path / "out") == contents(undisturbed)


KILLED = """
import sys, time
from mmar_megatron.data.preparation import folders, look, write
from tests.unit.data.sources import prepare, tokenizer_file
from tests.unit.data.test_prepare import EN, RULES, FolderSource
from pathlib import Path
if __name__ == "__main__":
    folders.BLOCK_RECORDS, FolderSource.chunk_records = 5, 2
    real = look.atomically, write.atomically
    def slow(file, content):
        time.sleep(0.1)
        real[0](file, content)
        print(file.name, flush=True)
    look.atomically = write.atomically = slow
    prepare(Path(sys.argv[2]), FolderSource(sys.argv[1], captions=EN, language="en"), tokenizer=sys.argv[3], **RULES)
"""


@pytest.mark.parametrize("after", ["000004.json", "train-000001.tar.json"])
def test_killed_and_gone_on_from(folder: Path, undisturbed: Path, tmp_path: Path, small_blocks: None, after: str) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), str(folder), str(tmp_path / "out"), tokenizer_file()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == after:
                process.send_signal(signal.SIGKILL)
                break
    left = tmp_path / ".out.unfinished"
    assert not (tmp_path / "out").exists()
    done = [*left.glob("looks/*.json"), *left.glob("parts/*.json"), *left.glob("data/*.tar")]
    assert done
    kept = {str(file.relative_to(left)): file.stat().st_ino for file in done}
    lines: list[str] = []
    prepare(tmp_path / "out", source(folder), lines=lines, **RULES)
    tars = {name.removeprefix("data/"): inode for name, inode in kept.items() if name.startswith("data/")}
    finished = {name for name in tars if f"parts/{name}.json" in kept}
    assert all((tmp_path / "out" / name).stat().st_ino == tars[name] for name in finished)
    assert any("of 10 blocks were looked at before" in line for line in lines)
    assert bool(finished) == any("shards were written before" in line for line in lines) == after.startswith("train")
    assert contents(tmp_path / "out") == contents(undisturbed)
    assert not left.exists()
    assert json.loads((tmp_path / "out" / REPORT_NAME).read_text())["pictures_per_second"] is None


def test_other_settings_or_inputs_are_not_gone_on_with(
    folder: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "in"))

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_shard", fail)
        with pytest.raises(OSError, match="stop"):
            prepare(tmp_path / "out", source(mine), **RULES)
    with pytest.raises(ValueError, match=r"other settings \(min_size was 20 and is 21\): give those to go on, or remove it"):
        prepare(tmp_path / "out", source(mine), **{**RULES, "min_size": 21})
    with pytest.raises(ValueError, match=r"other settings \(samples_per_shard was 8 and is 9\)"):
        prepare(tmp_path / "out", source(mine), samples_per_shard=9, **RULES)
    (mine / "000.txt").write_text("another caption")
    with pytest.raises(ValueError, match=r"inputs of .* changed since .*\.out\.unfinished was begun: remove that to begin anew"):
        prepare(tmp_path / "out", source(mine), **RULES)


def test_what_comes_after_looking_may_change_until_it_is_planned(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too small for these texts"):
        prepare(tmp_path / "out", source(folder), tokenizer=None, vocab_size=200, **RULES)
    lines: list[str] = []
    report = prepare(tmp_path / "out", source(folder), tokenizer=None, vocab_size=290, lines=lines, **RULES)
    assert report.vocab_size == 290
    assert lines[0] == "1 of 1 blocks were looked at before"
    assert (tmp_path / "out" / "tokenizer.model").is_file()


def test_a_tokenizer_sees_no_more_than_a_bounded_number_of_texts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST_RECORDS == 200_000
    monkeypatch.setattr("mmar_megatron.data.preparation.training_texts.MOST_RECORDS", 10)
    lines: list[str] = []
    report = prepare(tmp_path / "out", source(folder), tokenizer=None, vocab_size=285, lines=lines, **RULES)
    assert f", of 10 of the {report.samples['train']} training records, evenly spread" in lines[0]


def test_another_process_is_at_it(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    with (left / "rank-0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another process is preparing .*out: wait for it, or choose another --out"):
            prepare(tmp_path / "out", source(folder), **RULES)


def test_killed_after_the_last_step_but_one(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The data set has its name and what is beside it was not removed: the next run does that, and says that it is there."""
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    (tmp_path / ".out.unfinished" / "looks").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"out exists: remove it or choose another --out"):
        prepare(out, source(folder), **RULES)
    assert list(tmp_path.iterdir()) == [out]


def test_equal_names_and_nothing_left(tmp_path: Path) -> None:
    for k, name in enumerate(("a.jpg", "a.png")):
        (tmp_path / name).write_bytes(encoded(scene(k), format="PNG"))
    (tmp_path / "a.txt").write_text("a caption")
    with pytest.raises(ValueError, match=r"1 records have the name of another, such as 'a': rename them"):
        prepare(tmp_path / "out", source(tmp_path))
    with pytest.raises(ValueError, match=r"nothing is left to prepare of 2 records: \{'too small': 2\}"):
        prepare(tmp_path / "none", source(tmp_path), min_size=1000)


@pytest.mark.parametrize("keep_pictures", [True, False])
def test_encoders(folder: Path, tmp_path: Path, small_blocks: None, keep_pictures: bool) -> None:
    plain = tmp_path / "plain"
    prepare(plain, source(folder), **RULES)
    pictures = {key: sample.image_HW3 for key, sample in samples_of(plain).items()}
    for workers in (0, 2):
        out = tmp_path / f"out-{workers}"
        options = {"encoders": [Halves(), Teacher()], "encoder_batch": 3, "workers": workers}
        prepare(out, source(folder), keep_pictures=keep_pictures, **options, **RULES)
    assert contents(tmp_path / "out-0") == contents(tmp_path / "out-2")
    index = Index.load(out)
    assert (index.moments, index.flipped, index.pictures) == (True, True, keep_pictures)
    assert index.teacher == {"fingerprint": "a teacher", "features": 5}
    assert (index.images == 1).all()
    for key, sample in samples_of(out).items():
        mean = np.float16(pictures[key].mean())
        np.testing.assert_array_equal(sample.moments_I2NC, np.full((1, 2, CODEC.num_tokens, CODEC.channels), mean))
        np.testing.assert_array_equal(sample.flipped_I2NC, -np.full((1, 2, CODEC.num_tokens, CODEC.channels), mean))
        np.testing.assert_array_equal(sample.teacher_INF, np.full((1, 16, 5), pictures[key].max()))
        assert sample.num_pictures == keep_pictures
    assert verify(out, tokenizer=tokenizer_file())[1] == []


def test_processes_share_the_work(folder: Path, tmp_path: Path) -> None:
    """Under torchrun, one of them late; the command line and all."""
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]}
    for name, launcher in launchers.items():
        options = ["--image_size", SIZE, "--patch_size", 8, "--tokenizer", tokenizer_file(), "--validation", 0.2]
        options += ["--samples_per_shard", 8, "--min_size", 20, "--max_aspect", 3, "--workers", 0, "--out", tmp_path / name]
        command = [sys.executable, *launcher, str(ROOT / "tools/prepare_data.py"), "folder", folder, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("duplicate picture") == 2
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_copies_are_found_and_other_pictures_are_not() -> None:
    originals = [scene(seed, width=256, height=192) for seed in range(60)]
    copies = [
        Image.open(io.BytesIO(encoded(image, quality=quality))).convert("RGB") for image in originals for quality in (70, 95)
    ]
    copies += [image.resize((128, 96), Image.Resampling.LANCZOS) for image in originals]
    recoloured = []
    for seed, image in enumerate(originals):
        bands = [band.point(lambda v: 255 - v // 2) if k == seed % 3 else band for k, band in enumerate(image.split())]
        recoloured.append(Image.merge("RGB", bands))
    described = [describe(image.convert("RGB")) for image in [*originals, *recoloured, *copies]]
    keys = np.stack([key for key, _ in described])
    thumbs = np.stack([thumb for _, thumb in described])
    dropped = find_duplicates(keys, lambda numbers: thumbs[numbers])
    assert not dropped[:120].any()
    assert dropped[120:].mean() > 0.6
