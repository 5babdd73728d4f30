"""Damages a data set in place, without changing the size of anything."""

from __future__ import annotations

from pathlib import Path

from mmar_megatron.data.shards import Index, Split


def damage_image(directory: Path, *, split: Split, number: int) -> None:
    """Overwrites the head of an image in the first shard of a split."""
    shard = next(shard for shard in Index.load(directory).shards if shard.split == split)
    with (directory / shard.name).open("r+b") as file:
        file.seek(shard.images[number][0])
        file.write(b"no PNG begins so")
