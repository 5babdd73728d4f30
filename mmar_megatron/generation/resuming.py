"""Files of JSON lines that one command writes, and the same command goes on with after it was stopped."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self


class Journal:
    """A file to which lines are added, by one process at a time, as a context.

    Args:
        path: the file; made where it is missing, with its directory.

    Raises:
        ValueError: another process writes it, or it holds other things than JSON objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process, however it ends
        except OSError as error:
            self.close()
            raise ValueError(f"another process writes {path}: wait for it, or choose another --out") from error
        self._file.seek(0)
        self._lines = self._file.read().splitlines(keepends=True)
        self.empty = not self._lines
        if self._lines and not self._lines[-1].endswith(b"\n") and self._lines[-1].startswith(b"{"):
            self._lines.pop()  # of a process that was killed while it wrote
        try:
            self.rows = [self._row(number, line) for number, line in enumerate(self._lines, start=1)]
        except ValueError:
            self.close()
            raise

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, line {number} is no JSON object, so that nothing is added: choose another --out")
        return row

    def keep(self, count: int) -> None:
        """Cuts off what follows these first rows; until then the file is as it was found."""
        self.rows, self._lines = self.rows[:count], self._lines[:count]
        self._file.truncate(sum(map(len, self._lines)))

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a row."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Lets other processes write."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def difference(before: Mapping[str, Any], now: Mapping[str, Any], *, except_for: Collection[str]) -> str:
    """What is set differently, in words; empty where nothing is."""
    now = json.loads(json.dumps(now))
    names = [name for name in {**before, **now} if name not in except_for and before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
