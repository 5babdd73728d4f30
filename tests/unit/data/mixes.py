"""Data sets of content: texts, conversations about one picture or two, pictures to be painted. Made beside a shapes set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmar_megatron.data.codec import ImageCodec
from mmar_megatron.data.content import count_texts
from mmar_megatron.data.index import SPLITS
from mmar_megatron.data.shards import encode_image
from mmar_megatron.data.tokenizer import load_tokenizer
from tests.unit.data.writing import ShardWriter

WORDS = ["a", "large", "red", "circle", "small", "blue", "square", "at", "the", "top", "left", "on", "white", "background"]


def sentence(generator: np.random.Generator, *, words: int) -> str:
    return " ".join(generator.choice(WORDS, words))


def talk(number: int) -> list[dict[str, Any]]:
    """The parts of one sample: text alone, a question about a picture, one about two, a picture to be painted after another."""
    generator = np.random.default_rng(number)
    question = {"text": f"what is {sentence(generator, words=3)}?"}
    answer = {"text": sentence(generator, words=int(generator.integers(2, 12))), "learn": True, "end": True}
    kinds: list[list[dict[str, Any]]] = [
        [{"text": sentence(generator, words=int(generator.integers(2, 30))), "learn": True, "end": True}],
        [{"image": 0}, question, answer],
        [{"image": 0}, question, {"image": 1}, answer, question, answer],
        [{"image": 0}, question, {"image": 1, "learn": True}],
    ]
    return kinds[number % 4]


def write_talks(
    out: Path, *, tokenizer: Path, codec: ImageCodec, contents: dict[str, Sequence[list[dict[str, Any]]]] | None = None
) -> Path:
    """A data set of such samples, or of these."""
    loaded = load_tokenizer(tokenizer)
    contents = contents or {"train": [talk(i) for i in range(90)], "validation": [talk(i) for i in range(1000, 1012)]}
    out.mkdir()
    writer = ShardWriter(out, samples_per_shard=32)
    for split in SPLITS:
        for number, parts in enumerate(contents.get(split, [])):
            pictures = sum("image" in part for part in parts)
            generator = np.random.default_rng((number, split == "train"))
            size = (codec.image_size, codec.image_size, 3)
            writer.add(
                f"{split}{number:04d}",
                split=split,
                pictures=[encode_image(generator.integers(0, 255, size, dtype=np.uint8)) for _ in range(pictures)],
                metadata={"content": parts},
                counts=count_texts({"content": parts}, count=lambda text: len(loaded.encode(text)), languages=[]),
            )
    writer.finish(codec=codec, tokenizer=loaded.fingerprint)
    return out
