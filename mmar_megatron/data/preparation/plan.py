"""Between the passes: which records are kept, of which split, in which shard. A function of the looks alone.

Axes: n records of all blocks, in their order; k of them kept, in the order of the shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.index import SPLITS, Split
from mmar_megatron.data.preparation.duplicates import THUMBNAIL, find_duplicates
from mmar_megatron.data.preparation.look import BY_HASH
from mmar_megatron.data.preparation.recipe import Recipe
from mmar_megatron.data.preparation.records import DUPLICATE, REASONS
from mmar_megatron.data.preparation.unfinished import Unfinished, atomically
from mmar_megatron.data.shard_writer import shard_name

_EXAMPLES = 3


class Chunk(NamedTuple):
    """Records of one block that come into one shard."""

    block: int
    rows: list[int]


class PlannedShard(NamedTuple):
    """One shard: the kept records from begin to end."""

    name: str
    split: Split
    begin: int
    end: int


@dataclass(kw_only=True)
class Plan:
    """What `make_plan` decided."""

    shards: list[PlannedShard]
    languages: list[str]
    dropped: dict[str, int]
    """By reason."""
    examples: dict[str, list[str]]
    """By reason, some of the dropped."""
    places: NDArray[np.uint32]
    """[2, k] block and row of each kept record."""

    def chunks(self, shard: PlannedShard, *, records: int) -> Iterator[Chunk]:
        """A shard's records in pieces that lie in one block each, of at most so many records."""
        blocks, rows = np.asarray(self.places[:, shard.begin : shard.end])
        ends = np.append(np.flatnonzero(np.diff(blocks)) + 1, len(blocks))
        begin = 0
        for end in ends.tolist():
            for first in range(begin, end, records):
                yield Chunk(int(blocks[first]), rows[first : min(first + records, end)].tolist())
            begin = end

    def kept_rows(self, split: Split) -> Iterator[Chunk]:
        """All kept records of a split, a block at a time."""
        for shard in self.shards:
            if shard.split == split:
                yield from self.chunks(shard, records=2**31)

    def save(self, path: Path) -> None:
        """As json, with the places beside it."""
        content = {**vars(self), "places": None}
        np.save(path.with_suffix(".npy"), self.places)
        atomically(path, json.dumps(content, ensure_ascii=False).encode())

    @staticmethod
    def load(path: Path) -> Plan:
        """The inverse of `save`."""
        content = json.loads(path.read_bytes())
        places = np.load(path.with_suffix(".npy"), mmap_mode="r")
        return Plan(**{**content, "shards": [PlannedShard(*shard) for shard in content["shards"]], "places": places})


def make_plan(unfinished: Unfinished, *, blocks: int, recipe: Recipe, source: Any) -> Plan:
    """Reads all looks and decides.

    Raises:
        ValueError: there are no records; two have one name; nothing is kept.
    """
    if not blocks:
        raise ValueError("there are no records in the input: name one that has some")
    looks = _read_looks(unfinished.looks, blocks)
    columns, block_of, row_of = looks.columns, looks.block, looks.row
    if recipe.deduplicate:
        pairs = np.flatnonzero((columns["reason"] == 0) & columns["pair"])

        def thumbnails(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
            return _gather_thumbnails(unfinished.looks, block_of[pairs[numbers]], row_of[pairs[numbers]])

        columns["reason"][pairs[find_duplicates(columns["keys"][pairs], thumbnails)]] = REASONS.index(DUPLICATE)
    kept = np.flatnonzero(columns["reason"] == 0)
    if not len(kept):
        raise ValueError(f"nothing is left to prepare of {len(block_of):,} records: {_counts(columns['reason'])}")
    held_out = _held_out(columns["group"][kept], columns["split"][kept], share=recipe.validation)
    _refuse_equal_keys(columns["key"][kept], kept, looks, unfinished, source)
    order = np.concatenate([kept[~held_out], kept[held_out]])
    shards = []
    begin = 0
    for split, count in zip(SPLITS, (int((~held_out).sum()), int(held_out.sum())), strict=True):
        for number, first in enumerate(range(0, count, recipe.samples_per_shard)):
            end = min(first + recipe.samples_per_shard, count)
            shards.append(PlannedShard(shard_name(split, number), split, begin + first, begin + end))
        begin += count
    return Plan(
        shards=shards,
        languages=looks.languages_of(kept),
        dropped=_counts(columns["reason"]),
        examples=looks.examples | _duplicate_examples(columns["reason"], looks, unfinished, source),
        places=np.stack([block_of[order], row_of[order]]).astype(np.uint32),
    )


@dataclass(kw_only=True)
class _Looks:
    columns: dict[str, NDArray[Any]]
    block: NDArray[np.uint32]
    row: NDArray[np.uint32]
    languages: list[list[str]]
    """Of each block, in the order of its bits."""
    examples: dict[str, list[str]]

    def languages_of(self, kept: NDArray[np.int64]) -> list[str]:
        """Those that kept records have, sorted."""
        bits = np.zeros(len(self.languages), dtype=np.uint64)
        np.bitwise_or.at(bits, self.block[kept], self.columns["languages"][kept])
        return sorted({name for k, names in enumerate(self.languages) for j, name in enumerate(names) if int(bits[k]) >> j & 1})


def _read_looks(folder: Path, blocks: int) -> _Looks:
    columns: dict[str, list[NDArray[Any]]] = {}
    languages: list[list[str]] = []
    examples: dict[str, list[str]] = {}
    counts = []
    for number in range(blocks):
        summary = json.loads((folder / f"{number:06d}.json").read_bytes())
        with np.load(folder / f"{number:06d}.npz") as arrays:
            for name in arrays.files:
                columns.setdefault(name, []).append(arrays[name])
        counts.append(summary["records"])
        languages.append(summary["languages"])
        for reason, names in summary["examples"].items():
            found = examples.setdefault(reason, [])
            found += names[: _EXAMPLES - len(found)]
    rows = [np.arange(count, dtype=np.uint32) for count in counts]
    return _Looks(
        columns={name: np.concatenate(parts) for name, parts in columns.items()},
        block=np.repeat(np.arange(blocks, dtype=np.uint32), counts),
        row=np.concatenate(rows) if rows else np.zeros(0, dtype=np.uint32),
        languages=languages,
        examples=examples,
    )


def _gather_thumbnails(folder: Path, blocks: NDArray[np.uint32], rows: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Of records in ascending order."""
    gathered = np.empty((len(blocks), *THUMBNAIL), dtype=np.uint8)
    for block in np.unique(blocks):
        here = slice(*np.searchsorted(blocks, [block, block + 1]))
        gathered[here] = np.load(folder / f"{block:06d}.thumbs.npy", mmap_mode="r")[rows[here]]
    return gathered


def _held_out(groups: NDArray[np.uint64], splits: NDArray[np.uint8], *, share: float) -> NDArray[np.bool_]:
    """Which kept records are for validation: where the source does not say, a share of the groups, by their hashes.

    A record's split does not depend on what else there is, except that of few records one group at least is held out, and none
    where nothing would be left to train on.
    """
    free = splits == BY_HASH
    held_out = splits == SPLITS.index("validation")
    if share and free.any():
        threshold = max(np.uint64(share * 2.0**64), groups[free].min())
        by_hash = free & (groups <= threshold)
        if not (held_out | by_hash).all():
            held_out |= by_hash
    return held_out


def _refuse_equal_keys(
    keys: NDArray[np.uint64], kept: NDArray[np.int64], looks: _Looks, unfinished: Unfinished, source: Any
) -> None:
    order = np.argsort(keys, kind="stable")
    equal = np.flatnonzero(np.diff(keys[order]) == 0)
    if len(equal):
        name = _name(kept[order[equal[0]]], looks, unfinished, source)
        raise ValueError(
            f"{len(equal):,} records have the name of another, such as {name!r}: rename them, or of a table give another --key"
        )


def _name(record: np.int64, looks: _Looks, unfinished: Unfinished, source: Any) -> str:
    block = unfinished.block(int(looks.block[record]))
    return next(iter(source.read(block, [int(looks.row[record])]))).name


def _duplicate_examples(reasons: NDArray[np.uint8], looks: _Looks, unfinished: Unfinished, source: Any) -> dict[str, list[str]]:
    some = np.flatnonzero(reasons == REASONS.index(DUPLICATE))[:_EXAMPLES]
    return {DUPLICATE: [_name(record, looks, unfinished, source) for record in some]} if len(some) else {}


def _counts(reasons: NDArray[np.uint8]) -> dict[str, int]:
    counts = np.bincount(reasons, minlength=1).tolist()
    return {REASONS[code]: count for code, count in enumerate(counts) if code and count}
