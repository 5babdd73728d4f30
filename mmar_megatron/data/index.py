"""The index of a data set: what planning needs to know of every sample, without reading a shard.

    index.json       `Index`'s fields, written last and atomically
    index/*.npy      columns, memory-mapped: 10 million samples open in a fraction of a second

The global id of a sample is its rank: the shards in their order, the samples in theirs, all training samples first. A *pair* is a
picture with captions, a *content* sample a list of parts (see `content`). Axes: n samples, t texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.storage import Storage, open_storage

FORMAT_VERSION = 2
INDEX_NAME = "index.json"
COLUMN_FOLDER = "index"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
PAIR, CONTENT = 0, 1
"""Kinds of sample."""
NO_LANGUAGE = 255
"""Language of a content sample's text."""

COLUMNS: dict[str, type[np.unsignedinteger[Any]]] = {
    "offset": np.uint64,
    "size": np.uint32,
    "kind": np.uint8,
    "images": np.uint16,
    "learned": np.uint32,
    "paints": np.uint8,
    "text_start": np.uint64,
    "text_tokens": np.uint32,
    "text_language": np.uint8,
}
"""Every column and its type; `Index` says what it holds."""


class BadDataError(ValueError):
    """The data set turned out, while it was read, to be unfit."""


@dataclass(kw_only=True)
class Shard:
    """One tar."""

    name: str
    split: Split
    samples: int
    bytes: int
    sha256: str


@dataclass(kw_only=True)
class Index:
    """Content of index.json, and the columns beside it.

    Attributes:
        offset, size: [n] in bytes, of the sample within its shard, from its first header to the end of its last member's padding.
        kind: [n] PAIR or CONTENT.
        images: [n] number of pictures.
        learned: [n] content: text tokens, with <eos>, to be learned; pair: 0.
        paints: [n] content: 1 where the last part is an image to be painted.
        text_start: [n + 1] the texts of sample i are those from text_start[i] to text_start[i + 1].
        text_tokens: [t] tokens of a text. Pair: one entry for each caption, language by language in the order of `languages`.
            Content: one entry, with the <eos> of each part that has one.
        text_language: [t] place in `languages`; content: 255.
    """

    format_version: int = FORMAT_VERSION
    made_by: dict[str, Any]
    """The source and its settings."""
    image_size: int
    """Pixels along each side."""
    codec: str
    """Fingerprint of the codec the images were sized for."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    num_tokens: int
    """Tokens of an image, N."""
    channels: int
    """Channels of an image token, C."""
    pictures: bool
    """Whether the pixels are stored."""
    moments: bool
    """Whether the codec's moments are stored."""
    flipped: bool
    """Whether the moments of the mirrored pictures are stored."""
    teacher: dict[str, Any] | None
    """`fingerprint`, and `features` for each token; None where no teacher's features are stored."""
    languages: list[str]
    columns: dict[str, dict[str, Any]]
    """By name, SHA-256 and bytes of the file."""
    shards: list[Shard]
    """The training shards first."""
    files: dict[str, Path] = field(repr=False, compare=False)
    """The columns' files on this machine."""

    def __post_init__(self) -> None:
        self._starts = np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)])
        arrays = {name: np.asarray(np.load(self.files[name], mmap_mode="r")) for name in COLUMNS}
        self.offset, self.size, self.kind = arrays["offset"], arrays["size"], arrays["kind"]
        self.images, self.learned, self.paints = arrays["images"], arrays["learned"], arrays["paints"]
        self.text_start, self.text_tokens = arrays["text_start"], arrays["text_tokens"]
        self.text_language = arrays["text_language"]
        lengths = {name: len(arrays[name]) for name in COLUMNS}
        n, t = int(self._starts[-1]), int(self.text_start[-1])
        expected = dict.fromkeys(COLUMNS, n) | {"text_start": n + 1, "text_tokens": t, "text_language": t}
        if wrong := [name for name in COLUMNS if lengths[name] != expected[name]]:
            raise ValueError(f"the columns {wrong} do not fit the {n:,} samples of {INDEX_NAME}: rebuild it with `{REBUILD}`")

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files for itself: pickled, the arrays would be copied.
        return _unpickle, ({f.name: getattr(self, f.name) for f in fields(self)},)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def count(self, split: Split) -> int:
        """Number of samples of a split."""
        return sum(shard.samples for shard in self.shards if shard.split == split)

    def ids(self, split: Split) -> range:
        """The ids of a split's samples."""
        train = self.count("train")
        return range(train) if split == "train" else range(train, len(self))

    def shard_of(self, ids: Any) -> NDArray[np.int64]:
        """The numbers, in `shards`, of the shards that hold samples; any shape."""
        return np.searchsorted(self._starts, ids, side="right") - 1

    @property
    def fingerprint(self) -> str:
        """Of the content: that of all shards and columns."""
        sums = [shard.sha256 for shard in self.shards] + [self.columns[name]["sha256"] for name in COLUMNS]
        return hashlib.sha256(" ".join(sums).encode()).hexdigest()

    @property
    def starts(self) -> NDArray[np.int64]:
        """[shards + 1] id of each shard's first sample."""
        return self._starts

    @staticmethod
    def load(directory: str | Path, *, storage: Storage | None = None) -> Index:
        """Opens the index of a data set.

        Args:
            directory: the data set, or its URL.
            storage: opened for it; none: it is opened here.

        Raises:
            ValueError: there is none, it is not whole, or it has another format version.
        """
        storage = storage or open_storage(directory)
        content = read_header(directory, storage)
        sizes = storage.sizes([column_path(name) for name in content["columns"]])
        local = {}
        for name, column in content["columns"].items():
            path = column_path(name)
            if (found := sizes[path]) != column["bytes"]:
                size = "is missing" if found is None else f"has {found:,} bytes"
                raise ValueError(
                    f"{directory}/{path} {size}, {INDEX_NAME} says {column['bytes']:,} bytes: copy it again or `{REBUILD}`"
                )
            local[name] = storage.local(path)
        return Index(**{**content, "shards": [Shard(**shard) for shard in content["shards"]], "files": local})


REBUILD = "python tools/prepare_data.py index DIR"


def _unpickle(state: dict[str, Any]) -> Index:
    return Index(**state)


def column_path(name: str) -> str:
    """A column's file within the data set."""
    return f"{COLUMN_FOLDER}/{name}.npy"


def read_header(directory: str | Path, storage: Storage) -> dict[str, Any]:
    """The content of index.json, without the columns.

    Raises:
        ValueError: there is none, it is not whole, or it has another format version.
    """
    if storage.size(INDEX_NAME) is None:
        made = (
            "make one of your pictures and texts as docs/data.md says, or to try things "
            f"by `python tools/prepare_data.py shapes --out {directory}`"
        )
        raise ValueError(f"no data set at {directory}: {'copy one there' if '://' in str(directory) else made}")
    name = f"{directory}/{INDEX_NAME}"
    try:
        content = json.loads(storage.local(INDEX_NAME).read_bytes())
        found = content["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name} is not a complete index: copy it again, or prepare the data set anew") from error
    if found != FORMAT_VERSION:
        raise ValueError(f"{name} has format version {found}, this program reads {FORMAT_VERSION}: prepare the data set anew")
    known = {f.name for f in fields(Index)} - {"files"}
    if content.keys() != known or content["columns"].keys() != COLUMNS.keys():
        raise ValueError(f"{name} is not a complete index: copy it again, or rebuild it with `{REBUILD}`")
    return content


def write_index(
    directory: Path, *, shards: Sequence[Shard], columns: Sequence[Mapping[str, NDArray[Any]]], **header: Any
) -> Index:
    """Writes the columns, then index.json.

    Args:
        directory: holds the shards.
        shards: in their order.
        columns: of each shard, as `ShardFile.close` returns them.
        header: the other fields of `Index`.
    """
    assert len(shards) == len(columns)
    (directory / COLUMN_FOLDER).mkdir(exist_ok=True)
    written = {}
    for name, dtype in COLUMNS.items():
        if name == "text_start":  # each shard has the number of texts of its samples instead
            column = np.concatenate([[0], np.cumsum(np.concatenate([of_shard["texts"] for of_shard in columns]))]).astype(dtype)
        else:
            column = np.concatenate([of_shard[name] for of_shard in columns]).astype(dtype, copy=False)
        file = directory / column_path(name)
        unfinished = file.with_name(f".{file.name}.unfinished")
        with unfinished.open("wb") as stream:
            np.save(stream, column)
        unfinished.replace(file)  # a run may have the one before mapped into its memory
        written[name] = {"sha256": sha256_of(file), "bytes": file.stat().st_size}
    values = {"format_version": FORMAT_VERSION, **header, "columns": written, "shards": [asdict(shard) for shard in shards]}
    content = {f.name: values[f.name] for f in fields(Index) if f.name != "files"}
    unfinished = directory / f".{INDEX_NAME}.unfinished"
    unfinished.write_bytes(json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode())
    unfinished.replace(directory / INDEX_NAME)
    return Index.load(directory)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
