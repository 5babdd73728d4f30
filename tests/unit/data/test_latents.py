"""What documents hold of pictures whose moments and teacher features were cached."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mmar_megatron.config import CodecConfig, DataConfig, SourceConfig, TaskConfig
from mmar_megatron.data.codec import build_codec
from mmar_megatron.data.content import count_texts
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.data.prepare import TOKENIZER_NAME
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.tokenizer import load_tokenizer, train_sentencepiece
from mmar_megatron.data.vae import VAECodec
from tests.unit.data.autoencoders import make_autoencoder
from tests.unit.data.mixes import write_talks
from tests.unit.data.writing import ShardWriter

SAMPLES, FEATURES = 12, 5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four latent tokens a picture, their mean the number of the sample (mirrored: less), their deviation 0.1."""
    directory = tmp_path_factory.mktemp("latents")
    make_autoencoder(directory / "vae", "sd")
    codec = VAECodec(directory / "vae", image_size=16)
    out = directory / "data"
    out.mkdir()
    (out / TOKENIZER_NAME).write_bytes(train_sentencepiece(["picture number"] * 4, vocab_size=275))
    tokenizer = load_tokenizer(out)
    writer = ShardWriter(out, samples_per_shard=100)
    shape = (1, codec.num_tokens, codec.channels)
    for number in range(SAMPLES):
        mean = np.full(shape, number) + np.arange(codec.num_tokens)[None, :, None] / 8
        moments = np.stack([mean, np.full(shape, 2 * np.log(0.1))], axis=1).astype(np.float16)
        teacher = np.arange(codec.num_tokens * FEATURES).reshape(1, codec.num_tokens, FEATURES) + 100 * number
        captions = {"en": [f"picture number {number}"]}
        writer.add(
            f"s{number}",
            split="train",
            metadata={"captions": captions},
            arrays={"moments": moments, "flipped": -moments, "teacher": teacher.astype(np.float16)},
            counts=count_texts({"captions": captions}, count=lambda t: len(tokenizer.encode(t)), languages=["en"]),
        )
    writer.finish(
        codec=codec,
        tokenizer=tokenizer.fingerprint,
        pictures=False,
        moments=True,
        flipped=True,
        teacher={"fingerprint": "t", "features": FEATURES},
        languages=["en"],
    )
    return directory


@pytest.fixture
def config(directory: Path) -> DataConfig:
    codec = CodecConfig(kind="vae", path=str(directory / "vae"), image_size=16, patch_size=1)
    return DataConfig(
        path=str(directory / "data"), codec=codec, sequence_length=48, num_workers=0, tasks=TaskConfig(image_to_text=0)
    )


def loader(config: DataConfig, *, teacher: bool = False) -> TrainLoader:
    source = DataSource(config, teacher=teacher)
    return TrainLoader(source, seed=3, timestep_multiplier=1, micro_batch_size=SAMPLES, global_batch_size=SAMPLES)


def test_latents_are_drawn_afresh_in_each_epoch(config: DataConfig) -> None:
    epochs = list(islice(loader(config), 40))
    drawn = np.zeros((40, SAMPLES, *epochs[0].latents_MNC.shape[1:]))
    for epoch, batch in enumerate(epochs):
        drawn[epoch, batch.sample_ids_BK[:, 0].numpy()] = batch.latents_MNC.numpy()
    mean = np.arange(SAMPLES)[:, None, None] + np.arange(drawn.shape[2])[None, :, None] / 8
    np.testing.assert_allclose(drawn.mean(axis=0), np.broadcast_to(mean, drawn.shape[1:]), atol=0.1)
    np.testing.assert_allclose((drawn - mean).std(), 0.1, rtol=0.05)
    again = next(iter(loader(config)))
    assert (again.latents_MNC == epochs[0].latents_MNC).all()


def test_nothing_of_the_auto_encoder_is_loaded_for_it(config: DataConfig) -> None:
    found = loader(config)
    next(iter(found))
    codec = found.source.codec
    assert isinstance(codec, VAECodec)
    assert codec._model is None
    assert codec.fingerprint == build_codec(config.codec).fingerprint


def test_mirrored_latents_and_features(config: DataConfig) -> None:
    flipped = next(iter(loader(replace(config, horizontal_flip=1.0), teacher=True)))
    assert (flipped.latents_MNC.mean(dim=(1, 2))[flipped.sample_ids_BK[:, 0] > 1] < 0).all()
    plain = next(iter(loader(config, teacher=True)))
    assert plain.teacher_MNF is not None
    assert flipped.teacher_MNF is not None
    side = int(plain.teacher_MNF.shape[1] ** 0.5)
    grid = plain.teacher_MNF.reshape(SAMPLES, side, side, FEATURES)
    assert (flipped.teacher_MNF.reshape(grid.shape) == grid.flip(2)).all()
    numbers = plain.sample_ids_BK[:, 0]
    assert (plain.teacher_MNF[:, 0, 0] == 100 * numbers).all()
    assert int(plain.num_aligned) == int(plain.visible_MN.sum())
    assert next(iter(loader(config))).teacher_MNF is None


def test_what_the_data_lack_is_refused(config: DataConfig, tmp_path: Path) -> None:
    make_autoencoder(tmp_path / "other", "sd", seed=1)
    other = replace(config.codec, path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"was made for the codec \(vae, \w+.*\), data.codec is \(vae, \w+"):
        DataSource(replace(config, codec=other))
    index = tmp_path / "data"
    index.mkdir()
    for file in Path(config.path).iterdir():
        (index / file.name).symlink_to(file)
    header = (index / "index.json").read_text()
    (index / "index.json").unlink()
    header = header.replace('"flipped":true', '"flipped":false')
    (index / "index.json").write_text(header.replace('"teacher":{"fingerprint":"t","features":5}', '"teacher":null'))
    lacking = replace(config, path=str(index))
    with pytest.raises(ValueError, match=r"no latents of mirrored pictures, but data.horizontal_flip is 0.5"):
        DataSource(replace(lacking, horizontal_flip=0.5))
    with pytest.raises(ValueError, match=r"holds no teacher features: set model.alignment_loss_weight to 0"):
        DataSource(lacking, teacher=True)


def test_features_of_two_teachers_are_refused(config: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(config.path, tmp_path / "data")
    header = tmp_path / "data" / "index.json"
    header.write_text(header.read_text().replace('"teacher":{"fingerprint":"t"', '"teacher":{"fingerprint":"u"'))
    sources = {name: SourceConfig(path=path) for name, path in (("one", config.path), ("other", str(tmp_path / "data")))}
    with pytest.raises(ValueError, match=r"has the teacher's features .*'t'.*, but .*'u'.*: prepare one of them anew"):
        DataSource(replace(config, sources=sources), teacher=True)


def test_each_picture_of_a_talk_has_its_own_latents_and_features(config: DataConfig, tmp_path: Path) -> None:
    codec, tokenizer = build_codec(config.codec), load_tokenizer(Path(config.path))
    content = [{"image": 0}, {"image": 1}, {"text": "picture number", "learn": True, "end": True}]
    number_INC = np.broadcast_to(np.arange(2.0)[:, None, None], (2, codec.num_tokens, codec.channels))
    moments_I2NC = np.stack([number_INC, np.full_like(number_INC, -20)], axis=1)
    writer = ShardWriter(tmp_path, samples_per_shard=1)
    writer.add(
        "s",
        split="train",
        metadata={"content": content},
        arrays={"moments": moments_I2NC.astype(np.float16), "teacher": number_INC.astype(np.float16)},
        counts=count_texts({"content": content}, count=lambda text: len(tokenizer.encode(text)), languages=[]),
    )
    teacher = {"fingerprint": "t", "features": codec.channels}
    writer.finish(codec=codec, tokenizer=tokenizer.fingerprint, pictures=False, moments=True, teacher=teacher)
    talks = replace(config, path=str(tmp_path), tokenizer=config.path)
    source = DataSource(talks, teacher=True)
    batch = next(iter(TrainLoader(source, seed=3, timestep_multiplier=1, micro_batch_size=1, global_batch_size=1)))
    assert batch.teacher_MNF is not None
    np.testing.assert_allclose(batch.latents_MNC, number_INC, atol=0.01)
    np.testing.assert_array_equal(batch.teacher_MNF, number_INC)


def test_texts_need_no_latents(config: DataConfig, tmp_path: Path) -> None:
    codec, parts = build_codec(config.codec), [{"text": "picture number", "learn": True, "end": True}]
    notes = write_talks(tmp_path / "notes", tokenizer=Path(config.path), codec=codec, contents={"train": [parts]})
    sources = {"pictures": SourceConfig(path=config.path), "notes": SourceConfig(path=str(notes))}
    mixed = replace(config, sources=sources, horizontal_flip=0.5)
    assert DataSource(mixed, teacher=True).teacher_features == FEATURES
    alone = replace(config, path=str(notes), tokenizer=config.path)
    with pytest.raises(ValueError, match=r"no pictures to align: set model.alignment_loss_weight to 0"):
        DataSource(alone, teacher=True)


def test_a_picture_of_which_latents_alone_are_stored(config: DataConfig) -> None:
    source = DataSource(config)
    sample = source.reader("train").read(3)
    assert sample.num_pictures == 0
    moments_I2NC = sample.moments_I2NC
    assert moments_I2NC is not None
    expected_HW3 = source.codec.decode(moments_I2NC[0, 0].astype(np.float32))
    np.testing.assert_array_equal(source.picture(sample), expected_HW3)
