"""Texts for pictures: captions, or answers to a question, in batches.

Axes: B inputs, S positions, T written tokens; M pictures, N tokens of a picture, C channels of a token.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmar_megatron.data.preparation.folders import PICTURE_SUFFIXES
from mmar_megatron.generation.editing import read_picture
from mmar_megatron.generation.lines import json_lines
from mmar_megatron.generation.opening import Opened

PLACE = "<image>"
"""Stands for a picture in a text."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """Pictures, and what is asked of them."""

    images: tuple[str, ...]
    """As they are named in the output."""
    files: tuple[Path, ...]
    question: str | None = None
    """A conversation's, to be answered."""
    text: str | None = None
    """To be gone on with. With neither it is the pictures alone."""

    @property
    def asked(self) -> dict[str, Any]:
        """What tells it from other inputs: the first fields of its line in the output."""
        texts = {"question": self.question, "text_before": self.text}
        return {"images": list(self.images), **{name: text for name, text in texts.items() if text is not None}}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How texts are drawn."""

    max_tokens: int = 64
    temperature: float = 0.0
    """0: the most likely word after word."""
    top_p: float = 1.0
    """Share of probability that words are drawn from, the most likely first."""
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError where a setting makes no sense."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: give 1 or more")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: give 0 (the most likely words) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be a share above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("top_p changes nothing at temperature 0: give a temperature, or leave it out")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")


def find_pictures(names: Sequence[str], *, question: str | None) -> list[Input]:
    """Files, those in and below directories, and those that a pattern matches, in order of their names.

    Raises:
        ValueError: a directory or a pattern has none.
    """
    found: list[str] = []
    for name in names:
        if Path(name).is_dir():
            files = sorted(str(file) for file in Path(name).rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
        elif glob.has_magic(name) and not Path(name).exists():
            files = sorted(glob.glob(name, recursive=True))
        else:
            files = [name]
        if not files:
            raise ValueError(
                f"{name} has no pictures: give files, directories of {', '.join(sorted(PICTURE_SUFFIXES))}, or a pattern"
            )
        found += files
    return [Input(images=(name,), files=(Path(name),), question=question) for name in found]


def read_inputs(file: Path, *, question: str | None) -> list[Input]:
    """Inputs of JSON lines {"images": [...]} with "question" or "text", where wanted; paths are relative to the file.

    Args:
        file: to be read.
        question: of those that have none, nor a text.

    Raises:
        ValueError: there are none, or a line is unfit, named by file and line.
    """
    inputs = [_input(row, where, folder=file.parent, question=question) for where, row in json_lines(file)]
    if not inputs:
        raise ValueError(f'{file} has no inputs: write lines such as {{"images": ["kite.png"]}}')
    return inputs


def _input(row: dict[str, Any], where: str, *, folder: Path, question: str | None) -> Input:
    images = row.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(name, str) for name in images):
        raise ValueError(f'{where} has no list of "images": write {{"images": ["kite.png"]}}')
    asked, text = row.get("question"), row.get("text")
    if asked is not None and text is not None:
        raise ValueError(f"{where} has a question and a text: leave one out")
    if not all(value is None or isinstance(value, str) for value in (asked, text)):
        raise ValueError(f"{where} has a question or text that is no text: write it in quotes")
    if asked is None and text is None:
        asked = question
    places = (asked or text or "").count(PLACE)
    if places != len(images) and (places or text is not None):
        raise ValueError(f"{where} has {len(images)} images, but {places} times {PLACE}: write it once for each")
    return Input(images=tuple(images), files=tuple(folder / name for name in images), question=asked, text=text)


def read(
    opened: Opened,
    inputs: Sequence[Input],
    *,
    reading: Reading,
    batch_size: int,
    is_done: Callable[[int], bool] = lambda _: False,
    on_bad: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, str]]:
    """Number of each input, and its text.

    What is most likely does not depend on the batch. What is drawn follows from the seed and the first input of its batch, so
    that it is the same again for the same inputs in batches of the same size, wherever the work was taken up.

    Args:
        opened: the model.
        inputs: to read.
        reading: settings.
        batch_size: inputs read at a time.
        is_done: whether the input of this number has its text already.
        on_bad: is told of inputs that cannot be read, which are left out; none: they end the work.

    Raises:
        ValueError: an input cannot be read.
    """
    for first in range(0, len(inputs), batch_size):
        numbers = range(first, min(first + batch_size, len(inputs)))
        if all(is_done(number) for number in numbers):
            continue
        rows: dict[int, _Row] = {}
        for number in numbers:
            try:
                rows[number] = _row(opened, inputs[number], max_tokens=reading.max_tokens)
            except ValueError as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
        if rows:
            texts = _read(opened, list(rows.values()), reading=reading, first=first)
            yield from ((number, text) for number, text in zip(rows, texts, strict=True) if not is_done(number))


@dataclass(frozen=True, kw_only=True)
class _Row:
    ids_S: Tensor
    latents_MNC: Tensor
    room: int
    """Tokens that its text may have."""


def _row(opened: Opened, asked: Input, *, max_tokens: int) -> _Row:
    processor = opened.processor
    pictures = [read_picture(file, about=processor.codec["image_size"]) for file in asked.files]
    if asked.question is None:
        encoded = processor([PLACE * len(pictures) if asked.text is None else asked.text], images=pictures)
    else:
        question = asked.question if PLACE in asked.question else PLACE * len(pictures) + asked.question
        encoded = processor.converse([[{"role": "user", "content": question}]], images=pictures)
    ids_S = encoded["input_ids"][0]
    room = max_tokens if opened.longest_text is None else min(max_tokens, opened.longest_text - len(ids_S))
    if room < 1:
        raise ValueError(
            f"{', '.join(asked.images)} and what is asked of them have {len(ids_S)} tokens, of {opened.longest_text} that the "
            "model reads: give fewer pictures or a shorter text"
        )
    return _Row(ids_S=ids_S, latents_MNC=encoded["image_latents"], room=room)


def _read(opened: Opened, rows: Sequence[_Row], *, reading: Reading, first: int) -> list[str]:
    device, special = opened.model.device, opened.processor.special_tokens
    longest = max(len(row.ids_S) for row in rows)
    ids_BS = torch.stack([F.pad(row.ids_S, (longest - len(row.ids_S), 0), value=special["pad"]) for row in rows])
    valid_BS = torch.stack([F.pad(torch.ones_like(row.ids_S), (longest - len(row.ids_S), 0)) for row in rows])
    drawn: dict[str, Any] = {}
    if reading.temperature > 0:
        drawn = {"temperature": reading.temperature, "top_p": reading.top_p, "top_k": 0}
        torch.manual_seed(int(np.random.SeedSequence([reading.seed, first]).generate_state(1, np.uint64)[0]))
    written_BT = opened.model.generate(
        input_ids=ids_BS.to(device),
        attention_mask=valid_BS.to(device),
        image_latents=torch.cat([row.latents_MNC for row in rows]).to(device),
        max_new_tokens=max(row.room for row in rows),
        do_sample=reading.temperature > 0,
        **drawn,
    )[:, longest:]
    # Each for as long as alone: another's longer text must not lengthen it.
    return [
        opened.processor.tokenizer.decode(ids[: row.room], skip_special_tokens=True)
        for ids, row in zip(written_BT, rows, strict=True)
    ]
