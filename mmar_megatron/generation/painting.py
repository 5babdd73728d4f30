"""Many pictures of many prompts, in batches.

A picture follows from its prompt, seed and number; its batch changes no more than the order in which numbers are added up. Of
prompts without a seed all pictures share the command's, and are numbered through; those of a prompt with a seed count from 0, so
that its place in a file does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import mmar_megatron
from mmar_megatron.diffusion.painting import GuidanceSchedule, ImageSampling, Order, Report, cosine_rounds
from mmar_megatron.diffusion.sampler import SamplerKind
from mmar_megatron.generation.editing import Edit
from mmar_megatron.generation.opening import Opened
from mmar_megatron.generation.prompts import Prompt

_ROUNDS = 32


def settle(
    opened: Opened,
    *,
    rounds: int | None = None,
    steps: int | None = None,
    sampler: SamplerKind | None = None,
    order: Order = "random",
    guidance_scale: float = 2.0,
    guidance_schedule: GuidanceSchedule = "constant",
    temperature: float = 1.0,
    refresh_every: int = 1,
) -> dict[str, Any]:
    """The settings of `MMARForCausalLM.generate_images`, without what was left to the model.

    Args:
        opened: the model.
        rounds: none: 32, or of a smaller image as many as it has tokens.
        steps, sampler: none: as the model's configuration says.
        order, guidance_scale, guidance_schedule, temperature, refresh_every: see `ImageSampling`.

    Raises:
        ValueError: more rounds than tokens, more steps than noise levels, or another setting that makes no sense.
    """
    model, tokens = opened.model, opened.model.config.num_image_tokens
    settings: dict[str, Any] = {
        "rounds": min(_ROUNDS, tokens) if rounds is None else rounds,
        "steps": model.config.diffusion["sampling_steps"] if steps is None else steps,
        "sampler": sampler or model.config.diffusion["sampler"],
        "order": order,
        "guidance_scale": guidance_scale,
        "guidance_schedule": guidance_schedule,
        "temperature": temperature,
        "refresh_every": refresh_every,
    }
    ImageSampling(**settings).head_sampler(schedule=model.schedule, parameterization=model.parameterization)
    cosine_rounds(tokens, rounds=settings["rounds"])
    return settings


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture to paint."""

    prompt: Prompt
    seed: int
    number: int
    """Of the seed's pictures."""
    file: str

    def record(self, opened: Opened, settings: dict[str, Any], *, edit: Edit | None) -> dict[str, Any]:
        """All that it takes to paint it again."""
        named = {} if self.prompt.id is None else {"id": self.prompt.id}
        return {
            "file": self.file,
            **named,
            "prompt": self.prompt.text,
            "seed": self.seed,
            "number": self.number,
            **settings,
            **({} if edit is None else edit.facts),
            **opened.facts,
            "version": mmar_megatron.__version__,
        }


def pictures_of(prompts: Sequence[Prompt], *, images: int, seed: int) -> list[Picture]:
    """All pictures, in order.

    Raises:
        ValueError: no picture is asked for, or the seed is negative.
    """
    if images < 1:
        raise ValueError(f"--images is {images}: give 1 or more")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more")
    return [
        Picture(
            prompt=prompt,
            seed=seed if prompt.seed is None else prompt.seed,
            number=p * images + k if prompt.seed is None else k,
            file=f"{p:06d}-{k}.png",
        )
        for p, prompt in enumerate(prompts)
        for k in range(images)
    ]


def batches(pictures: Sequence[Picture], *, size: int) -> Iterator[list[Picture]]:
    """Runs of at most `size` pictures that have one seed and consecutive numbers, as one call paints them."""
    batch: list[Picture] = []
    for picture in pictures:
        follows = bool(batch) and (picture.seed, picture.number) == (batch[-1].seed, batch[-1].number + 1)
        if batch and (not follows or len(batch) == size):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def paint(
    opened: Opened,
    pictures: Sequence[Picture],
    *,
    settings: dict[str, Any],
    batch_size: int,
    done: int = 0,
    edit: Edit | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Iterator[tuple[Picture, NDArray[np.uint8]]]:
    """Each picture that is not done, and its pixels, uint8 [H, W, 3].

    Args:
        opened: the model.
        pictures: all, which the batches follow from.
        settings: of `settle`.
        batch_size: pictures painted at a time.
        done: so many of the first are painted. Of a batch with some of them all are painted once more, for the same to the bit.
        edit: the picture that all begin from.
        progress: called with the number of pictures painted so far, also between two.

    Raises:
        ValueError: what was drawn of a picture is not finite; it is named, and those before it were given.
    """
    end = 0
    for batch in batches(pictures, size=batch_size):
        begin, end = end, end + len(batch)
        if end <= done:
            continue
        there = max(0, done - begin)
        try:
            painted_BHW3 = _paint(
                opened, batch, settings=settings, edit=edit, progress=partial(_tell, progress, begin, len(batch))
            )
        except FloatingPointError as error:
            if len(batch) > 1:  # one by one tells of which it is
                yield from paint(opened, batch, settings=settings, batch_size=1, done=there, edit=edit)
                continue
            raise ValueError(f"{batch[0].prompt.place} ({batch[0].prompt.text!r}), picture {batch[0].file}: {error}") from error
        yield from zip(batch[there:], painted_BHW3[there:], strict=True)


def _tell(progress: Callable[[float], None], begin: int, count: int, number: int, rounds: int, *_: Tensor) -> None:
    progress(begin + count * number / rounds)


def _paint(
    opened: Opened, batch: Sequence[Picture], *, settings: dict[str, Any], edit: Edit | None, progress: Report
) -> NDArray[np.uint8]:
    return opened.processor.to_pictures(draw(opened, batch, settings=settings, edit=edit, progress=progress))


def draw(
    opened: Opened,
    batch: Sequence[Picture],
    *,
    settings: dict[str, Any],
    edit: Edit | None,
    progress: Report,
) -> Tensor:
    """Tokens of pictures, fp32 [B, N, C].

    Args:
        opened: the model.
        batch: of one seed, with consecutive numbers.
        settings: of `settle`.
        edit: the picture that all begin from.
        progress: see `MMARForCausalLM.generate_images`.

    Raises:
        FloatingPointError: what was drawn is not finite.
    """
    inputs = opened.processor.to_paint([picture.prompt.text for picture in batch]).to(opened.model.device)
    changes: dict[str, Any] = {}
    if edit is not None:
        redraw_BN = np.stack([edit.redraw(seed=picture.seed, number=picture.number) for picture in batch])
        changes = {"start_latents": edit.latents_NC.expand(len(batch), -1, -1), "redraw": torch.from_numpy(redraw_BN)}
    first = batch[0]
    return opened.model.generate_images(
        **inputs, **changes, **settings, seed=first.seed, first_number=first.number, progress=progress
    )
