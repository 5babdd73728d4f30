"""`manifest.json`: what a checkpoint consists of, to the last byte. Written last, and held against the files when they are read.

A checkpoint without a manifest is not complete; one that differs from its manifest is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

MANIFEST = "manifest.json"


class FileRecord(TypedDict):
    """What a file must be."""

    bytes: int
    sha256: str


def record(path: Path, *, flush: bool = True) -> FileRecord:
    """Describe a file as it stands now, and flush it to the disk (which storage that is only read may refuse)."""
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write(directory: Path, *, files: dict[str, FileRecord], facts: dict[str, Any]) -> None:
    """Complete a checkpoint's directory, durably.

    Args:
        directory: where `files` lie, by their names in it.
        facts: what a reader may want to know beside them.
    """
    manifest = {**facts, "files": dict(sorted(files.items()))}
    with (directory / MANIFEST).open("w") as file:
        json.dump({**manifest, "sha256": _digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush(directory)


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, or not what was written.
        OSError: the storage does not give it.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        digest = manifest.pop("sha256")
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{MANIFEST} makes no sense") from error
    if digest != _digest(manifest):
        raise ValueError(f"{MANIFEST} is not what was written")
    return manifest


def problems(directory: Path, *, rank: int = 0, ranks: int = 1) -> list[str]:
    """What is wrong with a checkpoint; empty where every byte is as it was written.

    That takes as long as reading all of it: `ranks` processes may share the files among them.

    Raises:
        OSError: the storage does not give what it has, which says nothing of the checkpoint.
    """
    try:
        files = sorted(read(directory)["files"].items())
    except ValueError as error:
        return [str(error)]
    return list(_differences(directory, files[rank::ranks]))


def _differences(directory: Path, files: Iterable[tuple[str, FileRecord]]) -> Iterable[str]:
    for name, expected in files:
        try:
            size = (directory / name).stat().st_size
            if size != expected["bytes"]:
                yield f"{name} has {size} bytes, not {expected['bytes']}"
            elif record(directory / name, flush=False) != expected:
                yield f"{name} has other content than was written"
        except FileNotFoundError:
            yield f"{name} is missing"


def flush(path: Path) -> None:
    """Make a file's content, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of_text(text: str) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    """So that a manifest altered in one character is found too."""
    return digest_of_text(json.dumps(manifest, sort_keys=True))
