"""Where the tests of storage read: the same files behind an S3 server and over HTTP, and what is right there."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mmar_megatron.data.storage import Retry, Storage, open_storage
from tests.unit.data.faulty_server import FaultyServer

KIB = 2**10
PATIENT = Retry(attempts=4, request_seconds=30, first_wait_seconds=0.01, longest_wait_seconds=0.05)
HASTY = Retry(attempts=3, request_seconds=1, first_wait_seconds=0.01, longest_wait_seconds=0.05)
FILES = {
    name: random.Random(size).randbytes(size)
    for name, size in {"a.tar": 3_000_001, "b.tar": 2**20, "index/offset.npy": 40_000, "index/kind.npy": 7}.items()
}
NAME = "a.tar"


class Place(NamedTuple):
    """Where FILES lie, behind a server that can be told to fail."""

    url: str
    server: FaultyServer
    put: Callable[[str, bytes], None]

    def open(self, **settings: Any) -> Storage:
        return open_storage(self.url, **{"retry": PATIENT, **settings})


def ranges(count: int, *, seed: int = 0, name: str = NAME, longest: int = 5000) -> list[tuple[str, int, int]]:
    """At random, the first and the last bytes of the file among them."""
    draw, size = random.Random(seed), len(FILES[name])
    drawn = [
        (offset, draw.randint(1, min(longest, size - offset))) for offset in (draw.randrange(size) for _ in range(count - 2))
    ]
    return [(name, 0, 1), *((name, *pair) for pair in drawn), (name, size - 1, 1)]


def right(name: str, offset: int, size: int) -> bytes:
    return FILES[name][offset : offset + size]


def in_processes(count: int, work: Callable[[int], None]) -> None:
    """Forked, as a loader's workers are; each must end well."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(number,), daemon=True) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
