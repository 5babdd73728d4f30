"""What sources yield: records, of which nothing is decoded, and the blocks that they come in."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.index import Split

NO_PICTURE = "missing picture"
UNDECODABLE = "undecodable picture"
TOO_SMALL = "too small"
WRONG_ASPECT = "wrong aspect"
NO_CAPTION = "missing caption"
EMPTY_CAPTION = "empty caption"
EMPTY_TEXT = "empty text"
UNFIT = "unfit content"
DUPLICATE = "duplicate picture"
REASONS = ("", NO_PICTURE, UNDECODABLE, TOO_SMALL, WRONG_ASPECT, NO_CAPTION, EMPTY_CAPTION, EMPTY_TEXT, UNFIT, DUPLICATE)
"""Why a record is dropped; its place here is what the looks store, and 0 is for what is kept."""


class Piece(NamedTuple):
    """A picture file within a tar."""

    file: Path
    offset: int
    size: int


class Encoded(NamedTuple):
    """A picture file in base64."""

    text: str


class Made(NamedTuple):
    """A picture that is drawn when it is needed, of the right size: uint8 [H, W, 3]."""

    make: Callable[[], NDArray[np.uint8]]


Picture = Path | Piece | bytes | Encoded | Made


def read_picture(picture: Path | Piece | bytes | Encoded) -> bytes:
    """The picture's file. Raises OSError where it is not there, ValueError where it is no base64."""
    match picture:
        case bytes():
            return picture
        case Path():
            return picture.read_bytes()
        case Encoded():
            return base64.b64decode("".join(picture.text.rpartition("base64,")[2].split()), validate=True)
        case Piece():
            with picture.file.open("rb") as file:
                return os.pread(file.fileno(), picture.size, picture.offset)


@dataclass(kw_only=True)
class Raw:
    """One record of a source."""

    name: str
    """What the source calls it: unique in the source."""
    captions: dict[str, list[str]] | None = None
    """By language; of a picture."""
    content: list[dict[str, Any]] | None = None
    """Parts, where it is no picture with captions."""
    pictures: Sequence[Picture] = ()
    group: str | None = None
    """Records of one group come into the same split; none: each by itself."""
    split: Split | None = None
    """Where the source says it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else to store."""
    fault: str | None = None
    """One of REASONS, where the source sees it."""

    @property
    def texts(self) -> list[str]:
        """Captions, or the texts of its parts."""
        if self.content is not None:
            return [part["text"] for part in self.content if "text" in part]
        return [text for texts in (self.captions or {}).values() for text in texts]


class Block(NamedTuple):
    """A piece of a source."""

    records: int
    locator: Any
    """Where it is: anything that json takes."""


class Source(Protocol):
    """Where records come from. It travels to the worker processes."""

    settings: dict[str, Any]
    """What it is, for the index and for resuming."""
    chunk_records: int
    """So many are read at a time when shards are written."""

    def blocks(self) -> Iterator[Block]:
        """All of it, in an order that is the same each time."""

    def inputs(self) -> Iterator[Path]:
        """The files that it reads itself: what was done is of no use when one of them changes."""

    def read(self, block: Block, rows: Sequence[int] | None = None) -> Iterator[Raw]:
        """The records of a block, or those with these numbers within it, ascending."""


def key_of(name: str) -> str:
    """The key in the tars of a record: the name itself where it may be one, else what may stay of it and a hash of it."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if plain == name and len(name) <= 80:
        return name
    hashed = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return f"{plain[-63:].strip('_')}-{hashed}"


def is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates: file names in another encoding have them, and texts cut in the midst of an emoji."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def hash_of(text: str) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class CaptionFields:
    """Which fields of a row hold captions: (language, field), a language as often as it has fields."""

    pairs: tuple[tuple[str, str], ...]

    @staticmethod
    def parse(options: Sequence[str]) -> CaptionFields:
        """Of `en=caption`, `zh=caption_zh`, or `caption`, which is English."""
        pairs = [tuple(option.split("=", 1)) if "=" in option else ("en", option) for option in options]
        if bad := [option for option, pair in zip(options, pairs, strict=True) if not all(pair)]:
            raise ValueError(f"--captions takes LANGUAGE=COLUMN, as in en=caption, not {bad[0]!r}")
        return CaptionFields(tuple((language, column) for language, column in pairs))

    def of(self, row: Mapping[str, Any]) -> tuple[dict[str, list[str]], str | None]:
        """The captions by language, and why there is none.

        A field holds a text or a list of them. A row with `captions` in the form of our own tars needs no fields.
        """
        found: dict[str, list[str]] = {}
        seen = False
        own = row.get("captions")
        values = list(own.items()) if isinstance(own, Mapping) else [(lang, row.get(name)) for lang, name in self.pairs]
        for language, value in values:
            seen = seen or value is not None
            texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            kept = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
            if kept:
                found[language] = found.get(language, []) + list(dict.fromkeys(kept))
        return found, None if found else EMPTY_CAPTION if seen else NO_CAPTION
