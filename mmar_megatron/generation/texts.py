"""The file of texts that were read: JSON lines {"images": [...], "text": ...}, gone on with where a stopped command was."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mmar_megatron.data.preparation.unfinished import atomically
from mmar_megatron.generation.reading import Input

_MAY_DIFFER = ("model",)
"""A place, which a digest stands beside."""


class TextFile:
    """Takes texts one after another, as a context. What they were read with stands in a file NAME.settings.json beside it.

    Args:
        path: of the lines.
        inputs: all that there will be texts for.
        settings: of the reading and the model.

    Raises:
        ValueError: what is there was read with other settings or of other inputs, or another process is at it.
    """

    def __init__(self, path: Path, *, inputs: Sequence[Input], settings: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._inputs = path, inputs
        self._done: set[int] = set()
        self._file: IO[bytes] = path.open("a+b")
        try:
            self._begin(settings)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, settings: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process, however it ends
        except OSError as error:
            raise ValueError(f"another process writes {self.path}: wait for it, or choose another --out") from error
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # of a process that was killed while it wrote
            self._file.truncate(sum(map(len, lines[:-1])))
            lines = lines[:-1]
        beside = self.path.with_name(f"{self.path.name}.settings.json")
        if lines:
            self._check(settings, beside)
            self._match(lines)
        atomically(beside, json.dumps(settings, indent=1, ensure_ascii=False).encode())

    def _check(self, settings: dict[str, Any], beside: Path) -> None:
        try:
            before = json.loads(beside.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} is not of this command, as {beside.name} is missing: choose another --out") from error
        wanted = json.loads(json.dumps(settings))
        names = [name for name in {**before, **wanted} if name not in _MAY_DIFFER and before.get(name) != wanted.get(name)]
        if names:
            differ = ", ".join(f"{name} was {before.get(name)!r} and is {wanted.get(name)!r}" for name in names)
            raise ValueError(f"{self.path} was begun with other settings ({differ}): give those to go on, or another --out")

    def _match(self, lines: Sequence[bytes]) -> None:
        """Finds the inputs that have their lines; the same input may be there several times."""
        there = Counter(_key({name: value for name, value in json.loads(line).items() if name != "text"}) for line in lines)
        for number, asked in enumerate(self._inputs):
            if there[_key(asked.asked)] > 0:
                there[_key(asked.asked)] -= 1
                self._done.add(number)
        if left := sum(there.values()):
            raise ValueError(
                f"{self.path} has {left} lines of inputs that are not given now: give the same, or choose another --out"
            )

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @property
    def done(self) -> int:
        """Inputs that have their text."""
        return len(self._done)

    def has(self, number: int) -> bool:
        """Whether this input has its text."""
        return number in self._done

    def add(self, number: int, text: str) -> None:
        """The text of an input."""
        line = json.dumps({**self._inputs[number].asked, "text": text}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._done.add(number)


def _key(asked: dict[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True)
