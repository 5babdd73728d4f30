"""Reading samples: any one of a data set is one read of a contiguous piece of a tar away.

Nothing of a sample is decoded before it is asked for. Axes: I pictures of a sample, H = W pixels, N tokens of an image, C
channels of a token, F features of the teacher.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmar_megatron.data.index import BadDataError, Index, Shard, Split
from mmar_megatron.data.storage import Storage, open_storage

_BLOCK = 512
_HEAD = 8192
"""Bytes in which most samples' json ends."""


class UndecodableSampleError(Exception):
    """The bytes of a sample are not what the index and the format promise."""


class Sample:
    """A sample, decoded piece by piece when it is asked for.

    Args:
        sample_id: its rank in the data set.
        data: its members, with their headers.
        place: where it is, for messages.
        image_size: pixels along each side.

    Raises:
        UndecodableSampleError: its bytes are damaged; from here, or from the property that meets the damage.
    """

    def __init__(self, *, sample_id: int, data: bytes, place: str, image_size: int) -> None:
        self.sample_id = sample_id
        self._data = data
        self._place = place
        self._image_size = image_size
        self._images: dict[int, NDArray[np.uint8]] = {}
        try:
            self.key, self._members = parse_members(data)
        except ValueError as error:
            raise self._undecodable(error) from error
        self._pictures = ["png"] if "png" in self._members else []
        while not self._pictures or self._pictures[0] != "png":
            name = f"{len(self._pictures)}.png"
            if name not in self._members:
                break
            self._pictures.append(name)

    def __repr__(self) -> str:
        return f"Sample {self.sample_id} ({self._place}: {', '.join(self._members)})"

    @property
    def members(self) -> list[str]:
        """What follows the key in the names of its members: "json", "png", "moments.npy" and such."""
        return list(self._members)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The content of its json."""
        try:
            metadata = json.loads(self._member("json"))
        except ValueError as error:
            raise self._undecodable(error) from error
        if not isinstance(metadata, dict) or not ("captions" in metadata or "content" in metadata):
            raise self._undecodable("its json has neither captions nor content")
        return metadata

    @property
    def captions(self) -> dict[str, list[str]]:
        """By language; empty for content."""
        return self.metadata.get("captions", {})

    @property
    def content(self) -> list[dict[str, Any]] | None:
        """The parts (see `content`); None for a pair."""
        return self.metadata.get("content")

    @property
    def num_pictures(self) -> int:
        """Number of pictures whose pixels are stored."""
        return len(self._pictures)

    def image(self, k: int) -> NDArray[np.uint8]:
        """Picture k: uint8 [H, W, 3]."""
        if k not in self._images:
            if not 0 <= k < len(self._pictures):
                raise self._undecodable(f"it has no picture {k}, but {', '.join(self._members)}")
            try:
                self._images[k] = decode_image(self._member(self._pictures[k]), image_size=self._image_size)
            except ValueError as error:
                raise self._undecodable(error) from error
        return self._images[k]

    @property
    def images(self) -> list[NDArray[np.uint8]]:
        """All pictures: uint8 [H, W, 3]."""
        return [self.image(k) for k in range(len(self._pictures))]

    @property
    def image_HW3(self) -> NDArray[np.uint8]:
        """The first picture."""
        return self.image(0)

    @cached_property
    def moments_I2NC(self) -> NDArray[np.float16] | None:
        """Mean and log-variance of each picture's tokens, as they are stored."""
        return self._array("moments.npy")

    @cached_property
    def flipped_I2NC(self) -> NDArray[np.float16] | None:
        """The same of the mirrored pictures."""
        return self._array("flipped.npy")

    @cached_property
    def teacher_INF(self) -> NDArray[np.float16] | None:
        """The teacher's features of each picture's tokens."""
        return self._array("teacher.npy")

    def decode(self) -> None:
        """Decodes all that is stored, to see whether it can be."""
        _ = self.metadata, self.images
        for name in self._members:
            if name.endswith(".npy"):
                self._array(name)

    def decode_pictures(self) -> None:
        """Decodes json and pixels."""
        _ = self.metadata, self.images

    def _member(self, name: str) -> bytes:
        try:
            begin, size = self._members[name]
        except KeyError:
            raise self._undecodable(f"it has no {name}, but {', '.join(self._members)}") from None
        return self._data[begin : begin + size]

    def _array(self, name: str) -> NDArray[Any] | None:
        if name not in self._members:
            return None
        begin, size = self._members[name]
        try:
            return decode_npy(memoryview(self._data)[begin : begin + size])
        except ValueError as error:
            raise self._undecodable(f"{name}: {error}") from error

    def _undecodable(self, reason: object) -> UndecodableSampleError:
        return UndecodableSampleError(f"{self._place}: {reason}")


class ShardReader:
    """Random access to the samples of one split.

    Args:
        directory: the data set, or its URL.
        index: its index.
        split: which samples.
        cache_bytes: samples are kept, with what was decoded of them, up to about this size. Epochs come in random order, where
            evicting one sample for another would gain nothing: what is in stays in.
        storage: opened for the data set; none: it is opened here.

    Raises:
        ValueError: the split is empty, or a shard is missing or has not the size that the index says.
    """

    def __init__(
        self, directory: str | Path, *, index: Index, split: Split, cache_bytes: int = 0, storage: Storage | None = None
    ) -> None:
        self.index = index
        self.ids = index.ids(split)
        self._split = split
        self._directory = directory
        self._storage = storage or open_storage(directory)
        self._cache: dict[int, Sample] = {}
        self._cache_room = cache_bytes
        self._starts: list[int] = index.starts.tolist()
        if not self.ids:
            raise ValueError(f"{directory} has no {split} samples: prepare a data set that has")
        shards = [shard for shard in index.shards if shard.split == split]
        sizes = self._storage.sizes([shard.name for shard in shards])
        for shard in shards:
            check_size(directory, shard, found=sizes[shard.name])

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def place(self, number: int) -> tuple[str, int, int]:
        """(shard, offset, size) of the sample with this number within the split."""
        sample_id = self.ids.start + number
        shard = self.index.shards[bisect_right(self._starts, sample_id) - 1]
        return shard.name, int(self.index.offset[sample_id]), int(self.index.size[sample_id])

    def metadata(self, number: int) -> dict[str, Any]:
        """What the tar says of the sample with this number within the split, mostly without reading its pictures.

        Raises:
            UndecodableSampleError: see `Sample`.
        """
        name, offset, size = self.place(number)
        head = self._storage.read(name, offset, min(size, _HEAD))
        end = _end_of_first_member(head)
        if end is None or end > len(head):
            return self.read(number).metadata
        return self._sample(number, head[:end], name, offset).metadata

    def read(self, number: int) -> Sample:
        """The sample with this number within the split.

        Raises:
            UndecodableSampleError: see `Sample`.
        """
        if (cached := self._cache.get(number)) is not None:
            return cached
        name, offset, size = self.place(number)
        sample = self._sample(number, self._storage.read(name, offset, size), name, offset)
        if self._cache_room:
            cost = 2 * size + sample.num_pictures * 3 * self.index.image_size**2 + 2000  # and objects of Python around the bytes
            if cost <= self._cache_room:
                self._cache[number] = sample
                self._cache_room -= cost
        return sample

    def read_ahead(self, numbers: Sequence[int]) -> None:
        """A hint that these samples are read soon, in this order."""
        self._storage.read_ahead([self.place(number) for number in numbers if number not in self._cache])

    def read_first(self, numbers: Iterable[int], *, check: Callable[[Sample], object] = Sample.decode) -> Sample:
        """The first of these samples that can be decoded.

        The rule looks at the data alone, so every layout of ranks and workers replaces the same samples by the same others.

        Args:
            numbers: within the split.
            check: decodes what the caller needs.

        Raises:
            BadDataError: none can.
        """
        for number in numbers:
            with suppress(UndecodableSampleError):
                sample = self.read(number)
                check(sample)
                return sample
        raise BadDataError(f"no {self._split} sample of {self._directory} can be decoded: prepare the data set anew")

    def _sample(self, number: int, data: bytes, name: str, offset: int) -> Sample:
        place = f"shard {self._directory}/{name} at {offset}"
        return Sample(sample_id=self.ids.start + number, data=data, place=place, image_size=self.index.image_size)


def parse_members(data: bytes) -> tuple[str, dict[str, tuple[int, int]]]:
    """The key of a sample, and (offset, size) within `data` of each member's content by what follows the key in its name.

    Raises:
        ValueError: a header is damaged, a member is no plain file or reaches beyond `data`, or keys differ.
    """
    members: dict[str, tuple[int, int]] = {}
    key, position = None, 0
    while position < len(data):
        header = data[position : position + _BLOCK]
        name, size = parse_header(header)
        folder, slash, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        if key not in (None, folder + slash + stem):
            raise ValueError(f"{name} is of another sample than {key}")
        key = folder + slash + stem
        begin = position + _BLOCK
        if begin + size > len(data) or kind in members:
            raise ValueError(f"{name} " + ("is there twice" if kind in members else "reaches beyond the sample"))
        members[kind] = begin, size
        position = begin + -(-size // _BLOCK) * _BLOCK
    if key is None:
        raise ValueError("it is empty")
    return key, members


def parse_header(header: bytes) -> tuple[str, int]:
    """Name and size of a member. Raises ValueError where it is damaged. tarfile.TarInfo.frombuf takes ten times as long."""
    if header[257:262] != b"ustar" or header[156:157] not in (b"0", b"\0") or len(header) != _BLOCK:
        raise ValueError("the header of a member is damaged")
    checksum = sum(header) - sum(header[148:156]) + 8 * 32
    if int(header[148:156].strip(b"\0 ") or b"0", 8) != checksum:
        raise ValueError("the header of a member is damaged: its checksum is not right")
    name, prefix = header[:100].rstrip(b"\0").decode(), header[345:500].rstrip(b"\0").decode()
    return f"{prefix}/{name}" if prefix else name, int(header[124:136].strip(b"\0 "), 8)


def _end_of_first_member(head: bytes) -> int | None:
    """Where its padding ends, if it is a json."""
    try:
        name, size = parse_header(head[:_BLOCK])
    except ValueError:
        return None
    return _BLOCK + -(-size // _BLOCK) * _BLOCK if name.endswith(".json") else None


def decode_image(encoded: bytes, *, image_size: int) -> NDArray[np.uint8]:
    """PNG -> uint8 [H, W, 3].

    Raises:
        ValueError: it is none, or not of `image_size` along each side.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
            image_HW3 = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise ValueError(str(error)) from error
    if image_HW3.shape != (image_size, image_size, 3):
        raise ValueError(f"{image_HW3.shape} instead of {image_size} x {image_size} pixels")
    return image_HW3


def encode_image(image_HW3: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 3] -> PNG."""
    file = io.BytesIO()
    Image.fromarray(image_HW3).save(file, format="PNG")
    return file.getvalue()


def decode_npy(data: memoryview) -> NDArray[Any]:
    """A .npy file -> its array, read-only and without a copy.

    Raises:
        ValueError: it is none, or cut off.
    """
    length = 10 + int.from_bytes(data[8:10], "little")
    shape, dtype = _npy_header(bytes(data[:length]))
    return np.frombuffer(data, dtype=dtype, offset=length, count=int(np.prod(shape))).reshape(shape)


@lru_cache(maxsize=256)  # all samples of a data set have the same few; numpy takes longer to read one than the rest of a sample
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not version 1.0 of the format")
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # damaged headers make it raise SyntaxError, tokenize.TokenError ... too
        raise ValueError(str(error)) from error
    if fortran_order or dtype.hasobject:
        raise ValueError("not a plain array")
    return shape, dtype


def check_size(directory: str | Path, shard: Shard, *, found: int | None) -> None:
    """Raises ValueError where a shard is missing or has not the size that the index says."""
    if found != shard.bytes:
        state = "is missing" if found is None else f"has {found:,} bytes"
        raise ValueError(
            f"shard {directory}/{shard.name} {state}, the index says {shard.bytes:,} bytes: copy or prepare the data set anew"
        )
