"""The file of texts that were read: JSON lines {"images": [...], "text": ...}, gone on with where a stopped command was."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmar_megatron.data.preparation.unfinished import atomically
from mmar_megatron.generation.reading import Input
from mmar_megatron.generation.resuming import Journal, difference

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
        self._path, self._inputs = path, inputs
        self._beside = path.with_name(f"{path.name}.settings.json")
        self._journal = Journal(path)
        try:
            if not self._journal.empty:
                self._check(settings)
            self._done = self._match()
        except ValueError:
            self._journal.close()
            raise
        atomically(self._beside, json.dumps(settings, indent=1, ensure_ascii=False).encode())
        self._journal.keep(len(self._journal.rows))

    def _check(self, settings: dict[str, Any]) -> None:
        try:
            before = json.loads(self._beside.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._path} is there, and no {self._beside.name} that says how it was made: choose another --out"
            ) from error
        if differ := difference(before, settings, except_for=_MAY_DIFFER):
            raise ValueError(f"{self._path} was begun with other settings ({differ}): give those to go on, or another --out")

    def _match(self) -> set[int]:
        """The inputs that have their lines; the same input may be there several times."""
        there = Counter(_key({name: value for name, value in row.items() if name != "text"}) for row in self._journal.rows)
        done = set()
        for number, asked in enumerate(self._inputs):
            if there[_key(asked.asked)] > 0:
                there[_key(asked.asked)] -= 1
                done.add(number)
        if left := sum(there.values()):
            raise ValueError(
                f"{self._path} has {left} lines of inputs that are not given now: give the same, or choose another --out"
            )
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()

    @property
    def done(self) -> int:
        """Inputs that have their text."""
        return len(self._done)

    def has(self, number: int) -> bool:
        """Whether this input has its text."""
        return number in self._done

    def add(self, number: int, text: str) -> None:
        """The text of an input."""
        self._journal.add({**self._inputs[number].asked, "text": text})
        self._done.add(number)


def _key(asked: dict[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True)
