"""Whether a data set is what its index says, and its index made anew from its tars."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.codec import ImageCodec
from mmar_megatron.data.content import count_texts, fault_of
from mmar_megatron.data.index import (
    COLUMNS,
    INDEX_NAME,
    SPLITS,
    Index,
    Shard,
    Split,
    column_path,
    sha256_of,
    write_index,
)
from mmar_megatron.data.preparation.pool import ordered
from mmar_megatron.data.shard_writer import ShardColumns, shard_name
from mmar_megatron.data.shards import check_size, decode_npy, parse_header
from mmar_megatron.data.tokenizer import Tokenizer, load_tokenizer

_BLOCK = 512
_MOST_SHOWN = 10


def verify(directory: str | Path, *, tokenizer: str | None = None, workers: int = 0) -> tuple[Index, list[str]]:
    """Reads all of a data set: sizes and checksums of shards and columns, and whether the columns say what the shards hold.

    Args:
        directory: the data set.
        tokenizer: path of the one that it was made with; none: the directory's, if it is there.
        workers: processes that read; 0: this one does.

    Returns:
        The index, and what could not be checked.

    Raises:
        ValueError: something is missing, truncated or altered; the message names all of it, or the first of much.
    """
    directory = Path(directory)
    index = Index.load(directory)
    counter, unchecked = _has_tokenizer(directory, index, tokenizer)
    faults = []
    for name in COLUMNS:
        if sha256_of(directory / column_path(name)) != index.columns[name]["sha256"]:
            faults.append(f"column {directory}/{column_path(name)} was altered, its SHA-256 is not the index's")
    scanner = _Scanner(directory=directory, tokenizer=(tokenizer or directory) if counter else None, languages=index.languages)
    scans = ordered(scanner, index.shards, workers=min(workers, len(index.shards)))
    for number, found in enumerate(scans):
        faults += [found] if isinstance(found, str) else _differences(directory, index, number, found, tokens=counter)
    if faults:
        more = f"; and {len(faults) - _MOST_SHOWN:,} more" if len(faults) > _MOST_SHOWN else ""
        raise ValueError("; ".join(faults[:_MOST_SHOWN]) + more + ": copy or prepare the data set anew")
    return index, unchecked


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


@dataclass(frozen=True, kw_only=True)
class _Scanner:
    """Scans shards in worker processes."""

    directory: Path
    tokenizer: str | Path | None
    languages: list[str] | None

    def __call__(self, shard: Shard) -> Scan | str:
        """What the shard holds, or how it is not what the index says; a shard without a checksum is only scanned."""
        file = self.directory / shard.name
        try:
            if shard.sha256:
                check_size(self.directory, shard, found=_size(file))
            sha256 = sha256_of(file)
            if shard.sha256 not in ("", sha256):
                return f"shard {file} was altered, its SHA-256 is not the index's"
            return replace(scan_shard(file, tokenizer=self._tokenizer, languages=self.languages), sha256=sha256)
        except ValueError as error:
            return str(error).removesuffix(": copy or prepare the data set anew")

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return None if self.tokenizer is None else load_tokenizer(self.tokenizer)


def _has_tokenizer(directory: Path, index: Index, path: str | None) -> tuple[bool, list[str]]:
    try:
        found = load_tokenizer(path or directory)
    except ValueError:
        if path:
            raise
        return False, ["tokens were not counted again, which needs --tokenizer"]
    if found.fingerprint != index.tokenizer:
        raise ValueError(
            f"{path or directory} holds another tokenizer than the one that {INDEX_NAME} names: give that with --tokenizer"
        )
    return True, []


def _differences(directory: Path, index: Index, number: int, found: Scan, *, tokens: bool) -> list[str]:
    shard = index.shards[number]
    place = f"shard {directory}/{shard.name}"
    if found.faults:
        return [f"{place}: {fault}" for fault in found.faults]
    if len(found.columns["offset"]) != shard.samples:
        return [f"{place} holds {len(found.columns['offset']):,} samples, the index says {shard.samples:,}"]
    first, last = int(index.starts[number]), int(index.starts[number + 1])
    texts = slice(int(index.text_start[first]), int(index.text_start[last]))
    say: dict[str, NDArray[Any]] = {
        name: getattr(index, name)[first:last] for name in ("offset", "size", "kind", "images", "paints")
    }
    say["texts"] = np.diff(index.text_start[first : last + 1])
    say["text_language"] = index.text_language[texts]
    if tokens:
        say |= {"learned": index.learned[first:last], "text_tokens": index.text_tokens[texts]}
    return [
        f"column {column_path('text_start' if name == 'texts' else name)} is not what {place} holds"
        for name, values in say.items()
        if not np.array_equal(values, found.columns[name])
    ]


@dataclass(kw_only=True)
class Scan:
    """What a shard holds."""

    columns: ShardColumns
    """As `ShardFile.close` returns them."""
    languages: list[str]
    """That the language codes are places in."""
    faults: list[str] = field(default_factory=list)
    """What is wrong with which sample."""
    members: set[str] = field(default_factory=set)
    """Kinds of member."""
    features: int | None = None
    """Of a teacher, for each token."""
    sha256: str = ""
    """Of the file, where it was taken."""


def scan_shard(file: Path, *, tokenizer: Tokenizer | None, languages: list[str] | None = None) -> Scan:
    """Reads a whole shard.

    Args:
        file: the tar.
        tokenizer: counts the tokens; none: all counts are 0.
        languages: of the data set; none: all that the shard has, sorted.

    Raises:
        ValueError: it is no tar as `shard_writer` writes them.
    """
    rows = []
    found = Scan(columns={}, languages=languages or [])
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for key, begin, end, members in _samples(file, data):
            pictures = _pictures(data, members)
            try:
                place = members["json"]
                metadata = json.loads(data[place[0] : place[0] + place[1]])
            except (KeyError, ValueError):
                metadata = None
            if fault := fault_of(metadata, pictures=pictures):
                found.faults.append(f"sample {key}: {fault}")
                continue
            if "teacher.npy" in members:
                found.features = int(_shape(data, members["teacher.npy"])[-1])
            found.members |= members.keys()
            rows.append((begin, end - begin, pictures, metadata))
    if languages is None:
        found.languages = sorted({language for *_, metadata in rows for language in metadata.get("captions", ())})

    def count(text: str) -> int:
        return len(tokenizer.encode(text)) if tokenizer else 0

    columns: dict[str, list[int]] = {name: [] for name in (*COLUMNS, "texts") if name != "text_start"}
    for offset, size, pictures, metadata in rows:
        counts = count_texts(metadata, count=count, languages=found.languages)
        row = {"offset": offset, "size": size, "images": pictures, "kind": counts.kind, "learned": counts.learned}
        for name, value in {**row, "paints": int(counts.paints), "texts": len(counts.tokens)}.items():
            columns[name].append(value)
        columns["text_tokens"] += counts.tokens
        columns["text_language"] += counts.languages
    found.columns = {name: np.array(values, dtype=np.uint64) for name, values in columns.items()}
    return found


def _samples(file: Path, data: mmap.mmap) -> Iterator[tuple[str, int, int, dict[str, tuple[int, int]]]]:
    """Of each sample its key, where it begins and ends, and where its members' contents are, (offset, size) by kind."""
    key, begin, position = None, 0, 0
    members: dict[str, tuple[int, int]] = {}
    while any(header := data[position : position + _BLOCK]):
        try:
            name, size = parse_header(header)
        except ValueError as error:
            raise ValueError(f"shard {file}: at {position} {error}") from error
        folder, slash, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        if key != folder + slash + stem:
            if key is not None:
                yield key, begin, position, members
            key, begin, members = folder + slash + stem, position, {}
        if kind in members or position + _BLOCK + size > len(data):
            raise ValueError(f"shard {file}: {name} is there twice or ends beyond the shard")
        members[kind] = position + _BLOCK, size
        position += _BLOCK + -(-size // _BLOCK) * _BLOCK
    if position >= len(data):  # an empty block ends a tar
        raise ValueError(f"shard {file} was cut off at {len(data):,} bytes")
    if key is not None:
        yield key, begin, position, members


def _pictures(data: mmap.mmap, members: dict[str, tuple[int, int]]) -> int:
    """Number of a sample's pictures, of which pixels or arrays are there."""
    stored = [kind for kind in members if kind == "png" or (kind.endswith(".png") and kind[:-4].isdigit())]
    arrays = [_shape(data, place)[0] for kind, place in members.items() if kind.endswith(".npy")]
    return len(stored) or max(arrays, default=0)


def _shape(data: mmap.mmap, place: tuple[int, int]) -> tuple[int, ...]:
    return decode_npy(memoryview(data[place[0] : place[0] + place[1]])).shape


def rebuild_index(directory: str | Path, *, codec: ImageCodec | None, tokenizer: str | None, workers: int = 0) -> Index:
    """Makes index.json and the columns anew from the tars alone.

    Args:
        directory: with train-000000.tar and so on.
        codec: that the pictures are for; none: as index.json says, if it can be read.
        tokenizer: path of the one that counts; none: the directory's.
        workers: processes that read; 0: this one does.

    Raises:
        ValueError: there is no tar, one is damaged, or neither index.json nor the arguments say what the data set is for.
    """
    directory = Path(directory)
    header = _old_header(directory)
    if codec is not None:
        header |= {"image_size": codec.image_size, "codec": codec.fingerprint}
        header |= {"num_tokens": codec.num_tokens, "channels": codec.channels}
    if "codec" not in header:
        raise ValueError(
            f"{directory} has no index that says what its pictures are for: give --image_size, and --patch_size or --vae"
        )
    fingerprint = load_tokenizer(tokenizer or directory).fingerprint
    scans, shards = [], []
    bare = [Shard(name=name, split=split, samples=0, bytes=0, sha256="") for name, split in _shard_files(directory)]
    scanner = _Scanner(directory=directory, tokenizer=tokenizer or directory, languages=None)
    for shard, scan in zip(bare, ordered(scanner, bare, workers=min(workers, len(bare))), strict=True):
        if isinstance(scan, str) or scan.faults:
            fault = scan if isinstance(scan, str) else f"shard {directory}/{shard.name}: {scan.faults[0]}"
            raise ValueError(f"{fault}: copy or prepare the data set anew")
        file = directory / shard.name
        samples = len(scan.columns["offset"])
        shards.append(replace(shard, samples=samples, bytes=file.stat().st_size, sha256=scan.sha256))
        scans.append(scan)
    languages = sorted(set().union(*(scan.languages for scan in scans)))
    for scan in scans:
        _recode(scan, languages)
    members = set().union(*(scan.members for scan in scans))
    features = next((scan.features for scan in scans if scan.features), None)
    before = header.pop("teacher", None) or {"fingerprint": "unknown"}
    return write_index(
        directory,
        shards=shards,
        columns=[scan.columns for scan in scans],
        **{
            "made_by": {"source": "tars"},
            **header,
            "tokenizer": fingerprint,
            "pictures": any(kind.endswith("png") for kind in members),
            "moments": "moments.npy" in members,
            "flipped": "flipped.npy" in members,
            "teacher": {**before, "features": features} if features else None,
            "languages": languages,
        },
    )


def _old_header(directory: Path) -> dict[str, Any]:
    try:
        content = json.loads((directory / INDEX_NAME).read_bytes())
        return {name: content[name] for name in ("made_by", "image_size", "codec", "num_tokens", "channels", "teacher")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _shard_files(directory: Path) -> Iterator[tuple[str, Split]]:
    found = False
    for split in SPLITS:
        for file in sorted(directory.glob(f"{split}-*.tar")):
            found = True
            yield file.name, split
    if not found:
        raise ValueError(f"{directory} holds no shard: expected {shard_name('train', 0)} and so on")


def _recode(scan: Scan, languages: list[str]) -> None:
    """Turns the language codes, which are places in the scan's own list, into places in another."""
    codes = np.arange(256, dtype=np.uint64)
    codes[: len(scan.languages)] = [languages.index(language) for language in scan.languages]
    scan.columns["text_language"] = codes[scan.columns["text_language"].astype(np.int64)]
