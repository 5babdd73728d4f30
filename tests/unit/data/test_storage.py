"""Remote bytes are those of the local file, or there is an error: from a real S3 server and over HTTP, with faults on the way."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest

from mmar_megatron.data.chunk_cache import ChunkCache, no_fork
from mmar_megatron.data.read_ahead import ReadAhead
from mmar_megatron.data.storage import LocalStorage, MissingError, ReadAheadLimits, Retry, Storage, StorageError, open_storage
from tests.unit.data.faulty_server import FAULTS, Fault, FaultyServer, FolderSource, ServerSource, faulty_server
from tests.unit.data.object_store import BUCKET, ObjectStore, credentials, object_store

pytestmark = pytest.mark.timeout(120)

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


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        for name, content in FILES.items():
            store.put(f"set/{name}", content)
        yield store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "set"


@pytest.fixture
def http(folder: Path) -> Iterator[Place]:
    def put(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)

    with faulty_server(FolderSource(folder.parent)) as server:
        yield Place(f"{server.url}/set", server, put)


@pytest.fixture
def s3(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with faulty_server(ServerSource(store.address)) as server:
        for name, value in credentials(server.url).items():
            monkeypatch.setenv(name, value)
        yield Place(f"s3://{BUCKET}/set", server, lambda name, content: store.put(f"set/{name}", content))


@pytest.fixture(params=["s3", "http"])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(request.param)


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


# Bytes


def test_ranges_are_those_of_the_local_file(place: Place, folder: Path) -> None:
    with closing(place.open()) as remote, closing(open_storage(folder)) as local:
        for name, offset, size in [*ranges(30), *ranges(10, name="index/offset.npy")]:
            assert remote.read(name, offset, size) == local.read(name, offset, size) == right(name, offset, size)
        assert remote.read(NAME, 5, 0) == local.read(NAME, 5, 0) == b""
        assert len(place.server.ranges) == len(place.server.requests) == 40


def test_other_drivers_are_read_as_well() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/storage-test/a.tar", FILES[NAME])
    with closing(open_storage("memory://storage-test", retry=PATIENT)) as storage:
        assert [storage.read(*r) for r in ranges(10)] == [right(*r) for r in ranges(10)]
        assert storage.sizes([NAME, "no.tar"]) == {NAME: len(FILES[NAME]), "no.tar": None}
        with pytest.raises(
            StorageError, match=r"memory://storage-test/a.tar, bytes 3000000 to 3000002: .* 1 bytes came instead of 2"
        ):
            storage.read(NAME, 3_000_000, 2)
        with pytest.raises(MissingError, match=r"memory://storage-test/no\.tar"):
            storage.read("no.tar", 0, 1)
    memory.rm("/storage-test", recursive=True)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_below_the_limit_change_nothing(place: Place, fault: Fault, ahead: bool, caplog: pytest.LogCaptureFixture) -> None:
    retry = HASTY if fault == "hang" else PATIENT
    with closing(place.open(retry=retry)) as storage:
        assert storage.read(NAME, 0, 5000) == right(NAME, 0, 5000)  # what a stale answer repeats
        place.server.faults = [fault] * (retry.attempts - 1)
        if ahead:
            storage.read_ahead([(NAME, 1000, 5000)])
        assert storage.read(NAME, 1000, 5000) == right(NAME, 1000, 5000)
    assert place.server.faults == []
    assert f"{place.url}/{NAME}, bytes 1000 to 6000: " in caplog.text


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_above_the_limit_end_in_an_error_with_the_name(place: Place, fault: Fault, ahead: bool) -> None:
    retry = HASTY if fault == "hang" else PATIENT
    with closing(place.open(retry=retry)) as storage:
        storage.read(NAME, 0, 5000)
        place.server.forget()
        place.server.always = fault
        if ahead:
            storage.read_ahead([(NAME, 1000, 5000)])
        with pytest.raises(StorageError) as raised:
            storage.read(NAME, 1000, 5000)
        assert f"{place.url}/{NAME}, bytes 1000 to 6000: {retry.attempts} attempts in " in str(raised.value)
        # aiohttp itself repeats a request, once, whose connection is closed before any answer.
        assert len(place.server.ranges) in range(retry.attempts, retry.attempts * (2 if fault == "reset" else 1) + 1)
        place.server.always = None
        assert storage.read(NAME, 1000, 5000) == right(NAME, 1000, 5000)


def test_many_reads_on_a_bad_day(place: Place) -> None:
    draw = random.Random(0)
    retry = Retry(attempts=40, request_seconds=20, first_wait_seconds=0.01, longest_wait_seconds=0.02)
    likely = [fault for fault in FAULTS if fault != "hang"]
    wanted = ranges(100)
    with closing(place.open(retry=retry, read_ahead=ReadAheadLimits(join_gap=10 * KIB))) as storage:
        storage.read(NAME, 0, 100)
        place.server.faults = [draw.choice([None, draw.choice(likely)]) for _ in range(1000)]
        for begin in range(0, len(wanted), 20):
            storage.read_ahead(wanted[begin : begin + 20])
            assert [storage.read(*r) for r in wanted[begin : begin + 20]] == [right(*r) for r in wanted[begin : begin + 20]]
    assert len(place.server.ranges) > 150


def test_what_retrying_cannot_mend_is_asked_once(place: Place) -> None:
    with closing(place.open()) as storage:
        with pytest.raises(MissingError, match=f"{place.url}/no.tar, bytes 0 to 10: there is no such file"):
            storage.read("no.tar", 0, 10)
        assert len(place.server.requests) == 1


def test_wrong_credentials_are_no_reason_to_retry(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with (
        closing(s3.open()) as storage,
        pytest.raises(StorageError, match=rf"{s3.url}/{NAME}, bytes 0 to 10: PermissionError: .*sign"),
    ):
        storage.read(NAME, 0, 10)
    assert len(s3.server.requests) == 1
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with closing(s3.open()) as storage, pytest.raises(StorageError, match="NoCredentialsError: Unable to locate credentials"):
        storage.read(NAME, 0, 10)


def test_a_range_beyond_the_end_is_an_error(place: Place) -> None:
    with closing(place.open()) as storage:
        for offset in (len(FILES[NAME]) - 5, len(FILES[NAME]) + 5):
            with pytest.raises(StorageError, match=f"{place.url}/{NAME}, bytes {offset} to {offset + 10}: "):
                storage.read(NAME, offset, 10)


def test_a_server_without_ranges_is_found_out(http: Place) -> None:
    http.server.always = "no ranges"
    with closing(http.open()) as storage:
        with pytest.raises(
            StorageError, match=f"{http.url}/{NAME}, bytes 5 to 15: .* the server sends the whole file instead of a range"
        ):
            storage.read(NAME, 5, 10)
        assert storage.read(NAME, 0, len(FILES[NAME])) == FILES[NAME]


def test_a_file_that_changes_under_a_run_is_an_error(place: Place) -> None:
    """HTTP: where its size changes. Entity tags differ there from one server behind a name to the next."""
    new = FILES[NAME][::-1] + (b"" if place.url.startswith("s3") else b"1")
    place.put("changing.tar", FILES[NAME])
    with closing(place.open()) as storage, closing(place.open()) as later:
        assert storage.read("changing.tar", 0, 10) == FILES[NAME][:10]
        place.put("changing.tar", new)
        with pytest.raises(
            StorageError, match=f"{place.url}/changing.tar, bytes 20 to 30: .* has changed since it was first read"
        ):
            storage.read("changing.tar", 20, 10)
        assert later.read("changing.tar", 20, 10) == new[20:30]


# Sizes


def test_sizes(place: Place) -> None:
    names = [*FILES, "no.tar", "index/no.npy", "nowhere/no.npy", "nowhere/none.npy"]
    with closing(place.open()) as storage:
        assert storage.sizes(names) == {name: len(FILES[name]) if name in FILES else None for name in names}
        if place.url.startswith("s3"):
            assert len(place.server.requests) <= 3 * 2  # one listing a folder; the driver asks twice about an empty one
        assert storage.size(NAME) == len(FILES[NAME])
        assert storage.size("no.tar") is None
        assert storage.size("index") is None


@pytest.mark.parametrize("names", [[NAME], [NAME, "b.tar", "no.tar"]])
@pytest.mark.parametrize("fault", ["500", "503 without body", "reset"])
def test_a_server_in_trouble_does_not_make_files_missing(place: Place, fault: Fault, names: list[str]) -> None:
    place.server.everything = True
    with closing(place.open()) as storage:
        place.server.faults = [fault] * 2
        assert storage.sizes(names) == {name: len(FILES[name]) if name in FILES else None for name in names}
        place.server.always = fault
        with pytest.raises(StorageError, match=place.url):
            storage.sizes(names)


# Read-ahead


def test_neighbouring_ranges_become_one_request(place: Place) -> None:
    limits = ReadAheadLimits(join_gap=50, join_bytes=10_000)
    wanted = [(NAME, 100 * i, 100) for i in range(50)]  # one
    wanted += [(NAME, 20_000, 100), (NAME, 20_150, 100), (NAME, 20_301, 100)]  # two: the second gap is too large
    wanted += [("b.tar", 5000 * i, 5000) for i in range(4)]  # two of 10,000
    wanted += [(NAME, 100_000, 30_000)]  # larger than any joined one
    random.Random(0).shuffle(wanted)
    with closing(place.open(read_ahead=limits)) as storage:
        storage.read_ahead(wanted)
        assert [storage.read(*r) for r in wanted] == [right(*r) for r in wanted]
    expected = ["0-4999", "20000-20249", "20301-20400", "0-9999", "10000-19999", "100000-129999"]
    assert sorted(place.server.ranges) == sorted(f"bytes={span}" for span in expected)


def test_requests_overlap_and_none_is_made_twice(place: Place) -> None:
    place.server.latency = 0.1
    wanted = [(NAME, 50_000 * i, 1000) for i in range(12)]
    with closing(place.open(read_ahead=ReadAheadLimits(threads=4, join_gap=0))) as storage:
        assert storage.read(*wanted[0]) == right(*wanted[0])
        assert place.server.most_at_once == 1
        place.server.forget()
        storage.read_ahead(wanted[:4])
        storage.read_ahead(wanted)  # a part of it is under way
        assert [storage.read(*r) for r in wanted] == [right(*r) for r in wanted]
        assert place.server.most_at_once >= 3  # four threads, and a reader that may be ahead of them
        assert len(place.server.ranges) == len(wanted)


def test_what_is_fetched_and_not_yet_read_is_bounded(http: Place) -> None:
    wanted = [(NAME, 50_000 * i, 10_000) for i in range(12)]
    with closing(http.open(read_ahead=ReadAheadLimits(threads=4, join_gap=0, most_bytes=35_000))) as storage:
        storage.read_ahead(wanted)
        for already in range(3):
            wait_until(lambda fetched=already + 3: len(http.server.ranges) == fetched)  # type: ignore[misc]
            time.sleep(0.1)
            assert len(http.server.ranges) == already + 3
            assert storage.read(*wanted[already]) == right(*wanted[already])
        assert [storage.read(*r) for r in wanted[3:]] == [right(*r) for r in wanted[3:]]
        assert len(http.server.ranges) == len(wanted)


def test_what_is_announced_and_never_read_gives_way() -> None:
    fetchers: dict[tuple[str, int], str] = {}

    def fetch(name: str, start: int, end: int) -> bytes:
        fetchers[name, start] = threading.current_thread().name
        return right(name, start, end - start)

    skipped = [(NAME, 50_000 * i, 10_000) for i in range(6)]
    wanted = [("b.tar", 50_000 * i, 10_000) for i in range(20)]
    with closing(ReadAhead(fetch, limits=ReadAheadLimits(threads=2, join_gap=0, most_bytes=35_000))) as ahead:
        ahead.announce(skipped)
        wait_until(lambda: len(fetchers) == 3)
        for half in (wanted[:10], wanted[10:]):
            ahead.announce(half)
            for k, r in enumerate(half):
                assert ahead.take(*r) == right(*r)
                if half == wanted[10:] and k == 0:  # all that was skipped is forgotten, and there is room for three
                    wait_until(lambda: ("b.tar", 50_000 * 13) in fetchers)
        assert ahead.take(*skipped[0]) is None
        assert fetchers["b.tar", 0] == threading.current_thread().name
        assert fetchers["b.tar", 50_000 * 13].startswith("read-ahead")


def test_a_reader_that_fetches_for_itself_makes_room() -> None:
    skipped, wanted = [[(name, 50_000 * i, 10_000) for i in range(3)] for name in (NAME, "b.tar")]
    fetched: list[int] = []

    def fetch(name: str, start: int, end: int) -> bytes:
        fetched.append(start)
        return right(name, start, end - start)

    with closing(ReadAhead(fetch, limits=ReadAheadLimits(threads=1, join_gap=0, most_bytes=35_000))) as ahead:
        ahead.announce([*skipped, *wanted])
        wait_until(lambda: len(fetched) == 3)
        assert ahead.take(*skipped[2]) == right(*skipped[2])  # the last is complete, and one more is fetched
        wait_until(lambda: len(fetched) == 4)
        wanted = wanted[1:]
        assert ahead.take(*wanted[0]) == right(*wanted[0])
        assert ahead.take(*skipped[0]) is None
        assert ahead.take(*skipped[1]) == right(*skipped[1])


def test_an_error_in_the_background_is_raised_by_who_reads(place: Place) -> None:
    with closing(place.open(read_ahead=ReadAheadLimits(join_gap=0))) as storage:
        place.server.always = "503"
        storage.read_ahead([(NAME, 0, 100), (NAME, 100, 100), ("no.tar", 0, 100)])
        wait_until(lambda: len(place.server.ranges) >= 2 * PATIENT.attempts - 1)
        with pytest.raises(StorageError, match=f"{place.url}/{NAME}, bytes 0 to 200: 4 attempts"):
            storage.read(NAME, 100, 100)
        place.server.always = None
        assert storage.read(NAME, 0, 100) == right(NAME, 0, 100)
        assert storage.read(NAME, 100, 100) == right(NAME, 100, 100)
        with pytest.raises(StorageError, match=f"{place.url}/no.tar"):
            storage.read("no.tar", 0, 100)


def test_closing_ends_the_threads(http: Place) -> None:
    http.server.always = "hang"
    storage = http.open(retry=HASTY, read_ahead=ReadAheadLimits(threads=3, join_gap=0))
    storage.read_ahead([(NAME, 50_000 * i, 10) for i in range(9)])
    wait_until(lambda: len(http.server.ranges) == 3)
    storage.close()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")])
    http.server.always = None
    assert storage.read(NAME, 0, 10) == right(NAME, 0, 10)  # opened anew
    storage.close()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Cache


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


# Processes


@pytest.mark.parametrize("cached", [False, True])
def test_a_forked_worker_reads_after_its_parent_did(place: Place, tmp_path: Path, cached: bool) -> None:
    settings: dict[str, Any] = {"cache_dir": tmp_path, "cache_bytes": 2**24, "chunk_bytes": 10 * KIB} if cached else {}
    place.server.latency = 0.01
    wanted = ranges(20)
    with closing(place.open(**settings)) as storage:
        storage.read(NAME, 0, 10)
        storage.read_ahead([(NAME, 100_000 * i, 10) for i in range(20)])  # under way while the fork happens

        def work(number: int) -> None:
            storage.read_ahead(wanted[number:])
            assert [storage.read(*r) for r in wanted] == [right(*r) for r in wanted]
            in_processes_of_its_own(storage)

        in_processes(2, work)
        assert [storage.read(*r) for r in wanted] == [right(*r) for r in wanted]


def in_processes_of_its_own(storage: Storage) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if storage.read(NAME, 7, 10) == right(NAME, 7, 10) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_pickled_storage_reads(place: Place, folder: Path) -> None:
    with closing(place.open()) as storage:
        storage.read(NAME, 0, 10)
        storage.read_ahead([(NAME, 0, 10)])
        with closing(pickle.loads(pickle.dumps(storage))) as other:
            assert other.read(NAME, 7, 10) == right(NAME, 7, 10)
    local = open_storage(folder)
    local.read(NAME, 0, 10)
    assert pickle.loads(pickle.dumps(local)).read(NAME, 7, 10) == right(NAME, 7, 10)


# Whole files


def test_a_whole_file_is_downloaded_once(place: Place, tmp_path: Path) -> None:
    place.server.latency = 0.02
    settings: dict[str, Any] = {"cache_dir": tmp_path / "cache", "read_ahead": ReadAheadLimits(join_bytes=500_000)}

    def work(_: int) -> None:
        with closing(place.open(**settings)) as storage:
            for name, content in FILES.items():
                assert storage.local(name).read_bytes() == content
                assert storage.local(name).name == name.rpartition("/")[2]

    in_processes(4, work)
    assert len(place.server.ranges) == 7 + 3 + 1 + 1
    assert not list(tmp_path.rglob(".part"))


def test_half_a_file_is_never_found(http: Place, tmp_path: Path) -> None:
    with closing(http.open(cache_dir=tmp_path / "cache", read_ahead=ReadAheadLimits(join_bytes=500_000))) as storage:
        http.server.faults = ["500"] * 4
        http.server.always = "cut"
        with pytest.raises(StorageError, match=f"{http.url}/{NAME}, bytes "):
            storage.local(NAME)
        assert not list((tmp_path / "cache").rglob(NAME))
        http.server.always = None
        copy = storage.local(NAME)
        assert copy.read_bytes() == FILES[NAME]
        copy.write_bytes(b"cut off")
        assert storage.local(NAME).read_bytes() == FILES[NAME]
        with pytest.raises(MissingError, match=f"{http.url}/no.npy"):
            storage.local("no.npy")


def test_without_a_folder_copies_go_to_the_temporary_one(http: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with closing(http.open()) as storage:
        copy = storage.local("index/kind.npy")
        assert copy.read_bytes() == FILES["index/kind.npy"]
        assert copy.is_relative_to(tmp_path / "tmp")
        asked = len(http.server.ranges)
        assert storage.local("index/kind.npy") == copy
        assert len(http.server.ranges) == asked
    assert (tmp_path / "tmp" / f"mmar-storage-{os.getuid()}").stat().st_mode & 0o777 == 0o700


# Local


def test_a_local_file_that_ends_too_early_is_named(folder: Path) -> None:
    storage = open_storage(folder)
    with pytest.raises(StorageError, match=f"{folder}/a.tar, bytes 2999996 to 3000006: the file ends 5 bytes before"):
        storage.read(NAME, 2_999_996, 10)
    with pytest.raises(MissingError, match=f"{folder}/no.tar, bytes 0 to 1: there is no such file"):
        storage.read("no.tar", 0, 1)
    with pytest.raises(StorageError, match=f"{folder}/index, bytes 0 to 1: .*Is a directory"):
        storage.read("index", 0, 1)
    with pytest.raises(MissingError, match=f"{folder}/no.npy"):
        storage.local("no.npy")


def test_local_files(folder: Path) -> None:
    for root in (folder, f"file://{folder}"):
        storage = open_storage(root)
        assert isinstance(storage, LocalStorage)
        storage.read_ahead([*ranges(10), ("no.tar", 0, 10)])
        assert [storage.read(*r) for r in ranges(10)] == [right(*r) for r in ranges(10)]
        assert storage.sizes([*FILES, "no.tar", "index"]) == {n: len(c) for n, c in FILES.items()} | {
            "no.tar": None,
            "index": None,
        }
        assert storage.local("index/kind.npy") == folder / "index/kind.npy"


def test_open_files_are_few(folder: Path) -> None:
    for k in range(400):
        (folder / f"{k}.tar").write_bytes(b"%d" % k)
    storage = open_storage(folder)
    before = len(os.listdir("/proc/self/fd"))
    assert [storage.read(f"{k}.tar", 0, 1) for k in range(400)] == [str(k)[:1].encode() for k in range(400)]
    assert len(os.listdir("/proc/self/fd")) <= before + 256
    storage.close()
    assert len(os.listdir("/proc/self/fd")) <= before


# What a user can get wrong


def test_mistakes_are_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fsspec.get_filesystem_class", raise_import_error)
    with pytest.raises(ValueError, match=r"gs://bucket/set cannot be read without another package: `pip install gcsfs`"):
        open_storage("gs://bucket/set")
    with pytest.raises(ValueError, match=r"s3://bucket/set cannot be read without another package: `pip install s3fs`"):
        open_storage("s3://bucket/set")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nonsense:// is no protocol that fsspec knows"):
        open_storage("nonsense://bucket/set")
    with pytest.raises(ValueError, match="the cache has no folder"):
        open_storage("http://127.0.0.1/set", cache_bytes=2**30)
    with pytest.raises(ValueError, match="leaves no room for chunks"):
        open_storage("http://127.0.0.1/set", cache_dir=tmp_path, cache_bytes=2**20)


def raise_import_error(protocol: str) -> None:
    raise ImportError(protocol)


def test_no_password_is_shown() -> None:
    with closing(open_storage("http://user:secret@127.0.0.1:9/set", retry=Retry(attempts=1, request_seconds=5))) as storage:
        with pytest.raises(StorageError) as raised:
            storage.read(NAME, 0, 1)
        assert "http://127.0.0.1:9/set/a.tar, bytes 0 to 1: " in str(raised.value)
        assert "secret" not in str(raised.value)
