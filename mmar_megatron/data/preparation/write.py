"""The second pass: shards, each made by itself. Axes: B pictures of an encoder's batch, H = W pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.codec import Encoder
from mmar_megatron.data.content import TextCounts, count_texts, cut_text
from mmar_megatron.data.index import Shard
from mmar_megatron.data.preparation.pictures import pixels_of
from mmar_megatron.data.preparation.plan import Chunk, Plan, PlannedShard
from mmar_megatron.data.preparation.pool import ordered
from mmar_megatron.data.preparation.recipe import Recipe
from mmar_megatron.data.preparation.records import Made, Raw, Source, key_of
from mmar_megatron.data.preparation.unfinished import Unfinished, atomically, read_block
from mmar_megatron.data.shard_writer import ShardColumns, ShardFile
from mmar_megatron.data.shards import encode_image
from mmar_megatron.data.tokenizer import Tokenizer, load_tokenizer


class Ready(NamedTuple):
    """A sample, but for what encoders make of its pictures."""

    key: str
    metadata: dict[str, Any]
    counts: TextCounts
    pictures: list[bytes]
    """PNG files, where they are stored."""
    pixels: list[NDArray[np.uint8]]
    """[H, W, 3], where encoders see them."""


class Preparer:
    """Reads chunks and makes samples of them, in a worker process.

    Args:
        source: of the records.
        recipe: what is asked of them.
        blocks: folder of the blocks.
        tokenizer: path of the one that counts.
        languages: of the data set.
        encodes: whether encoders will see the pixels.
        stores: whether the pixels are stored.
    """

    def __init__(
        self,
        source: Source,
        *,
        recipe: Recipe,
        blocks: Path,
        tokenizer: str | Path,
        languages: Sequence[str],
        encodes: bool,
        stores: bool,
    ) -> None:
        self._source, self._recipe, self._blocks = source, recipe, blocks
        self._path, self._languages = tokenizer, languages
        self._encodes, self._stores = encodes, stores

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._path)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def __call__(self, chunk: Chunk) -> list[Ready | str]:
        """The samples of a chunk; in place of one of whose pictures no pixels can be made, the record's name."""
        found: list[Ready | str] = []
        for raw in self._source.read(read_block(self._blocks, chunk.block), chunk.rows):
            try:
                pictures = [pixels_of(picture, image_size=self._recipe.image_size) for picture in raw.pictures]
            except Exception:  # whatever decoders raise; the look decoded the same at a fraction of its size
                found.append(raw.name)
            else:
                found += self._samples(raw, [image_HW3 for image_HW3, _ in pictures], sizes=[size for _, size in pictures])
        return found

    def _samples(self, raw: Raw, pixels: list[NDArray[np.uint8]], *, sizes: list[tuple[int, int]]) -> Iterator[Ready]:
        # Of a picture made here there is nothing to tell.
        told = {"original_size": sizes[0]} if len(sizes) == 1 and not isinstance(raw.pictures[0], Made) else {}
        pictures = [encode_image(image_HW3) for image_HW3 in pixels] if self._stores else []
        for key, said in self._pieces(raw):
            metadata = said | {name: value for name, value in (told | raw.extra).items() if name not in said}
            counts = count_texts(metadata, count=self._count, languages=self._languages)
            yield Ready(key, metadata, counts, pictures, pixels if self._encodes else [])

    def _pieces(self, raw: Raw) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, captions or content): one, or of a long text several."""
        if raw.content is None:
            yield key_of(raw.name), {"captions": raw.captions}
            return
        texts = [raw.content[0]["text"]] if len(raw.content) == 1 and "text" in raw.content[0] else []
        pieces = [piece for text in texts for piece in cut_text(text, count=self._count, longest=self._recipe.text_tokens)]
        if len(pieces) < 2:
            yield key_of(raw.name), {"content": raw.content}
            return
        for number, piece in enumerate(pieces):
            end = number == len(pieces) - 1 and raw.content[0].get("end", False)
            yield key_of(f"{raw.name}.{number}"), {"content": [{**raw.content[0], "text": piece, "end": end}]}


def write_shards(
    unfinished: Unfinished,
    *,
    plan: Plan,
    preparer: Preparer,
    chunk_records: int,
    encoders: Sequence[Encoder],
    batch: int,
    workers: int,
    done: Callable[[int], None],
) -> None:
    """Makes this rank's shards that are not there yet."""
    missing = [shard for shard in my_shards(unfinished, plan) if not part_file(unfinished, shard).exists()]
    tasks = (chunk for shard in missing for chunk in plan.chunks(shard, records=chunk_records))
    results = ordered(preparer, tasks, workers=workers)
    for shard in missing:
        count = sum(1 for _ in plan.chunks(shard, records=chunk_records))
        _write_shard(unfinished, shard, islice(results, count), encoders=encoders, batch=batch, done=done)


def my_shards(unfinished: Unfinished, plan: Plan) -> list[PlannedShard]:
    """This rank's."""
    return plan.shards[unfinished.rank :: unfinished.ranks]


def part_file(unfinished: Unfinished, shard: PlannedShard) -> Path:
    """Which is there when the shard is done."""
    return unfinished.parts / f"{shard.name}.json"


def _write_shard(
    unfinished: Unfinished,
    planned: PlannedShard,
    results: Iterable[list[Ready | str]],
    *,
    encoders: Sequence[Encoder],
    batch: int,
    done: Callable[[int], None],
) -> None:
    file = ShardFile(unfinished.data / planned.name, split=planned.split)
    dropped: list[str] = []
    encoding = _Encoding(encoders, batch=batch)

    def samples() -> Iterator[Ready]:
        for found in results:
            for item in found:
                if isinstance(item, str):
                    dropped.append(item)
                else:
                    yield item
            done(len(found))

    try:
        for sample, arrays in encoding(samples()):
            file.add(sample.key, metadata=sample.metadata, pictures=sample.pictures, arrays=arrays, counts=sample.counts)
        shard, columns = file.close()
    except BaseException:
        file.abandon()
        raise
    with (unfinished.parts / f"{planned.name}.npz").open("wb") as stream:
        np.savez(stream, allow_pickle=False, **columns)
    content = {"shard": asdict(shard), "arrays": encoding.arrays, "dropped": len(dropped), "examples": dropped[:3]}
    atomically(part_file(unfinished, planned), json.dumps(content, ensure_ascii=False).encode())


def read_part(unfinished: Unfinished, planned: PlannedShard) -> tuple[Shard, ShardColumns, dict[str, Any]]:
    """A finished shard, its columns, and what else there is to say of it: `arrays` (see `_Encoding`), `dropped`, `examples`."""
    content = json.loads(part_file(unfinished, planned).read_bytes())
    with np.load(unfinished.parts / f"{planned.name}.npz") as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    return Shard(**content.pop("shard")), columns, content


class _Encoding:
    """Encoders over the pictures of one shard. Batches begin anew with each, so that no other shard matters.

    Attributes:
        arrays: by name of what was made, its `shape` for one picture, and the fingerprint of its `encoder`.
    """

    def __init__(self, encoders: Sequence[Encoder], *, batch: int) -> None:
        self._encoders, self._batch = encoders, batch
        self.arrays: dict[str, dict[str, Any]] = {}

    def __call__(self, samples: Iterable[Ready]) -> Iterator[tuple[Ready, dict[str, NDArray[Any]]]]:
        """Each sample with what the encoders make of its pictures."""
        waiting: list[Ready] = []
        count = 0
        for sample in samples:
            waiting.append(sample)
            count += len(sample.pixels)
            if count >= self._batch or not self._encoders:
                yield from self._encode(waiting)
                waiting, count = [], 0
        yield from self._encode(waiting)

    def _encode(self, samples: Sequence[Ready]) -> Iterator[tuple[Ready, dict[str, NDArray[Any]]]]:
        pixels = [image_HW3 for sample in samples for image_HW3 in sample.pixels]
        made: dict[str, NDArray[Any]] = {}
        if pixels:
            pixels_BHW3 = np.stack(pixels)
            for encoder in self._encoders:
                for name, rows in encoder(pixels_BHW3).items():
                    made[name] = np.asarray(rows, dtype=np.float16)
                    self.arrays[name] = {"shape": made[name].shape[1:], "encoder": encoder.fingerprint}
        first = 0
        for sample in samples:
            last = first + len(sample.pixels)
            yield sample, {name: rows[first:last] for name, rows in made.items()} if last > first else {}
            first = last
