"""The microbatches that validate a run: the same in each validation, and at any layout. Axes: R noise levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.documents import latents_of, made_of, visible_image
from mmar_megatron.data.draw import Use, draw_mask, sample_generator
from mmar_megatron.data.index import PAIR
from mmar_megatron.data.sequence import Document, DocumentImage
from mmar_megatron.data.shards import Sample
from mmar_megatron.data.source import DataSource

_CACHE_BYTES = 512 * 2**20
"""For decoded samples, on each rank, while the microbatches are made: each is read for several of them."""


class HeldOut:
    """The samples that validate: the pairs of the held-out split, or all of it where there are none. They are told by places.

    Args:
        source: the opened data sets; `validation_set` is read.

    Raises:
        ValueError: the split is empty.
    """

    def __init__(self, source: DataSource) -> None:
        opened = source.validation_set
        self.source = source
        self._reader = source.reader("validation", cache_bytes=_CACHE_BYTES)
        ids = opened.index.ids("validation")
        pairs = np.flatnonzero(opened.index.kind[ids.start : ids.stop] == PAIR)
        self._numbers: list[int] = (pairs if opened.has_pairs else np.arange(len(ids))).tolist()

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, place: int) -> Sample:
        """The sample at a place (cyclically), or the next that can be decoded.

        Raises:
            BadDataError: none can.
        """
        size = len(self)
        return self._reader.read_first(self._numbers[at % size] for at in range(place, place + size))

    def read_ahead(self, places: Sequence[int]) -> None:
        """A hint that these are read soon."""
        self._reader.read_ahead([self._numbers[place % len(self)] for place in places])

    def metadata(self, place: int) -> dict[str, Any]:
        """What the tar says of a sample, without its picture."""
        return self._reader.metadata(self._numbers[place])

    def captions(self, count: int) -> list[str]:
        """One of each of so many pairs (if there are so many), spread evenly.

        Raises:
            ValueError: there are no pairs.
        """
        opened = self.source.validation_set
        if not opened.has_pairs:
            raise ValueError(f"{opened.path} has no pictures with captions: set preview.every to 0")
        count = min(count, len(self))
        return [self.source.captions(self.read(i * len(self) // count))[0] for i in range(count)]


class ValidationLoader:
    """Iterates over a fixed selection of the held-out samples, in a fixed grid of (mask ratio x noise level x noise).

    The selection is spread evenly. Sample i of it has mask ratio `mask_ratios[i % len(mask_ratios)]` and the noise levels
    (k + 0.5) / R at every token. Nothing depends on the layout; the last microbatches are filled up with empty rows, so that
    every rank has equally many.

    Args:
        held_out: the samples.
        seed: of masks and noise.
        timesteps: noise levels for each image token, R.
        mask_ratios: share of the image tokens that is masked in text to image.
        samples: how many to read, at most the split's.
        micro_batch_size: sequences in a microbatch.
        data_parallel_rank, data_parallel_size: which share is this rank's.
        task: text_to_image for the image loss, image_to_text for the text loss; content has the latter alone.
        wrong_condition: give each sample the caption (or, in image_to_text, the image) of another one with another caption: the
            loss must rise, or the condition is ignored.
    """

    def __init__(
        self,
        held_out: HeldOut,
        *,
        seed: int,
        timesteps: int,
        mask_ratios: Sequence[float],
        samples: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        task: Literal["text_to_image", "image_to_text"],
        wrong_condition: bool = False,
    ) -> None:
        self.source, self._held_out = held_out.source, held_out
        self._samples = min(samples, len(held_out))
        self._seed = seed
        self._timesteps = timesteps
        self._mask_ratios = mask_ratios
        self._micro_batch_size = micro_batch_size
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._task = task
        self._wrong_condition = wrong_condition

    def __len__(self) -> int:
        """Microbatches on each rank."""
        return -(-self._samples // (self._micro_batch_size * self._ranks))

    def __iter__(self) -> Iterator[Batch]:
        batches = [range(begin, begin + self._micro_batch_size) for begin in self._begins()]
        self._read_ahead([i for batch in batches for i in batch if i < self._samples])
        for batch in batches:
            rows = [[self._document(i)] if i < self._samples else [] for i in batch]
            yield self.source.assemble(rows, timestep_multiplier=self._timesteps)

    def _begins(self) -> list[int]:
        return [(step * self._ranks + self._rank) * self._micro_batch_size for step in range(len(self))]

    def _read_ahead(self, samples: Sequence[int]) -> None:
        """Announce what will be read, but for what takes the place of samples that will not do."""
        places = [self._place(i) for i in samples]
        if self._wrong_condition:
            places = [place for own in places for place in (own, self._partner_place(own))]
        self._held_out.read_ahead(places)

    def _place(self, i: int) -> int:
        return i * len(self._held_out) // self._samples

    def _partner_place(self, place: int) -> int:
        return place + int(0.618 * len(self._held_out))

    def _document(self, i: int) -> Document:
        source, builder = self.source, self.source.builder
        place = self._place(i)
        sample = self._held_out.read(place)
        generator = sample_generator(sample.sample_id, seed=self._seed, epoch=0, use=Use.VALIDATION)
        ids = {"sample_id": source.validation_set.first_id + sample.sample_id}
        if not source.validation_set.has_pairs:
            return self._content(sample, generator, **ids)
        caption = self._caption(sample)
        partner, partner_caption = self._partner(place, caption) if self._wrong_condition else (sample, caption)
        if self._task == "image_to_text":
            image = visible_image(latents_of(partner, 0, source=source, generator=generator))
            return builder.image_to_text(source.tokenizer.encode(caption), image=image, **ids)

        latents_NC = latents_of(sample, 0, source=source, generator=generator)
        num_tokens, channels = latents_NC.shape
        ratio = self._mask_ratios[i % len(self._mask_ratios)]
        levels_R = (np.arange(self._timesteps, dtype=np.float32) + 0.5) / self._timesteps
        image = DocumentImage(
            latents_NC=latents_NC,
            masked_N=draw_mask(generator, num_tokens=num_tokens, ratio=ratio),
            timesteps_NR=np.broadcast_to(levels_R, (num_tokens, self._timesteps)),
            noise_NRC=generator.standard_normal((num_tokens, self._timesteps, channels), dtype=np.float32),
        )
        return builder.text_to_image(source.tokenizer.encode(partner_caption), image=image, **ids)

    def _content(self, sample: Sample, generator: np.random.Generator, *, sample_id: int) -> Document:
        source = self.source
        parts = made_of(
            sample.content or [],
            encode=source.tokenizer.encode,
            image=lambda number, _: visible_image(latents_of(sample, number, source=source, generator=generator)),
        )
        return source.builder.content(parts, sample_id=sample_id)

    def _caption(self, sample: Sample) -> str:
        """The one that stands for the sample."""
        captions = self.source.captions(sample)
        return captions[sample.sample_id % len(captions)]

    def _partner(self, place: int, caption: str) -> tuple[Sample, str]:
        """A sample with another caption, from 0.618 of the split away.

        Neighbours in a data set tend to be alike, and so do samples a simple fraction apart: the same emoji in two styles.
        """
        for step in range(len(self._held_out)):
            sample = self._held_out.read(self._partner_place(place) + step)
            if (other := self._caption(sample)) != caption:
                return sample, other
        path = self.source.validation_set.path
        raise ValueError(
            f"all validation samples in {path} have the caption {caption!r}, so that none can be wrong: "
            "prepare it with a larger --validation, or set validation.every to 0"
        )
