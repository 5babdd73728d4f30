"""Lines of text files and of JSONL, with places to name where one is unfit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def text_lines(file: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of those that are not blank.

    Raises:
        ValueError: the file is missing, or a line is no UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): give a file that is there") from error
    for number, encoded in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        place = f"{file}, line {number}"
        try:
            line = encoded.decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} is not UTF-8: convert the file") from error
        if line:
            yield place, line


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line.

    Raises:
        ValueError: as `text_lines`, or a line is no JSON object.
    """
    for place, line in text_lines(file):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON ({error}): each line must be one object") from error
        if not isinstance(found, dict):
            raise ValueError(f"{place} is no JSON object: each line must be one, such as {{...}}")
        yield place, found
