"""What the page does with the model: painting round by round, changing what was painted, reading.

Axes: N tokens of a picture in raster order, C channels of a token; H, W pixels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import mmar_megatron
from mmar_megatron.demo.canvas import Canvas, with_gaps
from mmar_megatron.demo.streaming import stream
from mmar_megatron.diffusion.painting import ImageSampling
from mmar_megatron.generation.editing import Edit, read_picture
from mmar_megatron.generation.files import as_png
from mmar_megatron.generation.opening import Opened
from mmar_megatron.generation.painting import Picture, draw, pictures_of, settle
from mmar_megatron.generation.prompts import Prompt, check_lengths
from mmar_megatron.generation.reading import Input, Reading, read
from mmar_megatron.training import manifest

_LEFT_TO_THE_MODEL = ("rounds", "steps")
"""Settings that may be empty."""
_REST = 4
"""Before an unfinished picture is decoded again, so many times as long passes as the last one took: that slows the painting down
by a quarter at most."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is to be seen after a round."""

    status: str
    canvas: Canvas
    png: bytes | None
    """The picture; none: it is too soon after the last one."""


class Studio:
    """A model with which one thing is done at a time: who comes second waits.

    Args:
        opened: the model.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        codec = opened.processor.codec
        self.grid: tuple[int, int] = codec["grid_height"], codec["grid_width"]
        self._in_use = threading.Lock()
        self._stops: set[threading.Event] = set()
        """Of paintings that are not ended."""

    def end(self) -> None:
        """All that is being painted is left after its round, so that the process can end."""
        for stop in [*self._stops]:
            stop.set()

    def blank(self) -> Canvas:
        """Nothing drawn yet."""
        config = self.opened.model.config
        return Canvas(
            latents_NC=torch.zeros(config.num_image_tokens, config.image["channels"]),
            drawn_N=np.zeros(config.num_image_tokens, dtype=np.bool_),
            record={"prompt": "", "version": mmar_megatron.__version__},
        )

    def open_picture(self, file: Path) -> Canvas:
        """A picture to change, brought to the model's size.

        Raises:
            ValueError: it cannot be read.
        """
        processor = self.opened.processor
        with _without_folders([file]):
            picture = read_picture(file, about=processor.codec["image_size"])
        latents_NC = processor.to_latents([picture])[0]
        facts = {"opened": file.name, "opened_sha256": manifest.record(file, flush=False)["sha256"]}
        return Canvas(
            latents_NC=latents_NC,
            drawn_N=np.ones(len(latents_NC), dtype=np.bool_),
            record={**self.blank().record, **facts},
        )

    def png(self, canvas: Canvas) -> bytes:
        """What a canvas shows; in its text, how it was made."""
        pixels_HW3 = self.opened.processor.to_pictures(canvas.latents_NC[None])[0]
        return as_png(with_gaps(pixels_HW3, drawn_N=canvas.drawn_N, grid=self.grid), record=canvas.record)

    def paint(
        self,
        prompt: str,
        *,
        seed: int,
        settings: dict[str, Any],
        start: Canvas | None = None,
        marked: Sequence[int] = (),
        stop: threading.Event,
    ) -> Iterator[Shown]:
        """Paints, and shows each round; the first is before any, so that what is wrong with the settings is told at once.

        Args:
            prompt: "": without a caption.
            seed: of order and noise.
            settings: of `settle`; rounds and steps may be none.
            start: the picture to change; none: a new one.
            marked: of a picture to change, the tokens to draw anew, beside those that are not drawn.
            stop: set from elsewhere, ends it after a round.

        Raises:
            ValueError: a setting makes no sense, the prompt is too long, or nothing is to be drawn.
            FloatingPointError: what was drawn is not finite.
        """
        _check_given({name: value for name, value in settings.items() if name not in _LEFT_TO_THE_MODEL} | {"seed": seed})
        (picture,) = pictures_of([Prompt(text=prompt, place="The prompt")], images=1, seed=seed)
        tokens = self.opened.model.config.num_image_tokens
        check_lengths([picture.prompt], processor=self.opened.processor, image_tokens=tokens, longest=self.opened.longest_text)
        settings = settle(self.opened, **settings)
        ImageSampling(seed=seed)  # which may be none
        canvas = self.blank() if start is None else start
        redraw_N = np.ones(tokens, dtype=np.bool_) if start is None else start.to_redraw(marked)
        edit = None
        if start is not None:
            facts = {"start": start.record, "redrawn": np.flatnonzero(redraw_N).tolist()}
            edit = Edit(latents_NC=start.latents_NC, redraw_N=redraw_N, facts=facts)
        made = picture.record(self.opened, settings, edit=edit)
        canvas = replace(canvas, drawn_N=~redraw_N, record=made | {"unfinished_after_round": 0})
        # Of a part smaller than the rounds, those behind draw nothing.
        painting = _Painting(picture=picture, settings=settings, edit=edit, rounds=min(settings["rounds"], int(redraw_N.sum())))
        yield Shown(status="reading the prompt", canvas=canvas, png=self.png(canvas))
        self._stops.add(stop)
        try:
            yield from self._rounds(painting, canvas, made=made, stop=stop)
        finally:
            self._stops.discard(stop)

    def _rounds(self, painting: _Painting, canvas: Canvas, *, made: dict[str, Any], stop: threading.Event) -> Iterator[Shown]:
        total, number, cost, last = painting.rounds, 0, 0.0, 0.0
        begin = time.monotonic()
        for number, latents_NC, drawn_N in stream(partial(self._draw, painting), stop=stop):
            record = made if number == total else made | {"unfinished_after_round": number}
            canvas = Canvas(latents_NC=latents_NC, drawn_N=drawn_N, record=record)
            now, png = time.monotonic(), None
            if number < total and now - last >= _REST * cost:
                png = self.png(canvas)
                last = time.monotonic()
                cost = last - now
            yield Shown(status=f"round {number} of {total}, {now - begin:.1f} s", canvas=canvas, png=png)
        seconds = time.monotonic() - begin
        status = f"painted in {seconds:.1f} s, {total} rounds"
        if number < total:
            status = f"stopped after round {number} of {total}, {seconds:.1f} s: Redraw goes on with the rest"
        yield Shown(status=status, canvas=canvas, png=self.png(canvas))

    def _draw(self, painting: _Painting, tell: Callable[[tuple[int, Tensor, NDArray[np.bool_]]], None]) -> None:
        def progress(number: int, _: int, latents_BNC: Tensor, masked_BN: Tensor) -> None:
            if number <= painting.rounds:
                tell((number, latents_BNC[0].cpu().clone(), ~masked_BN[0].cpu().numpy()))

        with self._in_use:
            draw(self.opened, [painting.picture], settings=painting.settings, edit=painting.edit, progress=progress)

    def read(self, files: Sequence[Path], *, question: str, settings: dict[str, Any]) -> str:
        """A caption of pictures, or the answer to a question about them.

        Args:
            files: the pictures.
            question: "": none.
            settings: of `Reading`.

        Raises:
            ValueError: there is no picture, one cannot be read, a setting makes no sense, or all is too long for the model.
        """
        if not files:
            raise ValueError("There is no picture to read: add one.")
        _check_given(settings)
        reading = Reading(**settings)
        reading.check()
        asked = Input(images=tuple(file.name for file in files), files=tuple(files), question=question.strip() or None)
        with self._in_use, _without_folders(files):
            ((_, text),) = read(self.opened, [asked], reading=reading, batch_size=1)
        return text


@dataclass(frozen=True, kw_only=True)
class _Painting:
    picture: Picture
    settings: dict[str, Any]
    edit: Edit | None
    rounds: int
    """In which there is something to draw."""


def _check_given(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if value is None:
            raise ValueError(f"{name.replace('_', ' ').capitalize()} is empty: give a value.")


@contextmanager
def _without_folders(files: Sequence[Path]) -> Iterator[None]:
    """Messages name pictures as they were called before they were sent here."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for file in files:
            message = message.replace(str(file), file.name)
        raise ValueError(message) from error
