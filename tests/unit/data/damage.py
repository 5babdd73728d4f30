"""Damages a data set in place, without changing the size of anything."""

from __future__ import annotations

from pathlib import Path

from mmar_megatron.data.index import Index, Split


def damage_image(directory: Path, *, split: Split, number: int) -> None:
    """Overwrites the head of the picture of a sample in the first shard of a split."""
    index = Index.load(directory)
    sample_id = index.ids(split).start + number
    offset, size = int(index.offset[sample_id]), int(index.size[sample_id])
    with (directory / index.shards[index.shard_of(sample_id)].name).open("r+b") as file:
        file.seek(offset)
        picture = file.read(size).index(b"\x89PNG")
        file.seek(offset + picture)
        file.write(b"no PNG begins so")
