"""Rows of CSV, JSON lines, JSON and Parquet files, in blocks that can be read by themselves."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmar_megatron.data.preparation.folders import BLOCK_RECORDS
from mmar_megatron.data.preparation.records import Block
from mmar_megatron.data.preparation.tars import existing_files, prefixes

LINES, TABLE, ARRAY, PARQUET = (".jsonl", ".ndjson"), (".csv", ".tsv"), (".json",), (".parquet",)
SUFFIXES = (*LINES, *TABLE, *ARRAY, *PARQUET)
Row = dict[str, Any] | None
"""None: what stands there is no object."""
_CHUNK = 2**20


class Rows:
    """The rows of several files.

    Args:
        files: of the kinds that their suffixes say.
        columns: which Parquet files are read for; none: all.

    Raises:
        ValueError: a file is missing, empty, or of an unknown kind.
    """

    def __init__(self, files: Sequence[str | Path], *, columns: Sequence[str] | None = None) -> None:
        self.files = existing_files(files)
        self._prefixes = prefixes(self.files)
        self._columns = columns
        for file in self.files:
            if file.suffix not in SUFFIXES:
                raise ValueError(f"{file} is of no known kind: its name must end in one of {', '.join(SUFFIXES)}")
        # Of a group of Parquet rows no piece can be read without all before it, so that small pieces would be dear.
        self.chunk_records = 256 if any(file.suffix in PARQUET for file in self.files) else 64

    def blocks(self) -> Iterator[Block]:
        """The number of the file, that of the first row, and where it is."""
        for number, file in enumerate(self.files):
            first = 0
            for records, place in _blocks(file):
                yield Block(records, [number, first, place])
                first += records

    def read(self, block: Block, rows: Sequence[int] | None = None) -> Iterator[tuple[Path, str, Row]]:
        """The file, a name of the row, and the row; of a block's, or of those with these numbers within it."""
        number, first, place = block.locator
        file = self.files[number]
        wanted = range(block.records) if rows is None else rows
        found: Iterator[Row]
        if file.suffix in LINES:
            found = _read_lines(file, place, wanted)
        elif file.suffix in TABLE:
            found = _pick(_read_table(file, place), wanted)
        elif file.suffix in ARRAY:
            found = _read_array(file, place, wanted)
        else:
            found = _read_parquet(file, place, wanted, self._columns)
        for row, content in zip(wanted, found, strict=True):
            yield file, f"{self._prefixes[number]}/{first + row:09d}", content

    def column_names(self, number: int) -> list[str]:
        """Of a file; of JSON, those that the rows of its first block have."""
        file = self.files[number]
        if file.suffix in PARQUET:
            return list(_open_parquet(file).schema_arrow.names)
        if file.suffix in TABLE:
            return _header(file)[0]
        records, place = next(_blocks(file), (0, None))
        if not records:
            return []
        rows = self.read(Block(records, [number, 0, place]))
        return list(dict.fromkeys(name for _, _, row in rows for name in row or ()))

    def check_columns(self, names: Sequence[str], *, option: str) -> None:
        """Raises ValueError where a file lacks one of the columns, or has no rows."""
        for number, file in enumerate(self.files):
            there = self.column_names(number)
            if not there:
                raise ValueError(f"{file} has no rows, or none with named fields: name one that has")
            if missing := [name for name in names if name not in there]:
                raise ValueError(f"{file} has no column {missing[0]!r}, but {', '.join(there)}: name one of them with {option}")


class RowSource:
    """What sources have in common whose records are rows: see `Source`, of which `settings` and `read` are for each of them."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.chunk_records = rows.chunk_records

    def blocks(self) -> Iterator[Block]:
        """Those of the rows."""
        return self._rows.blocks()

    def inputs(self) -> Iterator[Path]:
        """The files with the rows."""
        return iter(self._rows.files)


def _blocks(file: Path) -> Iterator[tuple[int, Any]]:
    if file.suffix in LINES:
        return _blocks_of_lines(file)
    if file.suffix in TABLE:
        return _blocks_of_table(file)
    return _blocks_of_array(file) if file.suffix in ARRAY else _blocks_of_parquet(file)


def _pick(rows: Iterator[Row], wanted: Sequence[int]) -> Iterator[Row]:
    position = 0
    for row in wanted:
        yield from islice(rows, row - position, row - position + 1)
        position = row + 1


def _blocks_of_lines(file: Path) -> Iterator[tuple[int, int]]:
    with file.open("rb") as lines:
        begin = offset = records = 0
        for line in lines:
            offset += len(line)
            records += bool(line.strip())
            if records == BLOCK_RECORDS:
                yield records, begin
                begin, records = offset, 0
        if records:
            yield records, begin


def _read_lines(file: Path, offset: int, wanted: Sequence[int]) -> Iterator[Row]:
    with file.open("rb") as lines:
        lines.seek(offset)
        rows = (line for line in lines if line.strip())
        position = 0
        for row in wanted:
            for line in islice(rows, row - position, row - position + 1):
                yield _object(line)
            position = row + 1


def _object(encoded: bytes | str) -> Row:
    try:
        row = json.loads(encoded)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


class _Lines:
    """Lines of a file from an offset on; `offset` is the end of the last that was handed out."""

    def __init__(self, file: Path, offset: int = 0) -> None:
        self._file = file
        self.offset = offset

    def __iter__(self) -> Iterator[str]:
        with self._file.open("rb") as stream:
            stream.seek(self.offset)
            for line in stream:
                codec = "utf-8" if self.offset else "utf-8-sig"
                self.offset += len(line)
                yield line.decode(codec, errors="replace")

    def rows(self) -> Iterator[list[str]]:
        """Of a table; the reader takes no line more than a row has, and a row may have several."""
        csv.field_size_limit(sys.maxsize)
        try:
            yield from csv.reader(self, delimiter="\t" if self._file.suffix == ".tsv" else ",")
        except csv.Error as error:  # a carriage return within a field without quotes, or in place of line feeds
            raise ValueError(f"{self._file} is no table before byte {self.offset:,} ({error}): quote the field there") from error


def _header(file: Path) -> tuple[list[str], int]:
    """Names of the columns, and where the rows begin."""
    lines = _Lines(file)
    return next(lines.rows(), []), lines.offset


def _blocks_of_table(file: Path) -> Iterator[tuple[int, int]]:
    _, begin = _header(file)
    lines = _Lines(file, begin)
    records = 0
    for row in lines.rows():
        records += bool(row)
        if records == BLOCK_RECORDS:
            yield records, begin
            begin, records = lines.offset, 0
    if records:
        yield records, begin


def _read_table(file: Path, offset: int) -> Iterator[Row]:
    names, _ = _header(file)
    for values in _Lines(file, offset).rows():
        if values:
            yield dict(zip(names, values, strict=False))


def _blocks_of_array(file: Path) -> Iterator[tuple[int, list[int]]]:
    objects = _objects_of_array(file)
    while places := list(islice(objects, BLOCK_RECORDS)):
        yield len(places), [places[0][0], places[-1][1]]


def _read_array(file: Path, place: Sequence[int], wanted: Sequence[int]) -> Iterator[Row]:
    with file.open("rb") as stream:
        stream.seek(place[0])
        rows = json.loads(b"[" + stream.read(place[1] - place[0]) + b"]")
    return (rows[row] if isinstance(rows[row], dict) else None for row in wanted)


def _objects_of_array(file: Path) -> Iterator[tuple[int, int]]:
    """Where each element of a JSON array begins and ends, in bytes, with no more than a piece of the file in memory."""
    decoder, codec = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, offset, begun = "", 0, False  # the text from byte `offset` on
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            try:
                text += codec.decode(chunk)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 ({error}): convert it") from error
            position = 0
            while (begin := _after(text, position, " \t\r\n,\ufeff")) < len(text):
                if not begun:
                    if text[begin] != "[":
                        raise ValueError(f"{file} is not a JSON array: where each line is an object, name it .jsonl")
                    begun, end = True, begin + 1
                elif text[begin] == "]":
                    return
                else:
                    try:
                        _, end = decoder.raw_decode(text, begin)
                    except ValueError:
                        break  # it may go on in what is not read yet
                    first = offset + len(text[position:begin].encode())
                    yield first, first + len(text[begin:end].encode())
                offset += len(text[position:end].encode())
                position = end
            text = text[position:]
    raise ValueError(f"{file} is not a whole JSON array: copy it again")


def _after(text: str, position: int, skipped: str) -> int:
    while position < len(text) and text[position] in skipped:
        position += 1
    return position


def _open_parquet(file: Path) -> Any:
    import pyarrow.parquet  # here, so that who reads no Parquet does not wait for it

    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a whole Parquet file ({error}): copy it again") from error


def _blocks_of_parquet(file: Path) -> Iterator[tuple[int, list[int]]]:
    metadata = _open_parquet(file).metadata
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        for begin in range(0, rows, BLOCK_RECORDS):
            yield min(BLOCK_RECORDS, rows - begin), [group, begin]


def _read_parquet(file: Path, place: Sequence[int], wanted: Sequence[int], columns: Sequence[str] | None) -> Iterator[Row]:
    group, first = place
    opened = _open_parquet(file)
    position = 0
    pending = [first + row for row in wanted][::-1]
    for batch in opened.iter_batches(batch_size=64, row_groups=[group], columns=columns, use_threads=False):
        while pending and pending[-1] < position + len(batch):
            (row,) = batch.slice(pending.pop() - position, 1).to_pylist()
            yield row
        position += len(batch)
        if not pending:
            return
