import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mmar_megatron.data import shapes
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.content import TextCounts
from mmar_megatron.data.index import COLUMNS, CONTENT, PAIR, SPLITS, BadDataError, Index, Split
from mmar_megatron.data.preparation.report import REPORT_NAME
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.data.shards import ShardReader, UndecodableSampleError, encode_image
from mmar_megatron.data.verify import verify
from tests.unit.data.conftest import TRAIN, VALIDATION
from tests.unit.data.damage import damage_image
from tests.unit.data.writing import ShardWriter

CODEC = PatchCodec(image_size=32, patch_size=4)


def contents(directory: Path) -> dict[str, bytes]:
    """All but the report, which has the time it took."""
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != REPORT_NAME]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def test_samples_are_what_was_drawn(shapes_dir: Path) -> None:
    index = Index.load(shapes_dir)
    assert (index.count("train"), index.count("validation")) == (TRAIN, VALIDATION)
    reader = ShardReader(shapes_dir, index=index, split="validation")
    for number, scene in enumerate(shapes.draw_scenes(VALIDATION, split="validation", seed=0)):
        sample = reader.read(number)
        assert sample.sample_id == TRAIN + number
        assert sample.captions == {"en": [scene.caption]}
        assert shapes.Scene.from_spec(sample.metadata["spec"]) == scene
        np.testing.assert_array_equal(sample.image_HW3, shapes.render(scene, image_size=32))


def test_webdataset_reads_the_tars(shapes_dir: Path) -> None:
    index = Index.load(shapes_dir)
    reader = ShardReader(shapes_dir, index=index, split="train")
    pipeline = webdataset.WebDataset(str(shapes_dir / "train-000000.tar"), shardshuffle=False).decode("rgb8")
    samples = list(pipeline)
    assert [sample["__key__"] for sample in samples] == [reader.read(number).key for number in range(TRAIN)]
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["png"], reader.read(number).image_HW3)
        assert sample["json"] == reader.metadata(number)


HEADER: dict[str, Any] = {"codec": PatchCodec(image_size=4, patch_size=2), "tokenizer": "", "languages": ["en"]}


def test_several_shards_and_the_ids_across_them(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, samples_per_shard=3)
    for number in range(10):
        image = encode_image(np.full((4, 4, 3), number, np.uint8))
        split: Split = "train" if number < 7 else "validation"
        counts = TextCounts(kind=PAIR, tokens=[number] * (number % 3), languages=[0] * (number % 3))
        writer.add(f"k{number}", split=split, pictures=[image], metadata={"captions": {}, "number": number}, counts=counts)
    writer.finish(**HEADER)
    index = Index.load(tmp_path)
    assert [(shard.name, shard.samples) for shard in index.shards] == [
        ("train-000000.tar", 3),
        ("train-000001.tar", 3),
        ("train-000002.tar", 1),
        ("validation-000000.tar", 3),
    ]
    assert [index.ids(split) for split in SPLITS] == [range(7), range(7, 10)]
    assert index.shard_of(np.arange(10)).tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert index.text_start.tolist() == np.cumsum([0, *(number % 3 for number in range(10))]).tolist()
    assert index.text_tokens.tolist() == [number for number in range(10) for _ in range(number % 3)]
    samples = [
        reader.read(number)
        for reader in (ShardReader(tmp_path, index=index, split=split) for split in SPLITS)
        for number in range(len(reader))
    ]
    assert [sample.sample_id for sample in samples] == list(range(10))
    assert [sample.metadata["number"] for sample in samples] == list(range(10))
    assert [int(sample.image_HW3[0, 0, 0]) for sample in samples] == list(range(10))


def test_all_that_a_sample_can_hold(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(256, size=(3, 4, 4, 3), dtype=np.uint8)
    arrays = {
        "moments": generator.standard_normal((3, 2, 4, 3)).astype(np.float16),
        "flipped": generator.standard_normal((3, 2, 4, 3)).astype(np.float16),
        "teacher": generator.standard_normal((3, 4, 5)).astype(np.float16),
    }
    content = [{"image": 0}, {"text": "a" * 20_000, "learn": True, "end": True}, {"image": 1}, {"image": 2, "learn": True}]
    writer = ShardWriter(tmp_path, samples_per_shard=3)
    counts = TextCounts(kind=CONTENT, tokens=[7], languages=[255], learned=7, paints=True)
    pictures = [encode_image(image) for image in pixels]
    writer.add("all", split="train", pictures=pictures, metadata={"content": content}, arrays=arrays, counts=counts)
    arrays.pop("flipped")
    writer.add("moments", split="train", metadata={"content": content}, arrays=arrays, counts=counts)
    text = TextCounts(kind=CONTENT, tokens=[3], languages=[255], learned=3)
    writer.add("text", split="train", metadata={"content": [{"text": "a b", "learn": True, "end": True}]}, counts=text)
    index = writer.finish(**HEADER)
    columns = [index.kind, index.images, index.learned, index.paints, index.text_tokens, index.text_language]
    assert [column.tolist() for column in columns] == [[1] * 3, [3, 3, 0], [7, 7, 3], [1, 1, 0], [7, 7, 3], [255] * 3]
    assert index.offset[1] == index.size[0]

    reader = pickle.loads(pickle.dumps(ShardReader(tmp_path, index=index, split="train", cache_bytes=10**6)))
    for number, key in enumerate(("all", "moments", "text")):
        sample = reader.read(number)
        assert (sample.key, sample.content, sample.captions) == (key, reader.metadata(number)["content"], {})
        sample.decode()
        for name, found in (("moments", sample.moments_I2NC), ("teacher", sample.teacher_INF)):
            if key == "text":
                assert found is None
            else:
                np.testing.assert_array_equal(found, arrays[name])
    assert (reader.read(0).flipped_I2NC is None, reader.read(1).flipped_I2NC is None) == (False, True)
    np.testing.assert_array_equal(reader.read(0).images, pixels)
    assert (reader.read(1).images, reader.read(2).num_pictures) == ([], 0)
    with pytest.raises(UndecodableSampleError, match=r"train-000000.tar at 0: it has no picture 3, but json, 0.png, 1.png"):
        reader.read(0).image(3)


def test_damage_of_any_byte_is_found_or_harms_one_sample(shapes_copy: Path) -> None:
    index = Index.load(shapes_copy)
    good = ShardReader(shapes_copy, index=index, split="train").read(3)
    offset, size = int(index.offset[3]), int(index.size[3])
    shard = shapes_copy / "train-000000.tar"
    whole = shard.read_bytes()
    for position in range(0, size, 37):
        with shard.open("r+b") as file:
            file.seek(offset + position)
            file.write(bytes([whole[offset + position] ^ 0x41]))
        reader = ShardReader(shapes_copy, index=index, split="train")
        try:
            sample = reader.read(3)
            sample.decode()
            assert sample.image_HW3.shape == good.image_HW3.shape
        except UndecodableSampleError as error:
            assert f"train-000000.tar at {offset}" in str(error)
        assert reader.read(2).metadata and reader.read(4).metadata
        shard.write_bytes(whole)


def test_the_same_settings_give_the_same_bytes(shapes_dir: Path, tmp_path: Path) -> None:
    make_shapes(tmp_path / "again", codec=CODEC, train=TRAIN, validation=VALIDATION, log=lambda _: None)
    assert contents(tmp_path / "again") == contents(shapes_dir)
    assert len(contents(shapes_dir)) == 4 + len(COLUMNS)


def test_the_cache_is_bounded_and_changes_nothing(shapes_dir: Path) -> None:
    index = Index.load(shapes_dir)
    cached = ShardReader(shapes_dir, index=index, split="train", cache_bytes=20_000)
    plain = ShardReader(shapes_dir, index=index, split="train")
    for number in (*range(TRAIN), *range(TRAIN)):
        np.testing.assert_array_equal(cached.read(number).image_HW3, plain.read(number).image_HW3)
    assert cached.read(0) is cached.read(0)
    assert cached.read(TRAIN - 1) is not cached.read(TRAIN - 1)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to try things by `python tools/prepare_data.py shapes --out .*nowhere`"):
        Index.load(tmp_path / "nowhere")


def test_other_format(shapes_copy: Path) -> None:
    file = shapes_copy / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99, this program reads 2"):
        Index.load(shapes_copy)


def test_truncated_or_missing_shard_is_named(shapes_copy: Path) -> None:
    index, shard = Index.load(shapes_copy), shapes_copy / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    ShardReader(shapes_copy, index=index, split="validation")
    for opening in (lambda: ShardReader(shapes_copy, index=index, split="train"), lambda: verify(shapes_copy)):
        with pytest.raises(ValueError, match=r"train-000000.tar has [\d,]+ bytes, the index says"):
            opening()
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-000000.tar is missing"):
        ShardReader(shapes_copy, index=index, split="train")


def test_altered_shard_is_named(shapes_copy: Path) -> None:
    damage_image(shapes_copy, split="validation", number=3)
    with pytest.raises(ValueError, match=r"validation-000000.tar was altered"):
        verify(shapes_copy)


def test_undecodable_image_gives_way_to_the_next(shapes_copy: Path) -> None:
    index = Index.load(shapes_copy)
    for number in (3, 4, TRAIN - 1):
        damage_image(shapes_copy, split="train", number=number)
    reader = ShardReader(shapes_copy, index=index, split="train")
    with pytest.raises(UndecodableSampleError):
        _ = reader.read(3).image_HW3
    found = [reader.read_first((number, (number + 1) % TRAIN, (number + 2) % TRAIN)).sample_id for number in range(TRAIN)]
    assert found == [0, 1, 2, 5, 5, *range(5, TRAIN - 1), 0]


def test_no_decodable_image_at_all(shapes_copy: Path) -> None:
    for number in range(VALIDATION):
        damage_image(shapes_copy, split="validation", number=number)
    reader = ShardReader(shapes_copy, index=Index.load(shapes_copy), split="validation")
    with pytest.raises(BadDataError, match=r"no validation sample of .* can be decoded"):
        reader.read_first(range(VALIDATION))


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tarfile.TarFile, "addfile", fail)
    with pytest.raises(OSError, match="disk full"):
        make_shapes(tmp_path / "new", codec=CODEC, train=TRAIN, validation=8, log=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_left_alone(shapes_dir: Path) -> None:
    before = sorted(shapes_dir.parent.rglob("*"))
    with pytest.raises(ValueError, match=r"shapes exists: remove it or choose another --out"):
        make_shapes(shapes_dir, codec=CODEC, log=lambda _: None)
    assert sorted(shapes_dir.parent.rglob("*")) == before
