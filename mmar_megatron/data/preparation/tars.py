"""WebDataset tars of others: members with the same name up to the first dot are one record."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmar_megatron.data.preparation.folders import BLOCK_RECORDS, PICTURE_SUFFIXES, captions_beside
from mmar_megatron.data.preparation.records import NO_PICTURE, Block, CaptionFields, Piece, Raw

_TEXTS = ("txt", "caption", "text")


class TarSource:
    """Tars with pictures (jpg, png, webp ...) and captions (txt, caption or json).

    Args:
        files: uncompressed tars.
        captions: fields of the json members.
        language: of the txt members.

    Raises:
        ValueError: a file is missing.
    """

    chunk_records = 64

    def __init__(self, files: Sequence[str | Path], *, captions: CaptionFields, language: str) -> None:
        self._files = existing_files(files)
        self._prefixes = prefixes(self._files)
        self._captions, self._language = captions, language
        self.settings = {
            "source": "webdataset",
            "files": [str(file) for file in self._files],
            "captions": [list(pair) for pair in captions.pairs],
            "language": language,
        }

    def blocks(self) -> Iterator[Block]:
        """The number of the tar, and of each record its name and its members' places."""
        for number, file in enumerate(self._files):
            records: list[tuple[str, dict[str, tuple[int, int]]]] = []
            for name, kind, offset, size in _members(file):
                if not records or records[-1][0] != name:
                    if len(records) == BLOCK_RECORDS:
                        yield Block(len(records), [number, records])
                        records = []
                    records.append((name, {}))
                records[-1][1].setdefault(kind, (offset, size))
            if records:
                yield Block(len(records), [number, records])

    def inputs(self) -> Iterator[Path]:
        """The tars."""
        return iter(self._files)

    def read(self, block: Block, rows: Sequence[int] | None = None) -> Iterator[Raw]:
        """See `Source`."""
        number, records = block.locator
        file = self._files[number]
        with file.open("rb") as stream:
            for row in range(block.records) if rows is None else rows:
                name, members = records[row]

                def content(*kinds: str, members: dict[str, tuple[int, int]] = members) -> bytes | None:
                    place = next((members[kind] for kind in kinds if kind in members), None)
                    return None if place is None else os.pread(stream.fileno(), place[1], place[0])

                picture = next((place for kind, place in members.items() if f".{kind}" in PICTURE_SUFFIXES), None)
                captions, fault = captions_beside(
                    content("json"), content(*_TEXTS), fields=self._captions, language=self._language
                )
                yield Raw(
                    name=f"{self._prefixes[number]}/{name}",
                    captions=captions,
                    pictures=[Piece(file, *picture)] if picture else [],
                    fault=fault if picture else NO_PICTURE,
                )


def _members(file: Path) -> Iterator[tuple[str, str, int, int]]:
    """Of each plain file in a tar: its name up to the first dot, its suffix, and where its content is."""
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # which would hold them all
                folder, slash, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if member.isfile() and stem and kind:
                    yield folder + slash + stem, kind.rpartition(".")[2].lower(), member.offset_data, member.size
    except tarfile.TarError as error:
        raise ValueError(f"{file} is not an uncompressed tar ({error}): unpack or fetch it anew") from error


def existing_files(files: Sequence[str | Path]) -> list[Path]:
    """The files. Raises ValueError where there is none, or one is missing."""
    if not files:
        raise ValueError("no input file is named: name one at least")
    if missing := [file for file in files if not Path(file).is_file()]:
        raise ValueError(f"there is no file {missing[0]}: name files that exist")
    return [Path(file) for file in files]


def prefixes(files: Sequence[Path]) -> list[str]:
    """What the names of the records of each file begin with: its name, and where that is not unique its path."""
    stems = [file.name.partition(".")[0] for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file.with_suffix("")) for file in files]
