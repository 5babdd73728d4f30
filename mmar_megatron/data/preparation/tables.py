"""Tables of pictures and captions: CSV, TSV, JSON lines, JSON, Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmar_megatron.data.preparation.records import NO_PICTURE, UNFIT, Block, CaptionFields, Encoded, Picture, Raw
from mmar_megatron.data.preparation.rows import Rows, RowSource

_LONGEST_PATH = 4096
_BASE64 = ("data:", "iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How PNG, JPEG, GIF and WebP begin in base64, which of a small picture may be shorter than a path."""


class TableSource(RowSource):
    """Rows with a picture (a path, the bytes of its file, or these in base64) and captions.

    Args:
        files: the tables.
        captions: columns with captions.
        image: column with the picture.
        images: directory that paths are relative to; none: the table's.
        key: column that names a row; none: rows are numbered.
        group: column of what belongs into one split; none: the path of the picture.
        keep: columns to store beside the captions.

    Raises:
        ValueError: a file or column is missing.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        *,
        captions: CaptionFields,
        image: str,
        images: str | Path | None = None,
        key: str | None = None,
        group: str | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        if bad := {"captions", "content"} & set(keep):
            raise ValueError(
                f"--keep {min(bad)} would take the place of what the loader reads: rename the column, or leave it out"
            )
        self._captions, self._image, self._images = captions, image, images and Path(images)
        self._key, self._group, self._keep = key, group, keep
        named = [name for name in (key, group, *keep) if name]
        columns = [image, *(column for _, column in captions.pairs), *named]
        super().__init__(Rows(files, columns=list(dict.fromkeys(columns))))
        self._rows.check_columns([image], option="--image")
        self._rows.check_columns([column for _, column in captions.pairs], option="--captions")
        self._rows.check_columns(named, option="--key, --group or --keep")
        self.settings = {
            "source": "table",
            "files": [str(file) for file in self._rows.files],
            "captions": [list(pair) for pair in captions.pairs],
            "image": image,
            "images": images and str(images),
            "key": key,
            "group": group,
            "keep": list(keep),
        }

    def read(self, block: Block, rows: Sequence[int] | None = None) -> Iterator[Raw]:
        """See `Source`."""
        for file, name, row in self._rows.read(block, rows):
            if row is None:
                yield Raw(name=name, fault=UNFIT)
                continue
            captions, fault = self._captions.of(row)
            picture, path = picture_in(row.get(self._image), folder=self._images or file.parent)
            group = row.get(self._group) if self._group else path
            yield Raw(
                name=name if self._key is None else str(row.get(self._key)),
                captions=captions,
                pictures=[] if picture is None else [picture],
                group=None if group is None else str(group),
                extra={column: _as_json(row.get(column), column) for column in self._keep},
                fault=fault if picture is not None else NO_PICTURE,
            )


def _as_json(value: Any, column: str) -> Any:
    """What of Parquet's values json does not take (dates, decimals) as text."""

    def text(value: Any) -> str:
        if isinstance(value, bytes):
            raise ValueError(f"--keep {column} holds bytes, which json cannot: leave it out")
        return str(value)

    return json.loads(json.dumps(value, default=text))


def picture_in(value: Any, *, folder: Path) -> tuple[Picture | None, str | None]:
    """The picture of a field, and its path where it has one.

    Args:
        value: path, bytes, text in base64 (as a data URL, or longer than a path), or {"bytes": ..., "path": ...}.
        folder: that paths are relative to.
    """
    if isinstance(value, dict):
        path = value.get("path")
        if value.get("bytes"):
            return picture_in(value["bytes"], folder=folder)[0], path
        value = path
    if isinstance(value, bytes) and value:
        return value, None
    if not isinstance(value, str) or not value:
        return None, None
    if value.startswith(_BASE64) or len(value) > _LONGEST_PATH:
        return Encoded(value), None
    return folder / value, value
