from pathlib import Path

import pytest

from mmar_megatron.data.npm import Package, fetch
from tests.browser import PACKAGE as BROWSER

NAMES = Package(name="emojibase-data", version="17.0.0", sha256="0" * 64)


def test_the_tarball_is_called_as_npm_calls_it() -> None:
    assert NAMES.file_name == "emojibase-data-17.0.0.tgz"
    assert BROWSER.file_name == f"sparticuz-chromium-{BROWSER.version}.tgz"


def test_package_that_is_not_the_pinned_one(tmp_path: Path) -> None:
    (tmp_path / NAMES.file_name).write_bytes(b"another")
    with pytest.raises(ValueError, match=r"emojibase-data-17.0.0.tgz is not the pinned package"):
        fetch(NAMES, cache=tmp_path)


def test_npm_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"npm is not installed: install npm and connect, or run `npm pack emojibase-data@17.0.0"
    ):
        fetch(NAMES, cache=tmp_path / "cache", log=lambda _: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'npm error 404 not found' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ValueError, match=r"npm could not fetch emojibase-data \(npm error 404 not found\)"):
        fetch(NAMES, cache=tmp_path / "cache", log=lambda _: None)
    assert list((tmp_path / "cache").iterdir()) == []
