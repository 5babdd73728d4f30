"""Whether a data set is what its index says."""

from __future__ import annotations

from pathlib import Path

from mmar_megatron.data.index import COLUMNS, Index, LocalFiles, column_path, sha256_of
from mmar_megatron.data.shards import check_size


def verify(directory: str | Path) -> Index:
    """Reads every shard and column of a data set and compares its checksum with the index.

    Raises:
        ValueError: one is missing, truncated or altered; the message names it.
    """
    index, files = Index.load(directory), LocalFiles(directory)
    for shard in index.shards:
        check_size(directory, shard, found=files.size(shard.name))
    checksums = {shard.name: shard.sha256 for shard in index.shards}
    checksums |= {column_path(name): index.columns[name]["sha256"] for name in COLUMNS}
    for name, sha256 in checksums.items():
        if sha256_of(files.local(name)) != sha256:
            kind = "shard" if name.endswith(".tar") else "column"
            raise ValueError(
                f"{kind} {directory}/{name} was altered, its SHA-256 is not the index's: copy or prepare the data set anew"
            )
    return index
