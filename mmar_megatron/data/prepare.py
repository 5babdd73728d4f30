"""Making a data set: records -> tokenizer, shards and index, all of it or nothing.

Everything is written into a directory beside the final one, which takes the final name when complete.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data import shapes
from mmar_megatron.data.codec import ImageCodec, build_codec
from mmar_megatron.data.content import count_texts
from mmar_megatron.data.index import INDEX_NAME, NO_LANGUAGE, SPLITS, Index, Split
from mmar_megatron.data.shard_writer import ShardWriter
from mmar_megatron.data.shards import encode_image
from mmar_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

if TYPE_CHECKING:
    from mmar_megatron.config import DataConfig

TOKENIZER_NAME = "tokenizer.model"


@dataclass(kw_only=True)
class Record:
    """One sample to be written."""

    key: str
    """Unique in the data set, and without dots: in a tar, what follows the first dot is the kind of member."""
    split: Split
    captions: dict[str, list[str]]
    """By language."""
    image: Callable[[], NDArray[np.uint8]]
    """Makes the picture: uint8 [H, W, 3]."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else to store."""


@dataclass(kw_only=True)
class Report:
    """What was made."""

    directory: Path
    samples: dict[Split, int]
    dropped: dict[str, int]
    """By reason."""
    bytes: int
    vocab_size: int
    caption_tokens: dict[str, tuple[float, int]]
    """By language, mean and largest number of tokens of a caption."""
    seconds: float

    def __str__(self) -> str:
        kept = ", ".join(f"{count:,} {split}" for split, count in self.samples.items())
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "none"
        tokens = ", ".join(f"{lang} {mean:.1f} (at most {most})" for lang, (mean, most) in self.caption_tokens.items())
        return (
            f"{self.directory}: {kept} in {self.seconds:.1f} s\n"
            f"  dropped          {dropped}\n"
            f"  shards           {self.bytes / 1e6:.1f} MB\n"
            f"  vocabulary       {self.vocab_size:,}\n"
            f"  tokens a caption {tokens}"
        )


def write_dataset(
    out: str | Path,
    *,
    records: Sequence[Record],
    codec: ImageCodec,
    made_by: dict[str, Any],
    tokenizer: str | None = None,
    vocab_size: int,
    samples_per_shard: int = 4096,
    dropped: dict[str, int] | None = None,
    log: Callable[[str], None] = print,
) -> Report:
    """Writes a data set to the directory `out`, which appears when it is complete.

    Args:
        records: the training samples first.
        codec: the images are sized for it.
        made_by: source and settings, for the index.
        tokenizer: path of the one that counts the caption's tokens; none: one is trained on the training captions.
        vocab_size: of a tokenizer trained here, at most.
        dropped: counts by reason, for the report.
        log: takes lines about progress.

    Raises:
        ValueError: `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: remove it or choose another --out")
    begin = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        loaded = _put_tokenizer(unfinished, records=records, path=tokenizer, vocab_size=vocab_size, log=log)
        writer = ShardWriter(unfinished, samples_per_shard=samples_per_shard)
        languages = sorted({language for record in records for language in record.captions})
        for record in _with_progress(records, log=log):
            metadata = {"captions": record.captions, **record.extra}
            writer.add(
                record.key,
                split=record.split,
                pictures=[encode_image(record.image())],
                metadata=metadata,
                counts=count_texts(metadata, count=lambda text: len(loaded.encode(text)), languages=languages),
            )
        index = writer.finish(
            made_by=made_by,
            image_size=codec.image_size,
            codec=codec.fingerprint,
            tokenizer=loaded.fingerprint,
            num_tokens=codec.num_tokens,
            channels=codec.channels,
            pictures=True,
            moments=False,
            flipped=False,
            teacher=None,
            languages=languages,
        )
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    seconds = time.monotonic() - begin
    return _report(out, index=index, tokenizer=loaded, dropped=dropped or {}, seconds=seconds)


def _put_tokenizer(
    directory: Path, *, records: Sequence[Record], path: str | None, vocab_size: int, log: Callable[[str], None]
) -> Tokenizer:
    if path is not None:
        return load_tokenizer(path)
    texts = [text for r in records if r.split == "train" for group in r.captions.values() for text in group]
    log(f"training a tokenizer on {len(texts):,} captions")
    (directory / TOKENIZER_NAME).write_bytes(train_sentencepiece(texts, vocab_size=vocab_size))
    return load_tokenizer(directory)


def _with_progress(records: Sequence[Record], *, log: Callable[[str], None]) -> Iterable[Record]:
    next_line = time.monotonic() + 2
    for number, record in enumerate(records):
        if time.monotonic() >= next_line:
            log(f"{number:,} of {len(records):,} pictures written")
            next_line = time.monotonic() + 2
        yield record


def _report(out: Path, *, index: Index, tokenizer: Tokenizer, dropped: dict[str, int], seconds: float) -> Report:
    names = {NO_LANGUAGE: "text"} | dict(enumerate(index.languages))
    by_language = {names[code]: index.text_tokens[index.text_language == code] for code in np.unique(index.text_language)}
    return Report(
        directory=out,
        samples={split: index.count(split) for split in SPLITS},
        dropped=dropped,
        bytes=sum(shard.bytes for shard in index.shards),
        vocab_size=tokenizer.vocab_size,
        caption_tokens={language: (float(counts.mean()), int(counts.max())) for language, counts in by_language.items()},
        seconds=seconds,
    )


def make_shapes(
    out: str | Path,
    *,
    codec: ImageCodec,
    train: int = 8000,
    validation: int = 512,
    seed: int = 0,
    tokenizer: str | None = None,
    vocab_size: int = 400,
    log: Callable[[str], None] = print,
) -> Report:
    """Makes the `shapes` data set.

    Args:
        out: directory to make.
        codec: its image size is drawn.
        train, validation: number of pictures of each split.
        seed: other seeds give other scenes, with the same combinations held out.
        tokenizer, vocab_size, log: see `write_dataset`.

    Raises:
        ValueError: `out` exists.
    """
    records = [
        Record(
            key=f"shapes_{split}_{number:06d}",
            split=split,
            captions={"en": [scene.caption]},
            image=partial(shapes.render, scene, image_size=codec.image_size),
            extra={"spec": scene.spec},
        )
        for split, count in zip(SPLITS, (train, validation), strict=True)
        for number, scene in enumerate(shapes.draw_scenes(count, split=split, seed=seed))
    ]
    made_by = {"source": "shapes", "train": train, "validation": validation, "seed": seed}
    return write_dataset(out, records=records, codec=codec, made_by=made_by, tokenizer=tokenizer, vocab_size=vocab_size, log=log)


def ensure_data(config: DataConfig) -> None:
    """Makes the data set at `config.path` if it is one that can be generated and is not there yet, and says so in one line.

    One process calls this; the others wait for it.
    """
    if config.generate is None or (Path(config.path) / INDEX_NAME).is_file():
        return
    report = make_shapes(config.path, codec=build_codec(config.codec), tokenizer=config.tokenizer, log=lambda _: None)
    total = sum(report.samples.values())
    print(
        f"made the data set {config.path} (shapes): {total:,} pictures in {report.seconds:.1f} s; on first use only", flush=True
    )
