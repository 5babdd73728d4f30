"""A manifest finds whatever is not as it was written, in the files and in itself."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mmar_megatron.training import manifest

FILES = {"a.bin": b"0123456789", "b.bin": b"", "c/d.bin": bytes(range(256))}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    manifest.write(tmp_path, files={name: manifest.record(tmp_path / name) for name in FILES}, facts={"step": 7})
    return tmp_path


def flip(path: Path, *, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_what_is_as_it_was_written_is_good(written: Path) -> None:
    assert manifest.problems(written) == []
    assert manifest.read(written)["step"] == 7
    (written / "notes.txt").write_text("of a user")
    assert manifest.problems(written) == []


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda d: (d / "a.bin").write_bytes(b"01234"), "a.bin has 5 bytes, not 10"),
    "longer": (lambda d: (d / "b.bin").write_bytes(b"0"), "b.bin has 1 bytes, not 0"),
    "one bit": (lambda d: flip(d / "c/d.bin", byte=100), "c/d.bin has other content than was written"),
    "missing": (lambda d: (d / "a.bin").unlink(), "a.bin is missing"),
    "missing folder": (lambda d: (d / "c").rename(d / "elsewhere"), "c/d.bin is missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda d: (d / "manifest.json").write_text(""), "manifest.json makes no sense"),
    "manifest of something else": (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json makes no sense"),
    "manifest that is no text": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json makes no sense"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(name: str, written: Path) -> None:
    damage, expected = DAMAGES[name]
    damage(written)
    (problem,) = manifest.problems(written)
    assert problem.startswith(expected)


def test_every_flipped_bit_of_the_manifest_is_found(written: Path) -> None:
    """All but one in the spaces between its words, which say nothing."""
    path = written / "manifest.json"
    whole, meaning = path.read_bytes(), json.loads(path.read_text())
    unnoticed = []
    for byte in range(len(whole)):
        flip(path, byte=byte)
        if not manifest.problems(written):
            unnoticed.append(byte)
            assert json.loads(path.read_text()) == meaning
        path.write_bytes(whole)
    assert len(unnoticed) < 0.3 * len(whole)


def test_several_readers_share_the_files(written: Path) -> None:
    (written / "a.bin").unlink()
    (written / "c/d.bin").unlink()
    parts = [manifest.problems(written, rank=rank, ranks=2) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 0]  # a.bin and c/d.bin are the first and the third
    assert sorted(parts[0]) == sorted(manifest.problems(written))


def test_reading_does_not_flush(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems that are only read, squashfs among them, refuse it."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    assert manifest.problems(written) == []


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
def test_storage_that_fails_is_not_damage(name: str, written: Path) -> None:
    (written / name).unlink()
    (written / name).symlink_to(name)  # too many levels of symbolic links
    with pytest.raises(OSError, match="symbolic links"):
        manifest.problems(written)
