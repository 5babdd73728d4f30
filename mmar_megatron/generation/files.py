"""The directory of painted pictures: PNG files that say how they were painted, and manifest.jsonl, a line for each, in order."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mmar_megatron.data.preparation.unfinished import atomically
from mmar_megatron.generation.resuming import Journal, difference

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
        self.path = path
        self._journal = Journal(path / MANIFEST)
        try:
            self.done = self._whole(records)
        except ValueError:
            self._journal.close()
            raise
        self._journal.keep(self.done)

    def _whole(self, records: Sequence[dict[str, Any]]) -> int:
        """The number of pictures that are there, up to the first that is not."""
        there = self._journal.rows
        for row, record in zip(there, records, strict=False):
            if differ := difference(row, record, except_for=_MAY_DIFFER):
                raise ValueError(
                    f"{self.path / record['file']} was painted with other settings ({differ}): give those to go on, or another "
                    "--out"
                )
        if len(there) > len(records):
            raise ValueError(
                f"{self.path} has {len(there)} pictures, and {len(records)} are asked for: give the same prompts and --images, "
                "or another --out"
            )
        missing = (number for number, row in enumerate(there) if not (self.path / row["file"]).is_file())
        return next(missing, len(there))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()

    def add(self, pixels_HW3: NDArray[np.uint8], *, record: dict[str, Any]) -> None:
        """The next picture: first its file, whole or not at all, then its line."""
        atomically(self.path / record["file"], as_png(pixels_HW3, record=record))
        self._journal.add(record)


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
