"""Content in parts: conversations about pictures, plain texts, and texts with pictures in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmar_megatron.data.content import conversation_parts
from mmar_megatron.data.preparation.records import EMPTY_TEXT, UNFIT, Block, Picture, Raw
from mmar_megatron.data.preparation.rows import Rows, RowSource
from mmar_megatron.data.preparation.tables import picture_in

Kind = Literal["conversations", "text"]


class DocumentSource(RowSource):
    """Rows of JSON or Parquet files.

    conversations: {"image": path, list of them, or absent, "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}
    text: {"text": ...} or {"content": [{"text": ...} | {"image": path}, ...]}

    Args:
        files: with the rows.
        kind: which of these they are.
        images: directory that paths are relative to; none: the file's.
        key: field that names a row; none: rows are numbered.
        group: field of what belongs into one split; none: the path of the first picture.

    Raises:
        ValueError: a file or field is missing.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        *,
        kind: Kind,
        images: str | Path | None = None,
        key: str | None = None,
        group: str | None = None,
    ) -> None:
        self._kind, self._images, self._key, self._group = kind, images and Path(images), key, group
        super().__init__(Rows(files))
        self._rows.check_columns([name for name in (key, group) if name], option="--key or --group")
        expected = {"conversations": ("conversations", "messages"), "text": ("text", "content")}[kind]
        for number, file in enumerate(self._rows.files):
            if not set(expected) & set(self._rows.column_names(number)):
                raise ValueError(f"{file} has neither {expected[0]!r} nor {expected[1]!r} in its rows: name a file that has")
        self.settings = {
            "source": kind,
            "files": [str(file) for file in self._rows.files],
            "images": images and str(images),
            "key": key,
            "group": group,
        }

    def read(self, block: Block, rows: Sequence[int] | None = None) -> Iterator[Raw]:
        """See `Source`."""
        for file, name, row in self._rows.read(block, rows):
            if row is None:
                yield Raw(name=name, content=[], fault=UNFIT)
                continue
            name = name if self._key is None else str(row.get(self._key))
            group = row.get(self._group) if self._group else None
            folder = self._images or file.parent
            content, found, fault = self._parts(row, folder)
            pictures = [picture for picture, _ in found]
            path = next((path for _, path in found if path), None)
            if any(picture is None for picture in pictures):
                fault, pictures = fault or UNFIT, []
            yield Raw(
                name=name,
                content=content,
                pictures=[picture for picture in pictures if picture is not None],
                group=path if group is None else str(group),
                fault=fault,
            )

    def _parts(
        self, row: Mapping[str, Any], folder: Path
    ) -> tuple[list[dict[str, Any]], list[tuple[Picture | None, str | None]], str | None]:
        """The content, its pictures, and why it is of no use."""
        if self._kind == "conversations":
            images = row.get("image", row.get("images"))
            values = images if isinstance(images, list) else [] if images is None else [images]
            parts = conversation_parts(row.get("conversations") or row.get("messages"), pictures=len(values))
            return parts or [], [picture_in(value, folder=folder) for value in values], None if parts else UNFIT
        given = row.get("content")
        if given is None:
            text = row.get("text")
            fault = None if isinstance(text, str) and text.strip() else EMPTY_TEXT
            return [{"text": text, "learn": True, "end": True}], [], fault
        if not isinstance(given, list) or not given or not all(isinstance(part, dict) for part in given):
            return [], [], UNFIT
        values = [part["image"] for part in given if part.get("image") is not None]
        return interleaved_parts(given), [picture_in(value, folder=folder) for value in values], None


def interleaved_parts(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parts as a user writes them -> as they are stored: images by number.

    Where no part says what is to be learned, all text is, with an <eos> at the end, and an image at the end is to be painted.
    """
    parts: list[dict[str, Any]] = []
    images = 0
    silent = not any("learn" in part or "end" in part for part in given)
    for part in given:
        flags = {name: bool(part[name]) for name in ("learn", "end") if name in part}
        if part.get("image") is not None:
            parts.append({"image": images} | flags)
            images += 1
        elif part.get("text"):
            parts.append({"text": part["text"]} | flags | ({"learn": True} if silent else {}))
    if silent and parts:
        parts[-1] |= {"end": True} if "text" in parts[-1] else {"learn": True}
    return parts
