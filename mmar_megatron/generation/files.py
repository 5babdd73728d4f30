"""The directory of painted pictures: PNG files that say how they were painted, and manifest.jsonl, a line for each, in order."""

from __future__ import annotations

import fcntl
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mmar_megatron.data.preparation.unfinished import atomically

MANIFEST = "manifest.jsonl"
SETTINGS = "Settings"
"""The text of a PNG that holds its record, beside the standard's own Description (the prompt) and Software."""
_MAY_DIFFER = ("model", "start", "redraw", "version")
"""Of a record: places, which digests stand beside, and what wrote it."""


class Folder:
    """Takes pictures one after another, as a context; goes on after the last whole one of a command that was stopped.

    Args:
        path: the directory; made where it is missing.
        records: of all pictures there will be, each with its file's name.

    Raises:
        ValueError: what is there was painted with other settings, or another process is at it.
    """

    def __init__(self, path: Path, *, records: Sequence[dict[str, Any]]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: IO[bytes] = (path / MANIFEST).open("a+b")
        try:
            self.done = self._begin(records)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, records: Sequence[dict[str, Any]]) -> int:
        """The number of pictures that are whole; the manifest is cut behind them."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process, however it ends
        except OSError as error:
            raise ValueError(f"another process paints into {self.path}: wait for it, or choose another --out") from error
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        done = end = 0
        for line in lines:
            try:
                there = json.loads(line)
            except ValueError:
                break  # of a process that was killed while it wrote
            if done == len(records):
                raise ValueError(
                    f"{self.path} has {len(lines)} pictures, and {len(records)} are asked for: give the same prompts and "
                    "--images, or another --out"
                )
            _check(self.path, there, records[done])
            if not line.endswith(b"\n") or not (self.path / there["file"]).is_file():
                break
            done, end = done + 1, end + len(line)
        self._file.truncate(end)
        return done

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, pixels_HW3: NDArray[np.uint8], *, record: dict[str, Any]) -> None:
        """The next picture: first its file, whole or not at all, then its line."""
        atomically(self.path / record["file"], as_png(pixels_HW3, record=record))
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()


def _check(path: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    names = [name for name in {**there, **wanted} if name not in _MAY_DIFFER and there.get(name) != wanted.get(name)]
    if names:
        differ = ", ".join(f"{name} was {there.get(name)!r} and is {wanted.get(name)!r}" for name in names)
        raise ValueError(
            f"{path / str(there.get('file'))} was painted with other settings ({differ}): give those to go on, or another --out"
        )


def as_png(pixels_HW3: NDArray[np.uint8], *, record: dict[str, Any]) -> bytes:
    """A PNG with its record as text."""
    text = PngInfo()
    text.add_itxt("Description", record["prompt"])
    text.add_itxt("Software", f"mmar_megatron {record['version']}")
    text.add_itxt(SETTINGS, json.dumps(record, ensure_ascii=False))
    file = io.BytesIO()
    Image.fromarray(pixels_HW3).save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def record_of(png: Path) -> dict[str, Any]:
    """The record that a painted picture carries."""
    with Image.open(png) as image:
        found: dict[str, Any] = json.loads(image.info[SETTINGS])
    return found
