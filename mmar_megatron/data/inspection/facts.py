"""What the index tells of a data set, and what little of its samples is read for it.

Counts are exact: they are added up over the memory-mapped columns, piece by piece. Histograms look at no more than
`MOST_LOOKED_AT` samples, one out of each of as many equal stretches of the index: memory and time are bounded at any size.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.draw import Use, uniforms
from mmar_megatron.data.index import CONTENT, NO_LANGUAGE, PAIR, SPLITS, Index, Split
from mmar_megatron.data.shards import ShardReader, UndecodableSampleError
from mmar_megatron.data.source import DataSet
from mmar_megatron.data.storage import Storage

REPORT_NAME = "report.json"
MOST_LOOKED_AT = 1_000_000
"""Samples, for histograms."""
MOST_READ = 400
"""Samples whose json is read, for aspect ratios."""
_PIECE = 1 << 20
_BINS = 32
_SEED = 0
WITHOUT_LANGUAGE = "content"
"""Stands for the language of texts that have none."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of values, bin k being [edges[k], edges[k + 1])."""

    name: str
    unit: str
    edges: list[float]
    counts: list[int]
    mean: float
    median: float
    percentile_95: float
    least: float
    most: float

    @property
    def values(self) -> int:
        """How many there are."""
        return sum(self.counts)

    @staticmethod
    def of(values: NDArray[Any], *, name: str, unit: str) -> Histogram | None:
        """Of integers, in bins of an integer width; None where there are no values."""
        if not len(values):
            return None
        least, most = int(values.min()), int(values.max())
        width = -(-(most - least + 1) // _BINS)
        bins = (most - least) // width + 1
        counts = np.bincount((values.astype(np.int64) - least) // width, minlength=bins)
        return _histogram(values, edges=[least + width * k for k in range(bins + 1)], counts=counts, name=name, unit=unit)


def _histogram(values: NDArray[Any], *, edges: Sequence[float], counts: NDArray[Any], name: str, unit: str) -> Histogram:
    median, high = np.percentile(values, [50, 95]).tolist()
    return Histogram(
        name=name,
        unit=unit,
        edges=[float(edge) for edge in edges],
        counts=[int(count) for count in counts],
        mean=float(values.mean()),
        median=median,
        percentile_95=high,
        least=float(values.min()),
        most=float(values.max()),
    )


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """Counts of a split; exact."""

    split: Split
    samples: int
    pairs: int
    content: int
    images: int
    texts: int
    text_tokens: int
    painted: int
    """Content samples whose last image is to be painted."""
    shards: int
    bytes: int
    texts_by_language: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """One data set."""

    name: str
    path: str
    weight: float
    index: Index
    fingerprint: str
    splits: list[SplitFacts]
    looked_at: int
    """Samples that the histograms are of."""
    text_tokens: list[Histogram]
    """By language."""
    lengths: Histogram | None
    """Positions of a document that loses nothing, with one of its captions, each equally likely."""
    images: Histogram | None
    """Of a sample."""
    aspects: Histogram | None
    """Width by height of the pictures as they were."""
    aspects_read: int
    """Samples whose json was read for that."""
    report: dict[str, Any] | None
    """What preparation wrote of itself."""

    @property
    def samples(self) -> int:
        """In all splits."""
        return sum(split.samples for split in self.splits)

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(split.bytes for split in self.splits)


def gather_set(opened: DataSet) -> SetFacts:
    """All of a data set that is no matter of the stream.

    Raises:
        ValueError: a shard is missing or has not the size that the index says.
        StorageError: the bytes could not be had.
    """
    index = opened.index
    ids = spread(len(index), most=MOST_LOOKED_AT)
    aspects, read = _aspects(opened)
    images = index.images[ids]
    return SetFacts(
        name=opened.name,
        path=opened.path,
        weight=opened.weight,
        index=index,
        fingerprint=index.fingerprint,
        splits=[_split_facts(index, split) for split in SPLITS],
        looked_at=len(ids),
        text_tokens=_text_tokens(index),
        lengths=Histogram.of(_lengths(index, ids), name="Length of documents", unit="positions"),
        images=Histogram.of(images, name="Images of a sample", unit="images"),
        aspects=aspects,
        aspects_read=read,
        report=read_report(opened.storage),
    )


def spread(size: int, *, most: int) -> NDArray[np.int64]:
    """At most so many of the numbers below `size`, ascending: one of each of as many stretches, at a random place in it.

    Not every k-th: texts often come in turn (five captions to a picture, say), and a fixed step would always meet the same one.
    """
    if size <= most:
        return np.arange(size)
    stretches = np.arange(most)
    places = uniforms(stretches, seed=_SEED, epochs_P=np.zeros(most, dtype=np.int64), use=Use.ROWS)
    begins = stretches * size // most
    return begins + (places * (np.append(begins[1:], size) - begins)).astype(np.int64)


def evenly(size: int, *, most: int) -> list[int]:
    """At most so many of the numbers below `size`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(most, size)).round().astype(int)).tolist() if size else []


# --- counts ---------------------------------------------------------------------------------------------------------------------


def _pieces(begin: int, end: int) -> Iterator[slice]:
    for start in range(begin, end, _PIECE):
        yield slice(start, min(start + _PIECE, end))


def _split_facts(index: Index, split: Split) -> SplitFacts:
    ids = index.ids(split)
    shards = [shard for shard in index.shards if shard.split == split]
    counts: Counter[str] = Counter()
    for piece in _pieces(ids.start, ids.stop):
        counts["pairs"] += int(np.count_nonzero(index.kind[piece] == PAIR))
        counts["content"] += int(np.count_nonzero(index.kind[piece] == CONTENT))
        counts["images"] += int(index.images[piece].sum(dtype=np.int64))
        counts["painted"] += int(np.count_nonzero(index.paints[piece]))
    texts = slice(int(index.text_start[ids.start]), int(index.text_start[ids.stop]))
    codes = np.zeros(256, dtype=np.int64)
    tokens = 0
    for piece in _pieces(texts.start, texts.stop):
        codes += np.bincount(index.text_language[piece], minlength=256)
        tokens += int(index.text_tokens[piece].sum(dtype=np.int64))
    return SplitFacts(
        split=split,
        samples=len(ids),
        pairs=counts["pairs"],
        content=counts["content"],
        images=counts["images"],
        painted=counts["painted"],
        texts=texts.stop - texts.start,
        text_tokens=tokens,
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        texts_by_language={_language(index, code): int(codes[code]) for code in np.flatnonzero(codes).tolist()},
    )


def _language(index: Index, code: int) -> str:
    return WITHOUT_LANGUAGE if code == NO_LANGUAGE else index.languages[code]


# --- histograms -----------------------------------------------------------------------------------------------------------------


def _text_tokens(index: Index) -> list[Histogram]:
    places = spread(len(index.text_tokens), most=MOST_LOOKED_AT)
    tokens, codes = index.text_tokens[places], index.text_language[places]
    found = []
    for code in np.unique(codes).tolist():
        language = _language(index, code)
        what = "Text of a content sample" if code == NO_LANGUAGE else f"A caption in “{language}”"
        histogram = Histogram.of(tokens[codes == code], name=what, unit="tokens")
        found += [histogram] if histogram else []
    return found


def _lengths(index: Index, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of these samples' documents, with one of the texts of each."""
    begins = index.text_start[ids].astype(np.int64)
    counts = index.text_start[ids + 1].astype(np.int64) - begins
    u = uniforms(ids, seed=_SEED, epochs_P=np.zeros(len(ids), dtype=np.int64), use=Use.CAPTION) if len(ids) else np.zeros(0)
    has_text = counts > 0
    tokens = np.zeros(len(ids), dtype=np.int64)
    tokens[has_text] = index.text_tokens[begins[has_text] + (u * counts)[has_text].astype(np.int64)]
    images = index.images[ids].astype(np.int64)
    pair = index.kind[ids] == PAIR
    return np.where(pair, 4 + index.num_tokens + tokens, 1 + tokens + images * (index.num_tokens + 2))


def _aspects(opened: DataSet) -> tuple[Histogram | None, int]:
    """The histogram, and how many samples' json was read for it."""
    index, ratios, read = opened.index, list[float](), 0
    for split in SPLITS:
        if not index.count(split):
            continue
        reader = ShardReader(opened.path, index=index, split=split, storage=opened.storage)
        numbers = evenly(len(reader), most=max(1, round(MOST_READ * len(reader) / len(index))))
        for number in numbers:
            try:
                ratio = original_aspect(reader.metadata(number))
            except UndecodableSampleError:
                continue
            read += 1
            ratios += [ratio] if ratio else []
            if read == 20 and not ratios:  # none has it
                return None, read
    if not ratios:
        return None, read
    values = np.array(ratios)
    # Equal factors, not equal steps: 1 : 2 and 2 : 1 are as far from a square.
    most = max(1.0, float(np.abs(np.log2(values)).max()))
    edges = np.exp2(np.linspace(-most, most, 17 + 1))  # odd: a square is in the middle of a bin
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(bins, minlength=len(edges) - 1)
    return _histogram(values, edges=edges.tolist(), counts=counts, name="Width by height", unit="width / height"), read


def original_aspect(metadata: Mapping[str, Any]) -> float | None:
    """Width by height of the picture before it was cut to a square, where the json of its sample has it.

    It is looked for as `width` and `height`, as img2dataset's `original_width` and `original_height`, and as `original_size`, the
    pair of both.
    """
    size = metadata.get("original_size")
    found = size if isinstance(size, list) and len(size) == 2 else None
    for before in ("", "original_"):
        found = found or [metadata.get(before + "width"), metadata.get(before + "height")]
        if not all(isinstance(side, int | float) and not isinstance(side, bool) and side > 0 for side in found):
            found = None
    return found[0] / found[1] if found else None


def read_report(storage: Storage) -> dict[str, Any] | None:
    """What preparation wrote beside the index; None where there is none that can be read."""
    if storage.size(REPORT_NAME) is None:
        return None
    try:
        report = json.loads(storage.local(REPORT_NAME).read_bytes())
    except ValueError:
        return None
    return report if isinstance(report, dict) else None
