import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mmar_megatron.data import shapes
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.data.shards import SPLITS, Index, ShardReader, ShardWriter, Split, UndecodableImageError, encode_image, verify
from tests.unit.data.conftest import TRAIN, VALIDATION
from tests.unit.data.damage import damage_image

CODEC = PatchCodec(image_size=32, patch_size=4)


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
    assert [sample["__key__"] for sample in samples] == index.shards[0].keys
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["png"], reader.read(number).image_HW3)
        assert sample["json"] == reader.metadata(number)


def test_several_shards_and_the_ids_across_them(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, samples_per_shard=3)
    for number in range(10):
        image = encode_image(np.full((4, 4, 3), number, np.uint8))
        split: Split = "train" if number < 7 else "validation"
        writer.add(f"k{number}", split=split, image=image, metadata={"number": number}, caption_tokens={})
    writer.finish(made_by={}, image_size=4, codec="", tokenizer="")
    index = verify(tmp_path)
    assert [(shard.name, len(shard.keys)) for shard in index.shards] == [
        ("train-000000.tar", 3),
        ("train-000001.tar", 3),
        ("train-000002.tar", 1),
        ("validation-000000.tar", 3),
    ]
    samples = [
        reader.read(number)
        for reader in (ShardReader(tmp_path, index=index, split=split) for split in SPLITS)
        for number in range(len(reader))
    ]
    assert [sample.sample_id for sample in samples] == list(range(10))
    assert [sample.metadata["number"] for sample in samples] == list(range(10))
    assert [int(sample.image_HW3[0, 0, 0]) for sample in samples] == list(range(10))


def test_the_same_settings_give_the_same_bytes(shapes_dir: Path, tmp_path: Path) -> None:
    make_shapes(tmp_path / "again", codec=CODEC, train=TRAIN, validation=VALIDATION, log=lambda _: None)
    for file in shapes_dir.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "again").iterdir())) == len(list(shapes_dir.iterdir())) == 4


def test_the_cache_is_bounded_and_changes_nothing(shapes_dir: Path) -> None:
    index = Index.load(shapes_dir)
    cached = ShardReader(shapes_dir, index=index, split="train", cache_bytes=20_000)
    plain = ShardReader(shapes_dir, index=index, split="train")
    for number in (*range(TRAIN), *range(TRAIN)):
        np.testing.assert_array_equal(cached.read(number).image_HW3, plain.read(number).image_HW3)
    assert cached.read(0) is cached.read(0)
    assert cached.read(TRAIN - 1) is not cached.read(TRAIN - 1)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"make one with `python tools/prepare_data.py shapes --out .*nowhere`"):
        Index.load(tmp_path / "nowhere")


def test_other_format(shapes_copy: Path) -> None:
    file = shapes_copy / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99, this program reads 1"):
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
    with pytest.raises(UndecodableImageError):
        reader.read(3)
    replaced = {
        number: (sample.sample_id, skipped) for number in range(TRAIN) for sample, skipped in [reader.read_or_next(number)]
    }
    expected = {number: (number, 0) for number in range(TRAIN)} | {3: (5, 2), 4: (5, 1), TRAIN - 1: (0, 1)}
    assert replaced == expected


def test_no_decodable_image_at_all(shapes_copy: Path) -> None:
    for number in range(VALIDATION):
        damage_image(shapes_copy, split="validation", number=number)
    reader = ShardReader(shapes_copy, index=Index.load(shapes_copy), split="validation")
    with pytest.raises(ValueError, match=r"no image in .* can be decoded"):
        reader.read_or_next(0)


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
