"""Writing shards: WebDataset tars of which each sample is one contiguous run of members, its json first.

<key>.json                      captions or content, and whatever the source adds
<key>.png, or <key>.0.png ...   the picture, or several
<key>.NAME.npy                  what an encoder made of the pictures, one row each: moments, flipped, teacher
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.content import TextCounts
from mmar_megatron.data.index import Shard, Split

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
ShardColumns = dict[str, NDArray[Any]]


class _Hashed(io.FileIO):
    """A file that knows the SHA-256 of what was written."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, "w")
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        view = memoryview(data)
        while len(view):
            view = view[super().write(view) :]
        return len(data)


class ShardFile:
    """One tar being written, under a hidden name until it is closed. The same samples give the same bytes.

    Args:
        file: of this name in the end.
        split: of its samples.
    """

    def __init__(self, file: Path, *, split: Split) -> None:
        self._file = file
        self._unfinished = file.with_name(f".{file.name}.unfinished")
        self._stream = _Hashed(self._unfinished)
        self._buffer = io.BufferedWriter(self._stream, 2**20)
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.USTAR_FORMAT)
        self._split = split
        self._columns: dict[str, list[int]] = {
            name: []
            for name in ("offset", "size", "kind", "images", "learned", "paints", "texts", "text_tokens", "text_language")
        }

    def __len__(self) -> int:
        return len(self._columns["offset"])

    def add(
        self,
        key: str,
        *,
        metadata: Mapping[str, Any],
        pictures: Sequence[bytes] = (),
        arrays: Mapping[str, NDArray[Any]] | None = None,
        counts: TextCounts,
    ) -> None:
        """Appends one sample.

        Args:
            key: unique in the data set: at most 80 letters, digits, "_" and "-" (in a tar, what follows the first dot is the
                kind of member).
            metadata: its json.
            pictures: PNG files.
            arrays: by name of the member, one row for each picture.
            counts: tokens of its text.
        """
        assert _KEY.fullmatch(key), key
        arrays = arrays or {}
        begin = self._tar.offset
        self._append(f"{key}.json", json.dumps(metadata, ensure_ascii=False).encode())
        for number, picture in enumerate(pictures):
            self._append(f"{key}.png" if len(pictures) == 1 else f"{key}.{number}.png", picture)
        for name, array in arrays.items():
            self._append(f"{key}.{name}.npy", npy(array))
        images = len(pictures) or max((len(array) for array in arrays.values()), default=0)
        row = {"offset": begin, "size": self._tar.offset - begin, "kind": counts.kind, "images": images}
        row |= {"learned": counts.learned, "paints": int(counts.paints), "texts": len(counts.tokens)}
        for name, value in row.items():
            self._columns[name].append(value)
        self._columns["text_tokens"] += counts.tokens
        self._columns["text_language"] += counts.languages

    def close(self) -> tuple[Shard, ShardColumns]:
        """Gives the tar its name, when all of it is on disk."""
        self._tar.close()
        self._buffer.flush()
        os.fsync(self._stream.fileno())
        size = self._stream.tell()
        self._buffer.close()
        self._unfinished.replace(self._file)
        shard = Shard(
            name=self._file.name, split=self._split, samples=len(self), bytes=size, sha256=self._stream.sha256.hexdigest()
        )
        return shard, {name: np.array(values, dtype=np.uint64) for name, values in self._columns.items()}

    def abandon(self) -> None:
        """Closes and removes what there is."""
        self._buffer.close()
        self._unfinished.unlink(missing_ok=True)

    def _append(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))


def npy(array: NDArray[Any]) -> bytes:
    """The array as a .npy file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array))
    return file.getvalue()


def shard_name(split: Split, number: int) -> str:
    """Of the split's shard with this number."""
    return f"{split}-{number:06d}.tar"
