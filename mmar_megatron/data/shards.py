"""Shards on disk: WebDataset tars and the index that makes any sample of them one read away.

A data set is a directory:

    train-000000.tar ...        <key>.png, and <key>.json: {"captions": {"en": [...], ...}, and whatever the source adds}
    validation-000000.tar ...   held out
    tokenizer.model             what the token lengths in the index were counted with
    index.json                  written last, by `ShardWriter`; its fields are those of `Index` and `Shard`

The global id of a sample is its rank in the index: the shards in their order, the samples in theirs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(kw_only=True)
class Shard:
    """One tar; the lists have one entry a sample."""

    name: str
    split: Split
    bytes: int
    sha256: str
    keys: list[str] = field(default_factory=list)
    images: list[tuple[int, int]] = field(default_factory=list)
    """(offset, size) in bytes of each `<key>.png` within the tar."""
    metadata: list[tuple[int, int]] = field(default_factory=list)
    """(offset, size) in bytes of each `<key>.json` within the tar."""
    caption_tokens: list[dict[str, list[int]]] = field(default_factory=list)
    """By language, the number of text tokens of each caption."""


@dataclass(kw_only=True)
class Index:
    """Content of index.json."""

    format_version: int = FORMAT_VERSION
    made_by: dict[str, Any]
    """The source and its settings."""
    image_size: int
    """Pixels along each side."""
    codec: str
    """Fingerprint of the codec the images were sized for."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    shards: list[Shard]

    def count(self, split: Split) -> int:
        """Number of samples of a split."""
        return sum(len(shard.keys) for shard in self.shards if shard.split == split)

    @staticmethod
    def load(directory: str | Path) -> Index:
        """Reads the index of a data set.

        Raises:
            ValueError: there is none, or of another format version.
        """
        file = Path(directory) / INDEX_NAME
        if not file.is_file():
            raise ValueError(
                f"no data set at {directory}: make one with `python tools/prepare_data.py shapes --out {directory}` (or `emoji`)"
            )
        try:
            content = json.loads(file.read_text())
            found = content["format_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is not a complete index: copy it again, or prepare the data set anew") from error
        if found != FORMAT_VERSION:
            raise ValueError(f"{file} has format version {found}, this program reads {FORMAT_VERSION}: prepare the data set anew")
        return Index(**{**content, "shards": [Shard(**shard) for shard in content["shards"]]})


@dataclass(kw_only=True)
class Sample:
    """A decoded sample; H = W pixels."""

    sample_id: int
    image_HW3: NDArray[np.uint8]
    metadata: dict[str, Any]

    @property
    def captions(self) -> dict[str, list[str]]:
        """By language."""
        return self.metadata["captions"]


class BadDataError(ValueError):
    """The data set turned out, while it was read, to be unfit."""


class UndecodableImageError(Exception):
    """The bytes of a sample's image are not an image of the size that the data set has."""


class ShardReader:
    """Random access to the samples of one split.

    Args:
        directory: the data set.
        index: its index.
        split: which samples.
        cache_bytes: decoded samples are kept up to about this size. Epochs come in random order, where evicting one sample
            for another would gain nothing: what is in stays in.

    Raises:
        ValueError: the split is empty, or a shard is missing or has not the size that the index says.
    """

    def __init__(self, directory: str | Path, *, index: Index, split: Split, cache_bytes: int = 0) -> None:
        self._image_size = index.image_size
        self._cache: dict[int, Sample] = {}
        self._cache_room = cache_bytes
        self._files: dict[Path, int] = {}
        self._locations: list[tuple[Path, tuple[int, int], tuple[int, int]]] = []
        self._ids: list[int] = []
        first_id = 0
        for shard in index.shards:
            if shard.split == split:
                file = Path(directory) / shard.name
                _check_size(file, shard)
                self._locations += [(file, *offsets) for offsets in zip(shard.images, shard.metadata, strict=True)]
                self._ids += range(first_id, first_id + len(shard.keys))
            first_id += len(shard.keys)
        if not self._ids:
            raise ValueError(f"{directory} has no {split} samples: prepare a data set that has")

    def __len__(self) -> int:
        return len(self._locations)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_cache": {}}  # open files do not travel to another process

    def metadata(self, number: int) -> dict[str, Any]:
        """What the tar says of the sample with this number within the split, without its image."""
        file, _, (offset, size) = self._locations[number]
        return json.loads(self._read(file, offset, size))

    def read(self, number: int) -> Sample:
        """The sample with this number within the split.

        Raises:
            UndecodableImageError: see there.
        """
        if (cached := self._cache.get(number)) is not None:
            return cached
        file, (offset, size), (_, metadata_size) = self._locations[number]
        image_HW3 = decode_image(self._read(file, offset, size), image_size=self._image_size)
        sample = Sample(sample_id=self._ids[number], image_HW3=image_HW3, metadata=self.metadata(number))
        cost = image_HW3.nbytes + 4 * metadata_size + 1000  # objects of Python around the bytes
        if cost <= self._cache_room:
            self._cache[number] = sample
            self._cache_room -= cost
        return sample

    def read_or_next(self, number: int) -> tuple[Sample, int]:
        """The sample, or where its image cannot be decoded the next one that can (cyclically), and how many were skipped.

        The rule looks at the data alone, so every layout of ranks and workers replaces the same samples by the same others.

        Raises:
            BadDataError: no image of the split can be decoded.
        """
        for skipped in range(len(self)):
            try:
                return self.read((number + skipped) % len(self)), skipped
            except UndecodableImageError:
                continue
        raise BadDataError(f"no image in {self._locations[0][0].parent} can be decoded: prepare the data set anew")

    def _read(self, file: Path, offset: int, size: int) -> bytes:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return os.pread(self._files[file], size, offset)


def decode_image(encoded: bytes, *, image_size: int) -> NDArray[np.uint8]:
    """PNG (or any other file PIL reads) -> uint8 [H, W, 3].

    Raises:
        UndecodableImageError: it is no image, or not of `image_size` along each side.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image_HW3 = np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise UndecodableImageError(str(error)) from error
    if image_HW3.shape != (image_size, image_size, 3):
        raise UndecodableImageError(f"{image_HW3.shape} instead of {image_size} x {image_size} pixels")
    return image_HW3


def encode_image(image_HW3: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 3] -> PNG."""
    file = io.BytesIO()
    Image.fromarray(image_HW3).save(file, format="PNG")
    return file.getvalue()


def _check_size(file: Path, shard: Shard) -> None:
    size = file.stat().st_size if file.is_file() else None
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size:,} bytes"
        raise ValueError(f"shard {file} {found}, the index says {shard.bytes:,} bytes: copy or prepare the data set anew")


def verify(directory: str | Path) -> Index:
    """Reads every shard of a data set and compares its checksum with the index.

    Raises:
        ValueError: a shard is missing, truncated or altered; the message names it.
    """
    index = Index.load(directory)
    for shard in index.shards:
        file = Path(directory) / shard.name
        _check_size(file, shard)
        if _sha256(file) != shard.sha256:
            raise ValueError(f"shard {file} was altered, its SHA-256 is not the index's: copy or prepare the data set anew")
    return index


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class ShardWriter:
    """Writes the tars of a data set, then its index. The same samples give the same bytes.

    Args:
        directory: exists, and nobody reads it yet: its maker renames it when all is in.
        samples_per_shard: a new tar is begun after so many.
    """

    def __init__(self, directory: Path, *, samples_per_shard: int) -> None:
        self._directory = directory
        self._samples_per_shard = samples_per_shard
        self._tar: tarfile.TarFile | None = None
        self.shards: list[Shard] = []

    def add(
        self, key: str, *, split: Split, image: bytes, metadata: Mapping[str, Any], caption_tokens: dict[str, list[int]]
    ) -> None:
        """Appends one sample; the splits come one after the other."""
        shard = self.shards[-1] if self.shards else None
        if shard is None or shard.split != split or len(shard.keys) == self._samples_per_shard:
            shard = self._begin(split)
        shard.keys.append(key)
        shard.images.append(self._append(f"{key}.png", image))
        shard.metadata.append(self._append(f"{key}.json", json.dumps(metadata, ensure_ascii=False).encode()))
        shard.caption_tokens.append(caption_tokens)

    def finish(self, *, made_by: Mapping[str, Any], image_size: int, codec: str, tokenizer: str) -> Index:
        """Closes the last tar and writes index.json."""
        self._end()
        index = Index(made_by=dict(made_by), image_size=image_size, codec=codec, tokenizer=tokenizer, shards=self.shards)
        (self._directory / INDEX_NAME).write_text(json.dumps(asdict(index), separators=(",", ":")))
        return index

    def _begin(self, split: Split) -> Shard:
        self._end()
        number = sum(shard.split == split for shard in self.shards)
        self.shards.append(Shard(name=f"{split}-{number:06d}.tar", split=split, bytes=0, sha256=""))
        self._tar = tarfile.TarFile(self._directory / self.shards[-1].name, "w", format=tarfile.USTAR_FORMAT)
        return self.shards[-1]

    def _append(self, name: str, content: bytes) -> tuple[int, int]:
        """Returns (offset, size) of the content: in the USTAR format one block of header stands before it."""
        assert self._tar is not None
        offset = self._tar.offset + tarfile.BLOCKSIZE
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))
        return offset, len(content)

    def _end(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        shard = self.shards[-1]
        file = self._directory / shard.name
        shard.bytes, shard.sha256 = file.stat().st_size, _sha256(file)
