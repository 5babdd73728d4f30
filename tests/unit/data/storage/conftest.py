"""The places to read from, each behind a server that can be told to fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.data.faulty_server import FolderSource, ServerSource, faulty_server
from tests.unit.data.object_store import BUCKET, ObjectStore, credentials, object_store
from tests.unit.data.storage.places import FILES, Place


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
