"""Where the bytes of a data set lie: in a folder, or below any URL that `fsspec` can read (S3, GCS, HTTP).

    LocalStorage     reads with `pread`
    RemoteStorage    remote.py: requests for ranges, tried again with backoff
                     chunk_cache.py: what was fetched, on a local disk, shared by all processes of the machine (optional)
                     read_ahead.py: announced ranges, fetched in background threads

`read` returns exactly the bytes that it is asked for, or raises an error that names the file and the range.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from mmar_megatron.data.chunk_cache import ChunkCache
from mmar_megatron.data.read_ahead import Range, ReadAhead, ReadAheadLimits
from mmar_megatron.data.remote import MissingError, ObjectInfo, Remote, Retry, StorageError, check_driver

__all__ = ["LocalStorage", "MissingError", "ReadAheadLimits", "RemoteStorage", "Retry", "Storage", "StorageError", "open_storage"]

_LOG = logging.getLogger(__name__)
_OPEN_FILES = 256
_DOWNLOAD_THREADS = 4
_CHUNK_LOCKS = 64


class Storage(ABC):
    """Files below a root, read-only. Names are relative, with slashes. Usable in forked and spawned processes, and in threads."""

    root: str

    @abstractmethod
    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a file.

        Raises:
            StorageError: they could not be had; the message names the file and the range.
        """

    @abstractmethod
    def read_ahead(self, ranges: Iterable[Range]) -> None:
        """A hint: these (name, offset, size) are going to be read, about in this order. Raises nothing: `read` does."""

    @abstractmethod
    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Bytes of each file; None where there is none.

        Raises:
            StorageError: it cannot be told.
        """

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none.

        Raises:
            StorageError: it cannot be told.
        """
        return self.sizes([name])[name]

    @abstractmethod
    def local(self, name: str) -> Path:
        """The whole file on a local disk, for memory-mapping: itself, or a copy, made once for all processes of the machine.

        Raises:
            StorageError: there is none, or it could not be had.
        """

    def close(self) -> None:
        """Ends what this process has under way."""
        return None


def open_storage(
    root: str | Path,
    *,
    cache_dir: str | Path | None = None,
    cache_bytes: int = 0,
    chunk_bytes: int = 2**20,
    retry: Retry | None = None,
    read_ahead: ReadAheadLimits | None = None,
) -> Storage:
    """Opens a folder or a URL. Nothing is read yet.

    Args:
        root: a path, or `s3://bucket/folder`, `gs://...`, `https://...` or another URL of fsspec's.
        cache_dir: local folder for copies of remote files; None: whole files go to the system's temporary folder, and ranges are
            not kept. Whole files (`local`) do not count towards `cache_bytes`.
        cache_bytes: of ranges that are kept; 0: none are. Each process may exceed it by the one chunk that it writes.
        chunk_bytes: with a cache, what is fetched and kept at a time.
        retry: of remote requests.
        read_ahead: of remote ranges.

    Raises:
        ValueError: nothing installed can read such a URL, or the cache has no folder, or no room for a chunk.
    """
    text = str(root)
    for scheme in ("file://", "local://"):
        text = text.removeprefix(scheme)
    if "://" not in text:
        if cache_bytes:
            _LOG.warning("%s is local: cache_bytes is ignored", text)
        return LocalStorage(text)
    if cache_bytes and cache_dir is None:
        raise ValueError("the cache has no folder: name one on a local disk (cache_dir), or set cache_bytes to 0")
    if 0 < cache_bytes < 2 * chunk_bytes:
        raise ValueError(
            f"a cache of {cache_bytes:,} bytes leaves no room for chunks of {chunk_bytes:,}: set its size to 0 or to much more"
        )
    return RemoteStorage(
        text,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        cache_bytes=cache_bytes,
        chunk_bytes=chunk_bytes,
        retry=retry or Retry(),
        limits=read_ahead or ReadAheadLimits(),
    )


class _Descriptor:
    """An open file, closed when nobody reads it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it was never opened
            os.close(self.number)


class LocalStorage(Storage):
    """A folder."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._files: dict[str, _Descriptor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_files": {}}

    def read(self, name: str, offset: int, size: int) -> bytes:
        what = f"{self.root}/{name}, bytes {offset} to {offset + size}"
        parts: list[bytes] = []
        try:
            file, missing = self._open(name), size
            while missing:
                parts.append(os.pread(file.number, missing, offset + size - missing))
                if not parts[-1]:
                    raise StorageError(f"{what}: the file ends {missing:,} bytes before")
                missing -= len(parts[-1])
        except FileNotFoundError as error:
            raise MissingError(f"{what}: there is no such file") from error
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{what}: {error}") from error
        return b"".join(parts)

    def read_ahead(self, ranges: Iterable[Range]) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        for name, offset, size in ranges:
            with suppress(OSError):
                os.posix_fadvise(self._open(name).number, offset, size, os.POSIX_FADV_WILLNEED)

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        return {name: self._size(Path(self.root, name)) for name in names}

    def local(self, name: str) -> Path:
        path = Path(self.root, name)
        if self._size(path) is None:
            raise MissingError(f"{path}: there is no such file")
        return path

    def close(self) -> None:
        self._files.clear()

    def _open(self, name: str) -> _Descriptor:
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = _Descriptor(Path(self.root, name))
            while len(self._files) > _OPEN_FILES:
                with suppress(KeyError, StopIteration, RuntimeError):  # another thread was there before
                    del self._files[next(iter(self._files))]
        return file

    @staticmethod
    def _size(path: Path) -> int | None:
        try:
            return path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise StorageError(f"{path}: {error}") from error


_opening = Lock()
_of_parents: list[_Process] = []
"""What a forked process got from its parent and must neither use nor clean up."""


def _after_fork() -> None:
    global _opening
    _opening = Lock()


os.register_at_fork(after_in_child=_after_fork)


class RemoteStorage(Storage):
    """What lies below a URL; see `open_storage`."""

    def __init__(
        self, root: str, *, cache_dir: Path | None, cache_bytes: int, chunk_bytes: int, retry: Retry, limits: ReadAheadLimits
    ) -> None:
        check_driver(root)
        self.root = root.rstrip("/")
        self.cache_dir = cache_dir
        self.cache_bytes = cache_bytes
        self.chunk_bytes = chunk_bytes
        self.retry = retry
        self.limits = limits
        self._process: _Process | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def read(self, name: str, offset: int, size: int) -> bytes:
        if size == 0:
            return b""
        process = self._own()
        content = process.ahead.take(name, offset, size)
        return process.fetch(name, offset, offset + size) if content is None else content

    def read_ahead(self, ranges: Iterable[Range]) -> None:
        self._own().ahead.announce(ranges)

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        return self._own().remote.sizes(names)

    def local(self, name: str) -> Path:
        process = self._own()
        info = process.info(name)
        key = f"{process.remote.shown(name)}\n{info.identity}\n{info.size}"
        folder = self._copies() / hashlib.sha256(key.encode()).hexdigest()[:32]
        target = folder / name.rpartition("/")[2]
        if not _has_size(target, info.size):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _has_size(target, info.size):
                    self._download(name, info.size, folder / ".part", target)
        return target

    def close(self) -> None:
        with _opening:
            process, self._process = self._process, None
            if process is not None and process.pid == os.getpid():
                process.remote.close()
                process.ahead.close()

    def _own(self) -> _Process:
        """Connections, threads and locks do not survive a fork: each process has its own."""
        process = self._process
        if process is None or process.pid != os.getpid():
            with _opening:
                process = self._process
                if process is None or process.pid != os.getpid():
                    if process is not None:
                        _of_parents.append(process)
                    process = self._process = _Process(self)
        return process

    def _copies(self) -> Path:
        if self.cache_dir is not None:
            return self.cache_dir / "files"
        folder = Path(tempfile.gettempdir(), f"mmar-storage-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise ValueError(f"{folder} belongs to another user: name a folder of your own (cache_dir)")
        return folder

    def _download(self, name: str, size: int, part: Path, target: Path) -> None:
        fetch, step = self._own().remote.fetch, self.limits.join_bytes
        pool = ThreadPoolExecutor(_DOWNLOAD_THREADS)
        with part.open("wb") as file:

            def copy(start: int) -> None:
                os.pwrite(file.fileno(), fetch(name, start, min(start + step, size)), start)

            try:
                for _ in pool.map(copy, range(0, size, step)):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)
            os.fsync(file.fileno())
        part.replace(target)


class _Process:
    """What one process has of a remote storage."""

    def __init__(self, storage: RemoteStorage) -> None:
        self.pid = os.getpid()
        self.remote = Remote(storage.root, retry=storage.retry)
        self.ahead = ReadAhead(self.fetch, limits=storage.limits)
        self._chunk_bytes = storage.chunk_bytes
        self._infos: dict[str, ObjectInfo] = {}
        self._locks = [Lock() for _ in range(_CHUNK_LOCKS)]
        self._cache: ChunkCache | None = None
        if storage.cache_bytes and storage.cache_dir is not None:
            self._cache = ChunkCache(storage.cache_dir / "chunks-1", most_bytes=storage.cache_bytes)

    def info(self, name: str) -> ObjectInfo:
        """Asked once: a run reads one version of a file."""
        found = self._infos.get(name) or self.remote.info(name)
        if found is None:
            raise MissingError(f"{self.remote.shown(name)}: there is no such file")
        self._infos[name] = found
        return found

    def fetch(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, from the cache where they are in it."""
        if self._cache is None:
            return self.remote.fetch(name, start, end)
        info = self.info(name)
        if end > info.size:
            raise StorageError(f"{self.remote.shown(name)}, bytes {start} to {end}: the file has {info.size:,} bytes")
        size = self._chunk_bytes
        numbers = range(start // size, -(-end // size))
        parts = [self._from_chunk(name, info, k, max(start, k * size), min(end, (k + 1) * size)) for k in numbers]
        return b"".join(parts)

    def _from_chunk(self, name: str, info: ObjectInfo, number: int, start: int, end: int) -> bytes:
        assert self._cache is not None
        begin = number * self._chunk_bytes
        stop = min(begin + self._chunk_bytes, info.size)
        key = f"{self.remote.shown(name)}\n{info.identity}\n{info.size}\n{self._chunk_bytes}\n{number}"
        with self._locks[hash(key) % _CHUNK_LOCKS]:  # two threads do not fetch the same chunk
            content = self._cache.get(key, size=stop - begin, start=start - begin, end=end - begin)
            if content is None:
                chunk = self.remote.fetch(name, begin, stop)
                self._cache.put(key, chunk)
                content = chunk[start - begin : end - begin]
        return content


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
