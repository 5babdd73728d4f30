"""Chunks of remote files on a local disk, shared by all processes of a machine.

    <folder>/used               bytes of all chunks, as a number; who changes them holds its lock
    <folder>/ab/ab12...         one chunk: a header, a CRC-32 for each 64 KiB, the bytes
    <folder>/ab12.... .part     one that is being written

A chunk appears under its name when it is complete. Reading needs no lock and checks what it reads: a damaged chunk is removed and
counts as absent. Above `most_bytes`, those unused for longest go. The number is raised before a chunk appears, so a
process that dies in between leaves it too high, never too low, and the next time room is made it is counted anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

_LOG = logging.getLogger(__name__)
_HEADER = struct.Struct("<16sI")
"""Beginning of the key's hash, bytes of the chunk."""
_CHECKED = 64 * 2**10
_AGE_SECONDS = 60
"""The time of last use is noted this exactly."""
_ABANDONED_SECONDS = 600
no_fork = Lock()
"""A child forked while one of our threads holds the lock of a file would hold it too, as long as it lives."""
os.register_at_fork(before=no_fork.acquire, after_in_parent=no_fork.release, after_in_child=no_fork.release)
_KEEP = 0.9
"""The share of `most_bytes` that is kept when room is made, so that it need not be made for each chunk."""


class ChunkCache:
    """See the top of the file.

    Args:
        folder: on a local disk; made if need be.
        most_bytes: on the disk; each process may exceed it by the chunk that it writes.
    """

    def __init__(self, folder: Path, *, most_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._most_bytes = most_bytes
        self._writing = Lock()
        self._complained = False

    def get(self, key: str, *, size: int, start: int, end: int) -> bytes | None:
        """Bytes [start, end) of a chunk of `size` bytes; None where it is absent or damaged."""
        digest, path = self._place(key)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            content = _read(file, digest=digest, size=size, start=start, end=end)
            if content is not None and time.time() - os.fstat(file).st_mtime > _AGE_SECONDS:
                os.utime(file)
        except OSError:
            content = None
        finally:
            os.close(file)
        if content is None:
            _LOG.warning("%s is damaged: it is removed and fetched anew", path)
            with suppress(OSError):
                path.unlink()
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keeps a chunk. Where that fails (a full disk, for one) it is logged, once."""
        try:
            self._put(key, content)
        except OSError as error:
            if not self._complained:
                _LOG.warning("the cache in %s cannot be written, so more is fetched than need be: %s", self._folder, error)
            self._complained = True

    def _put(self, key: str, content: bytes) -> None:
        digest, path = self._place(key)
        checks = [zlib.crc32(content[i : i + _CHECKED]) for i in range(0, len(content), _CHECKED)]
        table = struct.pack(f"<{len(checks)}I", *checks)
        packed = _HEADER.pack(digest[:16], len(content)) + table + content
        part = self._folder / f"{digest.hex()}.{os.getpid()}.part"
        with self._writing:  # one at a time, for the bound
            try:
                part.write_bytes(packed)
                with self._locked() as counter:
                    used = self._used(counter)
                    if used + len(packed) > self._most_bytes:
                        used = self._make_room(min(int(self._most_bytes * _KEEP), self._most_bytes - len(packed)))
                    if used + len(packed) <= self._most_bytes and not path.exists():
                        used += len(packed)
                        path.parent.mkdir(exist_ok=True)
                        os.pwrite(counter, b"%020d" % used, 0)
                        part.replace(path)
                    else:
                        os.pwrite(counter, b"%020d" % used, 0)
            finally:
                part.unlink(missing_ok=True)

    def _place(self, key: str) -> tuple[bytes, Path]:
        digest = hashlib.sha256(key.encode()).digest()
        return digest, self._folder / digest.hex()[:2] / digest.hex()

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Descriptor of the file with the number, which this process alone has until the end."""
        with no_fork:
            counter = os.open(self._folder / "used", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(counter, fcntl.LOCK_EX)
                yield counter
            finally:
                os.close(counter)

    def _used(self, counter: int) -> int:
        text = os.pread(counter, 20, 0)
        return int(text) if len(text) == 20 and text.isdigit() else self._make_room(self._most_bytes)

    def _make_room(self, goal: int) -> int:
        """Removes the chunks unused for longest until at most `goal` bytes are there. Returns how many are."""
        chunks: list[tuple[float, int, str]] = []
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    status = os.stat(path)
                except OSError:
                    continue  # removed meanwhile
                if name.endswith(".part"):
                    if time.time() - status.st_mtime > _ABANDONED_SECONDS:
                        Path(path).unlink(missing_ok=True)
                elif folder != str(self._folder):
                    chunks.append((status.st_mtime, status.st_size, path))
        used = sum(size for _, size, _ in chunks)
        for _, size, path in sorted(chunks):
            if used <= goal:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return used


def _read(file: int, *, digest: bytes, size: int, start: int, end: int) -> bytes | None:
    """None where anything that is looked at is not as it was written."""
    count = -(-size // _CHECKED)
    head = os.pread(file, _HEADER.size + 4 * count, 0)
    if len(head) != _HEADER.size + 4 * count or os.fstat(file).st_size != len(head) + size:
        return None
    found, length = _HEADER.unpack_from(head)
    table = head[_HEADER.size :]
    if found != digest[:16] or length != size:
        return None
    first = start // _CHECKED
    begin, stop = first * _CHECKED, min(-(-end // _CHECKED) * _CHECKED, size)
    content = os.pread(file, stop - begin, len(head) + begin)
    checks = struct.unpack_from(f"<{-(-(stop - begin) // _CHECKED)}I", table, 4 * first)
    for number, check in enumerate(checks):
        if zlib.crc32(content[number * _CHECKED : (number + 1) * _CHECKED]) != check:
            return None
    return content[start - begin : end - begin]
