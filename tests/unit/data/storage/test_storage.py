"""Remote bytes are those of the local file, or there is an error: from a real S3 server and over HTTP, with faults on the way."""

from __future__ import annotations

import os
import pickle
import random
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mmar_megatron.data.read_ahead import ReadAhead
from mmar_megatron.data.storage import LocalStorage, MissingError, ReadAheadLimits, Retry, Storage, StorageError, open_storage
from tests.unit.data.faulty_server import FAULTS, Fault
from tests.unit.data.storage.places import FILES, HASTY, KIB, NAME, PATIENT, Place, in_processes, ranges, right, wait_until

pytestmark = pytest.mark.timeout(120)

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
