"""Cached chunks are the bytes of the remote file, bounded, shared by processes, and mended when damaged."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mmar_megatron.data.chunk_cache import ChunkCache, no_fork
from mmar_megatron.data.storage import ReadAheadLimits
from tests.unit.data.storage.places import FILES, KIB, NAME, Place, in_processes, ranges, right

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_second_reader_makes_no_request_for_bytes(place: Place, tmp_path: Path, ahead: bool) -> None:
    settings: dict[str, Any] = {"cache_dir": tmp_path / "cache", "cache_bytes": 2**24, "chunk_bytes": 100 * KIB}
    wanted = [*ranges(30, longest=200 * KIB), *ranges(10, name="b.tar"), *ranges(5, name="index/kind.npy")]
    with closing(place.open(**settings)) as storage:
        if ahead:
            storage.read_ahead(wanted)
        assert [storage.read(*r) for r in wanted] == [right(*r) for r in wanted]
        asked = len(place.server.ranges)
        chunks = {(name, k) for name, offset, size in wanted for k in range(offset // 102400, -(-(offset + size) // 102400))}
        if ahead:  # gaps of joined ranges too
            assert len(chunks) <= asked <= 30 + 11 + 1
        else:
            assert asked == len(chunks)
        assert len(set(place.server.ranges)) <= asked

    def again(_: int) -> None:
        with closing(place.open(**settings)) as storage:
            if ahead:
                storage.read_ahead(wanted)
            assert [storage.read(*r) for r in wanted] == [right(*r) for r in wanted]

    again(0)
    in_processes(2, again)
    assert len(place.server.ranges) == asked


def test_threads_do_not_fetch_a_chunk_twice(place: Place, tmp_path: Path) -> None:
    place.server.latency = 0.05
    settings: dict[str, Any] = {"cache_dir": tmp_path / "cache", "cache_bytes": 2**24, "chunk_bytes": 100 * KIB}
    wanted = [(NAME, 20_000 * i, 1000) for i in range(5)]
    with closing(place.open(**settings, read_ahead=ReadAheadLimits(join_gap=0))) as storage:
        storage.read_ahead(wanted)
        assert [storage.read(*r) for r in wanted] == [right(*r) for r in wanted]
    assert place.server.ranges == ["bytes=0-102399"]


def cached_files(cache: Path) -> list[Path]:
    return [path for path in (cache / "chunks-1").rglob("*") if path.is_file() and path.name != "used"]


def test_the_bound_holds_with_several_processes(http: Place, tmp_path: Path) -> None:
    cache, bound, chunk, processes = tmp_path / "cache", 600_000, 64 * KIB, 4
    settings: dict[str, Any] = {"cache_dir": cache, "cache_bytes": bound, "chunk_bytes": chunk}
    most, looks, ended = 0, 0, threading.Event()
    (cache / "chunks-1").mkdir(parents=True)

    def watch() -> None:
        nonlocal most, looks
        while not ended.is_set():
            with no_fork, (cache / "chunks-1" / "used").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # no chunk comes or goes while it looks
                sizes = [path.stat().st_size for path in cached_files(cache) if path.suffix != ".part"]
            most, looks = max(most, sum(sizes)), looks + 1
            time.sleep(0.002)

    def work(number: int) -> None:
        with closing(http.open(**settings)) as storage:
            for r in ranges(150, seed=number):
                assert storage.read(*r) == right(*r)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        in_processes(processes, work)
    finally:
        ended.set()
        watcher.join()
    assert looks > 20
    assert bound * 0.7 < most <= bound  # beside the one chunk that each process writes
    assert not list(cache.rglob("*.part"))


def test_a_fork_while_a_chunk_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ChunkCache(tmp_path, most_bytes=2**20)
    entered, used = threading.Event(), cache._used

    def slow(counter: int) -> int:
        entered.set()
        time.sleep(0.3)  # with the lock
        return used(counter)

    monkeypatch.setattr(cache, "_used", slow)
    writer = threading.Thread(target=cache.put, args=("a", b"a" * 1000))
    writer.start()
    entered.wait()
    child = multiprocessing.get_context("fork").Process(target=ChunkCache(tmp_path, most_bytes=2**20).put, args=("b", b"b"))
    child.start()
    writer.join()
    child.join(10)
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert cache.get("b", size=1, start=0, end=1) == b"b"


def test_what_was_used_last_stays(http: Place, tmp_path: Path) -> None:
    cache, chunk = tmp_path / "cache", 64 * KIB
    settings: dict[str, Any] = {"cache_dir": cache, "cache_bytes": 10 * (chunk + KIB), "chunk_bytes": chunk}
    with closing(http.open(**settings)) as storage:
        for k in range(10):
            storage.read(NAME, k * chunk, 10)
            for path in cached_files(cache):  # as if some time had passed
                os.utime(path, (path.stat().st_atime - 100, path.stat().st_mtime - 100))
        storage.read(NAME, 0, 10)
        storage.read(NAME, 10 * chunk, 10)  # makes room
        http.server.forget()
        storage.read(NAME, 0, 10)
        assert http.server.ranges == []
        storage.read(NAME, chunk, 10)
        assert len(http.server.ranges) == 1


@pytest.mark.parametrize("damage", ["bit", "header", "table", "shorter", "longer", "empty", "swapped"])
def test_a_damaged_chunk_is_fetched_anew(http: Place, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "cache"
    settings: dict[str, Any] = {"cache_dir": cache, "cache_bytes": 2**24, "chunk_bytes": 256 * KIB}
    wanted = [("b.tar", 256 * KIB * k, 256 * KIB) for k in range(4)]
    with closing(http.open(**settings)) as storage:
        assert [storage.read(*r) for r in wanted] == [right(*r) for r in wanted]
        files = cached_files(cache)
        assert len(files) == 4
        contents = [path.read_bytes() for path in files]
        for number, (path, content) in enumerate(zip(files, contents, strict=True)):
            place_of_bit = {"bit": len(content) - 1000, "header": 3, "table": 30}.get(damage)
            if place_of_bit is not None:
                content = content[:place_of_bit] + bytes([content[place_of_bit] ^ 4]) + content[place_of_bit + 1 :]
            other = contents[(number + 1) % 4]
            path.write_bytes(
                {"shorter": content[:-1], "longer": content + b"1", "empty": b"", "swapped": other}.get(damage, content)
            )
        http.server.forget()
        assert [storage.read(*r) for r in wanted] == [right(*r) for r in wanted]
        assert len(http.server.ranges) == 4
        assert caplog.text.count("is damaged: it is removed and fetched anew") == 4
        assert sorted(path.read_bytes() for path in cached_files(cache)) == sorted(contents)


def test_a_count_that_was_lost_is_made_anew(http: Place, tmp_path: Path) -> None:
    cache, chunk = tmp_path / "cache", 64 * KIB
    settings: dict[str, Any] = {"cache_dir": cache, "cache_bytes": 10 * (chunk + KIB), "chunk_bytes": chunk}
    with closing(http.open(**settings)) as storage:
        for text in (b"", b"no number at all....", b"00000000009999999999"):
            (cache / "chunks-1").mkdir(parents=True, exist_ok=True)
            (cache / "chunks-1" / "used").write_bytes(text)
            for k in range(20):
                storage.read(NAME, k * chunk, 10)
            assert 5 < len(cached_files(cache)) <= 10
            assert int((cache / "chunks-1" / "used").read_bytes()) == sum(path.stat().st_size for path in cached_files(cache))


def test_a_changed_file_is_not_served_from_the_cache(place: Place, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache_dir": tmp_path / "cache", "cache_bytes": 2**24, "chunk_bytes": 100 * KIB}
    for content in (FILES[NAME], FILES[NAME][::-1], FILES["b.tar"]):
        place.put("changing.npy", content)
        for _ in range(2):
            with closing(place.open(**settings)) as storage:
                assert storage.read("changing.npy", 150_000, 100_000) == content[150_000:250_000]
                assert storage.local("changing.npy").read_bytes() == content
    assert len([r for r in place.server.ranges if r.startswith("bytes=102400-")]) == 3


def test_a_cache_that_cannot_be_written_is_no_error(http: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"cache_dir": tmp_path / "cache", "cache_bytes": 2**24, "chunk_bytes": 100 * KIB}
    with closing(http.open(**settings)) as storage:
        storage.read(NAME, 0, 10)
        (tmp_path / "cache" / "chunks-1" / "used").unlink()
        (tmp_path / "cache" / "chunks-1" / "used").mkdir()
        assert [storage.read(*r) for r in ranges(30)] == [right(*r) for r in ranges(30)]
    assert caplog.text.count("cannot be written") == 1
