"""Small data sets made by hand: content with images, captions in two languages, and one with moments alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmar_megatron.config import CodecConfig, DataConfig, SourceConfig
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.content import count_texts
from mmar_megatron.data.index import Split
from mmar_megatron.data.inspection.opening import StoredCodec
from mmar_megatron.data.shards import encode_image
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.tokenizer import load_tokenizer
from tests.unit.data.writing import ShardWriter

CODEC = PatchCodec(image_size=32, patch_size=4)
SHAPES, TALKS, SEQUENCE_LENGTH = "shapes", "talks", 256


def picture(seed: int) -> NDArray[np.uint8]:
    """Noise: no two parts of it are alike."""
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def talks() -> list[tuple[Split, dict[str, Any], int]]:
    """(split, json, number of pictures) of samples of all kinds."""
    question = {"text": "what is <this>? & ", "learn": False}
    answer = {"text": "a red circle", "learn": True, "end": True}
    conversation = [{"image": 0}, question, answer, {"image": 1}, {"text": "and that?"}, answer]
    document = [{"text": "a text <without> any picture, &amp; learned to its end", "learn": True, "end": True}]
    story = [{"text": "first "}, {"image": 0}, {"text": "then "}, {"image": 1, "learn": True}]
    captions = {"en": ["a small blue square", "a square"], "zh": ["蓝色的小方块"]}
    sizes = [(640, 480), (480, 640), (500, 500)]
    samples: list[tuple[Split, dict[str, Any], int]] = []
    for number in range(24):
        width, height = sizes[number % 3]
        pair = {"captions": captions, "width": width, "height": height}
        contents: list[tuple[dict[str, Any], int]] = [({"content": conversation}, 2), ({"content": document}, 0)]
        contents += [({"content": story}, 2), (pair, 1)]
        metadata, pictures = contents[number % 4]
        samples.append(("train" if number < 20 else "validation", metadata, pictures))
    return samples


def write(
    out: Path,
    *,
    samples: Sequence[tuple[Split, Mapping[str, Any], int]],
    tokenizer: Path,
    moments: bool = False,
) -> Path:
    """A data set; with moments in place of pixels, or with pixels."""
    out.mkdir()
    shutil.copy(tokenizer, out / "tokenizer.model")
    loaded = load_tokenizer(out)
    writer = ShardWriter(out, samples_per_shard=16)
    for number, (split, metadata, pictures) in enumerate(samples):
        stored = [] if moments else [encode_image(picture(10 * number + k)) for k in range(pictures)]
        arrays = {"moments": np.zeros((pictures, 2, CODEC.num_tokens, 4), dtype=np.float16)} if moments and pictures else {}
        counts = count_texts(metadata, count=lambda text: len(loaded.encode(text)), languages=["en", "zh"])
        writer.add(f"talk_{number:02d}", split=split, metadata=metadata, pictures=stored, arrays=arrays, counts=counts)
    sizes = {"image_size": 32, "num_tokens": CODEC.num_tokens, "channels": 4, "codec": "vae 0123456789"}
    writer.finish(
        codec=StoredCodec(sizes) if moments else CODEC,
        tokenizer=loaded.fingerprint,
        made_by={"source": "talks"},
        pictures=not moments,
        moments=moments,
        languages=["en", "zh"],
    )
    return out


@pytest.fixture(scope="session")
def talks_dir(shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = write(tmp_path_factory.mktemp("talks") / TALKS, samples=talks(), tokenizer=shapes_dir / "tokenizer.model")
    report = {"samples": {"train": 20, "validation": 4}, "dropped": {"too small": 7}, "examples": {"too small": ["<a>.jpg"]}}
    (out / "report.json").write_text(json.dumps({**report, "seconds": 0.25, "directory": "elsewhere"}))
    return out


@pytest.fixture(scope="session")
def moments_dir(shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("moments") / "moments",
        samples=talks(),
        tokenizer=shapes_dir / "tokenizer.model",
        moments=True,
    )


@pytest.fixture(scope="session")
def mix_config(shapes_dir: Path, talks_dir: Path) -> DataConfig:
    return DataConfig(
        sources={
            SHAPES: SourceConfig(path=str(shapes_dir), weight=1.0),
            TALKS: SourceConfig(path=str(talks_dir), weight=3.0),
        },
        codec=CodecConfig(image_size=32, patch_size=4),
        languages=["en", "zh"],
        sequence_length=SEQUENCE_LENGTH,
        packing=True,
        packing_window=400,
    )


@pytest.fixture(scope="session")
def mix(mix_config: DataConfig) -> DataSource:
    return DataSource(mix_config)
