"""Pictures in a folder, their captions beside them: NAME.jpg with NAME.txt (one caption a line) or NAME.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmar_megatron.data.preparation.records import NO_CAPTION, UNFIT, Block, CaptionFields, Raw, is_unicode

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
BLOCK_RECORDS = 1024


class FolderSource:
    """The pictures below a directory, folder by folder in the order of their names; hidden ones are left out.

    Args:
        directory: with pictures.
        captions: fields of the .json files.
        language: of the .txt files.

    Raises:
        ValueError: there is no such directory, or no picture in it.
    """

    chunk_records = 64

    def __init__(self, directory: str | Path, *, captions: CaptionFields, language: str) -> None:
        self._directory = Path(directory)
        self._captions, self._language = captions, language
        if not self._directory.is_dir():
            raise ValueError(f"there is no directory {directory}: name one with pictures")
        if next(self._walk(), None) is None:
            raise ValueError(
                f"there is no picture in {directory}: expected files that end in {', '.join(sorted(PICTURE_SUFFIXES))}"
            )
        self.settings = {
            "source": "folder",
            "directory": str(directory),
            "captions": [list(pair) for pair in captions.pairs],
            "language": language,
        }

    def _walk(self) -> Iterator[os.DirEntry[str]]:
        """Pictures, and what may hold their captions."""
        for folder, folders, _ in os.walk(self._directory):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if not entry.name.startswith(".") and Path(entry.name).suffix.lower() in PICTURE_SUFFIXES:
                    yield entry

    def blocks(self) -> Iterator[Block]:
        """Name, size and time of change of each picture."""
        pictures = self._walk()
        while entries := list(islice(pictures, BLOCK_RECORDS)):
            rows = []
            for entry in entries:
                name = os.path.relpath(entry.path, self._directory)
                if not is_unicode(name):
                    raise ValueError(f"{self._directory} holds {os.fsencode(name)!r}, whose name is not UTF-8: rename it")
                stat = entry.stat(follow_symlinks=os.path.exists(entry.path))  # a link may lead nowhere
                rows.append([name, stat.st_size, stat.st_mtime_ns])
            yield Block(len(rows), rows)

    def inputs(self) -> Iterator[Path]:
        """The captions' files."""
        for entry in self._walk():
            file = Path(entry.path)
            yield from (beside for suffix in (".json", ".txt") if (beside := file.with_suffix(suffix)).is_file())

    def read(self, block: Block, rows: Sequence[int] | None = None) -> Iterator[Raw]:
        """See `Source`."""
        for row in range(block.records) if rows is None else rows:
            name = Path(block.locator[row][0])
            file = self._directory / name
            beside = [_content(file.with_suffix(suffix)) for suffix in (".json", ".txt")]
            captions, fault = captions_beside(*beside, fields=self._captions, language=self._language)
            yield Raw(name=name.with_suffix("").as_posix(), captions=captions, pictures=[file], fault=fault)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def captions_beside(
    described: bytes | None, text: bytes | None, *, fields: CaptionFields, language: str
) -> tuple[dict[str, list[str]], str | None]:
    """The captions that the json (first) or the text beside a picture hold, and why there is none."""
    fault: str | None = NO_CAPTION
    if described is not None:
        row: Any
        try:
            row = json.loads(described)
        except ValueError:
            row = None
        captions, fault = fields.of(row) if isinstance(row, dict) else ({}, UNFIT)
        if captions:
            return captions, None
    if text is not None:
        lines = text.decode("utf-8-sig", errors="replace").splitlines()
        return CaptionFields(((language, "lines"),)).of({"lines": lines})
    return {}, fault
