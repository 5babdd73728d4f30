"""What to paint: prompts of the command line or of a file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmar_megatron.generation.lines import json_lines, text_lines
from mmar_megatron.hf.processing_mmar import MMARProcessor

SUFFIXES = (".txt", ".jsonl", ".csv")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One text, of which some pictures are painted."""

    text: str
    place: str
    """Where it stands, for messages."""
    id: str | None = None
    seed: int | None = None
    """None: the command's."""


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts of a .txt, one a line; of a .jsonl or .csv, with the fields prompt and, where wanted, id and seed.

    Raises:
        ValueError: there are none, or one cannot be read, named by file and line.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file} is of no known kind: its name must end in one of {', '.join(SUFFIXES)}")
    if file.suffix == ".txt":
        prompts = [Prompt(text=line, place=place) for place, line in text_lines(file)]
    elif file.suffix == ".jsonl":
        prompts = [_prompt(row, place) for place, row in json_lines(file)]
    else:
        prompts = _table(file)
    if not prompts:
        raise ValueError(f"{file} has no prompts: write one a line")
    return prompts


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    if not isinstance(row.get("prompt"), str):
        raise ValueError(f'{place} has no text "prompt": write {{"prompt": "a red kite"}}')
    seed = row.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ValueError(f"{place} has the seed {seed!r}: it must be a whole number, 0 or more")
    name = row.get("id")
    return Prompt(text=row["prompt"], place=place, id=None if name is None else str(name), seed=seed)


def _table(file: Path) -> list[Prompt]:
    reader = csv.DictReader(f"{line}\n" for _, line in text_lines(file))
    if reader.fieldnames is not None and "prompt" not in reader.fieldnames:
        raise ValueError(f"{file} has no column prompt: its first line must name the columns")
    prompts = []
    for number, row in enumerate(reader, start=1):
        place, seed = f"{file}, row {number}", row.get("seed") or None
        if seed is not None and not seed.isdecimal():
            raise ValueError(f"{place} has the seed {seed!r}: it must be a whole number, 0 or more")
        prompts.append(_prompt({**row, "id": row.get("id") or None, "seed": None if seed is None else int(seed)}, place))
    return prompts


def check_lengths(prompts: Sequence[Prompt], *, processor: MMARProcessor, image_tokens: int, longest: int | None) -> None:
    """Whether each prompt, its picture and four special tokens are no longer than the sequences of training.

    Raises:
        ValueError: one is longer.
    """
    if longest is None:
        return
    room = longest - image_tokens - 4
    for prompt in prompts:
        tokens = processor.to_paint(prompt.text)["input_ids"].shape[1] - 2
        if tokens > room:
            raise ValueError(f"{prompt.place} has {tokens} tokens, and the model has room for {room} beside an image: shorten it")
