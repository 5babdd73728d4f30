import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmar_megatron.data.index import COLUMNS, INDEX_NAME, Index, Shard, column_path, sha256_of, write_index
from mmar_megatron.data.preparation.documents import DocumentSource
from mmar_megatron.data.preparation.records import CaptionFields
from mmar_megatron.data.preparation.tables import TableSource
from mmar_megatron.data.shards import ShardReader
from mmar_megatron.data.verify import rebuild_index, scan_shard, verify
from tests.unit.data.sources import CODEC, Halves, Teacher, contents, picture, prepare, tokenizer_file


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for k in range(12):
        (folder / f"{k}.jpg").write_bytes(picture(k))
    pairs = [{"image": f"{k}.jpg", "zh": [f"第{k}"] * (k % 3), "en": f"number {k}"} for k in range(12)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This one."}]
    said = [{"image": [f"{k}.jpg" for k in range(n % 3)], "conversations": turns * (1 + n % 2)} for n in range(12)]
    (folder / "said.jsonl").write_text("\n".join(map(json.dumps, said)))
    return folder


@pytest.fixture(scope="module", params=["pairs", "moments", "conversations"])
def made(request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "out"
    if request.param == "conversations":
        prepare(out, DocumentSource([inputs / "said.jsonl"], kind="conversations"), samples_per_shard=4)
    else:
        fields = CaptionFields.parse(["zh=zh", "en=en"])
        encoders = [Halves(), Teacher()] if request.param == "moments" else []
        source = TableSource([inputs / "pairs.jsonl"], captions=fields, image="image")
        prepare(out, source, encoders=encoders, keep_pictures=not encoders, samples_per_shard=4)
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_whole(made: Path) -> None:
    index, unchecked = verify(made, tokenizer=tokenizer_file())
    assert len(index) == 12
    assert unchecked == []
    assert verify(made)[1] == ["tokens were not counted again, which needs --tokenizer"]


def test_the_index_made_anew_is_the_same(made: Path, copied: Path) -> None:
    shutil.rmtree(copied / "index")
    rebuild_index(copied, codec=None, tokenizer=tokenizer_file())
    assert contents(copied) == contents(made)

    shutil.rmtree(copied / "index")
    (copied / INDEX_NAME).unlink()
    with pytest.raises(ValueError, match="no index that says what its pictures are for: give --image_size, and"):
        rebuild_index(copied, codec=None, tokenizer=tokenizer_file())
    rebuild_index(copied, codec=CODEC, tokenizer=tokenizer_file())
    before, after = (json.loads((folder / INDEX_NAME).read_text()) for folder in (made, copied))
    assert after.pop("made_by") == {"source": "tars"}
    before.pop("made_by")
    if before["teacher"]:
        before["teacher"]["fingerprint"] = "unknown"
    assert after == before
    assert verify(copied, tokenizer=tokenizer_file())[1] == []


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte[0] ^ 1]))


def truncate(file: Path, size: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(size)


FIRST = "train-000000.tar"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte-of-a-shard": (lambda d: flip(d / FIRST, 700), f"shard .*{FIRST} was altered, its SHA-256"),
    "short-shard": (lambda d: truncate(d / FIRST, 1024), f"shard .*{FIRST} has 1,024 bytes, the index says"),
    "no-shard": (lambda d: (d / FIRST).unlink(), f"shard .*{FIRST} is missing"),
    "byte-of-a-column": (lambda d: flip(d / column_path("size"), 130), "column .*index/size.npy was altered"),
    "short-column": (lambda d: truncate(d / column_path("kind"), 130), "index/kind.npy has 130 bytes, index.json says"),
    "no-column": (lambda d: (d / column_path("offset")).unlink(), "index/offset.npy is missing"),
    "torn-index": (lambda d: truncate(d / INDEX_NAME, 100), "index.json is not a complete index"),
    "no-index": (lambda d: (d / INDEX_NAME).unlink(), "no data set at"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(copied: Path, damage: str) -> None:
    harm, message = DAMAGES[damage]
    harm(copied)
    with pytest.raises(ValueError, match=message):
        verify(copied, tokenizer=tokenizer_file())


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_lie_consistently_are_named(copied: Path, name: str) -> None:
    """The checksum is right, but the shard holds something else."""
    file = copied / column_path(name)
    values = np.load(file)
    if name == "text_start":
        values[1] = 0 if values[1] else 1
    else:
        values[0] ^= 1
    np.save(file, values)
    header = json.loads((copied / INDEX_NAME).read_text())
    header["columns"][name]["sha256"] = sha256_of(file)
    (copied / INDEX_NAME).write_text(json.dumps(header))
    with pytest.raises(ValueError, match=rf"column index/{name}.npy is not what shard .*{FIRST} holds"):
        verify(copied, tokenizer=tokenizer_file())


def test_every_fault_is_named(copied: Path) -> None:
    shards = Index.load(copied).shards
    for shard in shards:
        flip(copied / shard.name, 700)
    every = ".*".join(f"{shard.name} was altered" for shard in shards)
    with pytest.raises(ValueError, match=every):
        verify(copied, tokenizer=tokenizer_file())


def test_another_tokenizer(copied: Path, shapes_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another tokenizer than the one that index.json names"):
        verify(copied, tokenizer=str(shapes_dir))


def test_tars_that_are_not_ours(copied: Path) -> None:
    flip(copied / FIRST, 150)
    with pytest.raises(ValueError, match=rf"{FIRST}: at 0 the header of a member is damaged"):
        scan_shard(copied / FIRST, tokenizer=None)
    with pytest.raises(ValueError, match=r"holds no shard: expected train-000000.tar"):
        rebuild_index(copied.parent, codec=CODEC, tokenizer=tokenizer_file())


def test_a_shard_cut_between_two_samples(copied: Path) -> None:
    index = Index.load(copied)
    truncate(copied / FIRST, int(index.offset[1]))
    with pytest.raises(ValueError, match=rf"{FIRST} was cut off at [\d,]+ bytes: copy or prepare the data set anew"):
        rebuild_index(copied, codec=None, tokenizer=tokenizer_file())


def test_opening_a_large_index_costs_little(tmp_path: Path) -> None:
    samples, per_shard = 2_000_000, 4096
    shards: list[Shard] = []
    columns: list[dict[str, NDArray[Any]]] = []
    for first in range(0, samples, per_shard):
        count = min(per_shard, samples - first)
        none = np.zeros(count, np.uint8)
        shards.append(Shard(name=f"train-{first:09d}.tar", split="train", samples=count, bytes=1, sha256="0" * 64))
        names = {"size", "kind", "images", "learned", "paints"}
        columns.append(dict.fromkeys(names, none) | {"offset": np.arange(first, first + count), "texts": none + 2})
        columns[-1] |= {"text_tokens": np.arange(2 * count), "text_language": np.repeat(none, 2)}
    header = {"made_by": {}, "image_size": 8, "codec": "", "tokenizer": "", "num_tokens": 1, "channels": 1, "languages": ["en"]}
    header |= {"pictures": True, "moments": False, "flipped": False, "teacher": None}
    write_index(tmp_path, shards=shards, columns=columns, **header)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    index = Index.load(tmp_path)
    assert resident() - before < 20e6  # the columns have 70 MB
    assert len(index) == samples
    np.testing.assert_array_equal(index.offset[[0, 4095, 4096, -1]], [0, 4095, 4096, samples - 1])
    assert index.text_start[-1] == 2 * samples
    with pytest.raises(ValueError, match="has no validation samples"):
        ShardReader(tmp_path, index=index, split="validation")


def test_a_run_keeps_the_index_that_it_has_open(copied: Path) -> None:
    before = Index.load(copied)
    saved = {name: getattr(before, name).copy() for name in COLUMNS}
    (copied / before.shards[-1].name).unlink()
    assert len(rebuild_index(copied, codec=None, tokenizer=tokenizer_file())) < len(before)
    for name, values in saved.items():  # a file that is cut off under a mapping ends the process when it is read
        np.testing.assert_array_equal(getattr(before, name), values)
