"""The first pass: every record of a block is looked at once. Axes: n records of the block."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmar_megatron.data.content import fault_of
from mmar_megatron.data.index import SPLITS
from mmar_megatron.data.preparation.duplicates import SIDE, THUMBNAIL, describe
from mmar_megatron.data.preparation.pictures import PictureFault, open_picture, size_of
from mmar_megatron.data.preparation.recipe import Recipe
from mmar_megatron.data.preparation.records import (
    EMPTY_CAPTION,
    NO_CAPTION,
    NO_PICTURE,
    REASONS,
    TOO_SMALL,
    UNDECODABLE,
    UNFIT,
    WRONG_ASPECT,
    Made,
    Picture,
    Raw,
    Source,
    hash_of,
    is_unicode,
    key_of,
    read_picture,
)
from mmar_megatron.data.preparation.unfinished import atomically, read_block

BY_HASH = len(SPLITS)
"""In the column `split`: the plan decides."""
_EXAMPLES = 3
_MOST_LANGUAGES = 64
"""Of a block: bits of a column."""
_NOT_THERE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass
class _Columns:
    reason: list[int] = field(default_factory=list)
    key: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    languages: list[int] = field(default_factory=list)
    pair: list[bool] = field(default_factory=list)


class Looker:
    """Looks at blocks.

    Args:
        source: of the records.
        recipe: what is asked of them.
        blocks: the folder of the blocks.
        directory: for the results: `000000.npz`, `000000.thumbs.npy`, `000000.json`.
        texts: whether a tokenizer will be trained, for which the texts are kept in `000000.texts`.
    """

    def __init__(self, source: Source, *, recipe: Recipe, blocks: Path, directory: Path, texts: bool) -> None:
        self._blocks = blocks
        self._source = source
        self._recipe = recipe
        self._directory = directory
        self._texts = texts

    def __call__(self, number: int) -> int:
        """Looks at the block with this number, and returns how many records it has; its .json is there when all is done."""
        block = read_block(self._blocks, number)
        columns, languages = _Columns(), list[str]()
        keys = np.zeros((block.records, 2), dtype=np.uint64)
        thumbnails = np.zeros((block.records, *THUMBNAIL), dtype=np.uint8)
        examples: dict[str, list[str]] = {}
        texts = []
        for row, raw in enumerate(self._source.read(block)):
            reason = self._judge(raw, keys[row], thumbnails[row])
            if reason:
                examples.setdefault(reason, []).append(raw.name)
            languages += [language for language in raw.captions or () if language not in languages]
            if len(languages) > _MOST_LANGUAGES:
                raise ValueError(
                    f'captions have more than {_MOST_LANGUAGES} languages, such as {languages[-1]!r} of {raw.name}: "captions" '
                    "are by language, other fields are named with --captions"
                )
            columns.reason.append(REASONS.index(reason))
            columns.key.append(hash_of(key_of(raw.name)))
            columns.group.append(hash_of(raw.group or raw.name))
            columns.split.append(BY_HASH if raw.split is None else SPLITS.index(raw.split))
            columns.languages.append(sum(1 << languages.index(language) for language in raw.captions or ()))
            columns.pair.append(raw.content is None)
            texts.append(raw.texts if self._texts and not reason else [])
        assert len(columns.reason) == block.records, (number, len(columns.reason), block)
        self._save(number, columns, keys=keys, thumbnails=thumbnails)
        if self._texts:
            lines = "".join(json.dumps(of_record, ensure_ascii=False) + "\n" for of_record in texts)
            atomically(self._directory / f"{number:06d}.texts", lines.encode())
        shown = {reason: names[:_EXAMPLES] for reason, names in examples.items()}
        summary = {"records": block.records, "languages": languages, "examples": shown}
        atomically(self._directory / f"{number:06d}.json", json.dumps(summary).encode())
        return block.records

    def _save(self, number: int, columns: _Columns, **arrays: Any) -> None:
        with (self._directory / f"{number:06d}.npz").open("wb") as file:
            np.savez(
                file,
                reason=np.array(columns.reason, dtype=np.uint8),
                key=np.array(columns.key, dtype=np.uint64),
                group=np.array(columns.group, dtype=np.uint64),
                split=np.array(columns.split, dtype=np.uint8),
                languages=np.array(columns.languages, dtype=np.uint64),
                pair=np.array(columns.pair, dtype=np.bool_),
                keys=arrays["keys"],
            )
        if self._recipe.deduplicate:
            np.save(self._directory / f"{number:06d}.thumbs.npy", arrays["thumbnails"])

    def _judge(self, raw: Raw, keys: Any, thumbnail: Any) -> str:
        if raw.fault:
            return raw.fault
        if not is_unicode(json.dumps([raw.captions, raw.content, raw.extra], ensure_ascii=False)):
            return UNFIT
        if raw.content is None and not raw.captions:
            return NO_CAPTION
        if raw.content is None and not raw.texts:
            return EMPTY_CAPTION
        if raw.content is not None and fault_of({"content": raw.content}, pictures=len(raw.pictures)):
            return UNFIT
        if raw.content is None and len(raw.pictures) != 1:
            return NO_PICTURE
        try:
            for picture in raw.pictures:
                self._look_at(picture, keys, thumbnail)
        except PictureFault as fault:
            return str(fault)
        return ""

    def _look_at(self, picture: Picture, keys: Any, thumbnail: Any) -> None:
        if isinstance(picture, Made):
            return
        try:
            encoded = read_picture(picture)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            raise PictureFault(NO_PICTURE) from error
        except ValueError as error:
            raise PictureFault(UNDECODABLE) from error
        recipe = self._recipe
        try:
            small, large = sorted(size_of(encoded))
            if small < recipe.min_size:
                raise PictureFault(TOO_SMALL)
            if recipe.max_aspect is not None and large > recipe.max_aspect * small:
                raise PictureFault(WRONG_ASPECT)
            image = open_picture(encoded, about=4 * SIDE)
            if recipe.deduplicate:
                keys[:], thumbnail[:] = describe(image)
        except PictureFault:
            raise
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
            raise PictureFault(UNDECODABLE) from error
