"""Opening a data set to look at it: what a run's configuration would say is taken from the index."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.codec import ImageCodec, PatchCodec
from mmar_megatron.data.index import read_header
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.storage import open_storage

if TYPE_CHECKING:
    from mmar_megatron.config import DataConfig

_USUAL_LENGTH = 128
_TEXT_ROOM = 64
"""Positions for text and special tokens, beside an image, that a sequence shall have at least."""


class StoredCodec:
    """Stands in for a codec of which the data set knows the sizes alone: nothing can be encoded or decoded.

    Where it is asked for an image's tokens, they are 0: what is drawn for the page does not depend on them.

    Args:
        header: index.json of the data set.
    """

    def __init__(self, header: Mapping[str, Any]) -> None:
        self.num_tokens: int = header["num_tokens"]
        self.channels: int = header["channels"]
        self.image_size: int = header["image_size"]
        self.grid_height = self.grid_width = math.isqrt(self.num_tokens)
        self.fingerprint: str = header["codec"]

    def encode(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels [..., H, W, 3] -> zeros [..., N, C]."""
        return np.zeros((*image_HW3.shape[:-3], self.num_tokens, self.channels), dtype=np.float32)

    def decode(self, tokens_NC: NDArray[np.float32]) -> NoReturn:
        """Not possible."""
        raise NotImplementedError("the auto-encoder is not at hand")


def open_directory(
    path: str, *, tokenizer: str | None = None, sequence_length: int | None = None, packing: bool = True, window: int = 4096
) -> DataSource:
    """The source of one data set by itself, with all of its languages.

    Args:
        path: directory or URL.
        tokenizer: where the data set holds none.
        sequence_length: none: 128, or where an image has no room in that, the next power of two in which it has.
        packing, window: as in `data`.

    Raises:
        ValueError: see `DataSource`.
    """
    from mmar_megatron.config import DataConfig

    storage = open_storage(path)
    header = read_header(path, storage)
    if tokenizer is None and all(storage.size(f"tokenizer.{kind}") is None for kind in ("model", "json")):
        raise ValueError(f"{path} holds no tokenizer: give the one that it was made with as --tokenizer")
    storage.close()
    config: DataConfig = DataConfig(
        path=path,
        tokenizer=tokenizer,
        languages=header["languages"],
        sequence_length=sequence_length or usual_length(header["num_tokens"]),
        packing=packing,
        packing_window=window,
    )
    return DataSource(config, codec=codec_of(header))


def usual_length(num_tokens: int) -> int:
    """A length of sequences for images of so many tokens."""
    length = _USUAL_LENGTH
    while length < num_tokens + _TEXT_ROOM:
        length *= 2
    return length


def codec_of(header: Mapping[str, Any]) -> ImageCodec:
    """The codec, where the index says all of it; else a stand-in."""
    found = re.fullmatch(r"patch, image_size (\d+), patch_size (\d+)", header["codec"])
    if found:
        return PatchCodec(image_size=int(found[1]), patch_size=int(found[2]))
    return StoredCodec(header)


def with_options(config: DataConfig, *, sequence_length: int | None, packing: bool | None) -> DataConfig:
    """The configuration with other rows, where they are asked for."""
    changes: dict[str, Any] = {"sequence_length": sequence_length, "packing": packing}
    return replace(config, **{name: value for name, value in changes.items() if value is not None})
