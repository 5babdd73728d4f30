"""Whole data sets, sample by sample, for the tests that need samples that no source makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmar_megatron.data.codec import ImageCodec
from mmar_megatron.data.index import Index, Shard, Split, write_index
from mmar_megatron.data.shard_writer import ShardColumns, ShardFile, shard_name


class ShardWriter:
    """Writes the tars of a data set one after the other, then its index.

    Args:
        directory: exists, and nobody reads it yet: its maker renames it when all is in.
        samples_per_shard: a new tar is begun after so many.
    """

    def __init__(self, directory: Path, *, samples_per_shard: int) -> None:
        self._directory = directory
        self._samples_per_shard = samples_per_shard
        self._open: tuple[Split, ShardFile] | None = None
        self.shards: list[Shard] = []
        self._columns: list[ShardColumns] = []

    def add(self, key: str, *, split: Split, **sample: Any) -> None:
        """Appends one sample (see `ShardFile.add`); all training samples come before all others."""
        if self._open is None or self._open[0] != split or len(self._open[1]) == self._samples_per_shard:
            self._end()
            number = sum(shard.split == split for shard in self.shards)
            self._open = split, ShardFile(self._directory / shard_name(split, number), split=split)
        self._open[1].add(key, **sample)

    def finish(self, *, codec: ImageCodec, tokenizer: str, **header: Any) -> Index:
        """Closes the last tar and writes the index.

        Args:
            codec: that the pictures are for.
            tokenizer: fingerprint of the one that counted.
            header: fields of `Index` that are other than those of a set of pictures without captions.
        """
        self._end()
        of_codec = {"image_size": codec.image_size, "codec": codec.fingerprint, "channels": codec.channels}
        usual = {"made_by": {"source": "test"}, "tokenizer": tokenizer, "num_tokens": codec.num_tokens, "languages": []}
        stored = {"pictures": True, "moments": False, "flipped": False, "teacher": None}
        return write_index(self._directory, shards=self.shards, columns=self._columns, **(usual | of_codec | stored | header))

    def _end(self) -> None:
        if self._open is not None:
            shard, columns = self._open[1].close()
            self.shards.append(shard)
            self._columns.append(columns)
            self._open = None
