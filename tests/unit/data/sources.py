"""Small inputs of every kind, for the tests of preparing."""

from __future__ import annotations

import atexit
import functools
import io
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.index import SPLITS, Index
from mmar_megatron.data.preparation.recipe import Recipe
from mmar_megatron.data.preparation.records import Source
from mmar_megatron.data.preparation.report import REPORT_NAME, Report
from mmar_megatron.data.prepare import Preparation
from mmar_megatron.data.shards import Sample, ShardReader
from mmar_megatron.data.tokenizer import train_sentencepiece

SIZE = 32
CODEC = PatchCodec(image_size=SIZE, patch_size=8)


def scene(seed: int, *, width: int = 80, height: int = 60) -> Image.Image:
    """A picture that no other seed gives: coloured clouds."""
    noise = np.random.default_rng(seed).integers(256, size=(6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


def encoded(image: Image.Image, *, format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def picture(seed: int, **size: int) -> bytes:
    return encoded(scene(seed, **size), quality=95)


def write_tar(file: Path, members: Mapping[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(file, "w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


@functools.cache
def tokenizer_file() -> str:
    """A small tokenizer, for data that are too few to train one on."""
    folder = Path(tempfile.mkdtemp(prefix="mmar-tokenizer-"))
    atexit.register(shutil.rmtree, folder)
    texts = [f"{word} {other}" for word in ("one", "two", "caption", "picture") for other in ("of", "the", "a", "some")]
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(texts, vocab_size=300))
    return str(folder / "tokenizer.model")


def prepare(out: Path, source: Source, **options: Any) -> Report:
    """With a small recipe; options are those of Preparation, or of Recipe."""
    lines: list[str] = options.pop("lines", [])
    names = {"encoders", "workers", "rank", "ranks", "tokenizer", "resume"}
    rest = {name: options.pop(name) for name in list(options) if name in names}
    rest.setdefault("tokenizer", tokenizer_file())
    recipe = Recipe(**({"image_size": SIZE, "vocab_size": 300, "validation": 0.2, "samples_per_shard": 8} | options))
    report = Preparation(out=out, source=source, codec=CODEC, recipe=recipe, log=lines.append, **rest).run()
    assert report is not None
    return report


def samples_of(directory: Path) -> dict[str, Sample]:
    """All samples by key."""
    index = Index.load(directory)
    readers = [ShardReader(directory, index=index, split=split) for split in SPLITS if index.count(split)]
    samples = [reader.read(number) for reader in readers for number in range(len(reader))]
    assert [sample.sample_id for sample in samples] == list(range(len(index)))
    return {sample.key: sample for sample in samples}


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the report, which has the time it took."""
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != REPORT_NAME]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


class Halves:
    """Encoders' arrays that are easy to tell: of each picture its mean colour in the middle of the image's tokens."""

    fingerprint = "halves"

    def __call__(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        mean_B = pixels_BHW3.mean(axis=(1, 2, 3))
        shape = (len(pixels_BHW3), 2, CODEC.num_tokens, CODEC.channels)
        moments = np.broadcast_to(mean_B[:, None, None, None], shape)
        return {"moments": moments, "flipped": -moments}


class Teacher:
    fingerprint = "a teacher"

    def __call__(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        return {"teacher": np.broadcast_to(pixels_BHW3.max(axis=(1, 2, 3))[:, None, None], (len(pixels_BHW3), 16, 5))}
