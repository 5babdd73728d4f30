"""Documents out of samples: the drawn text, latents, masks and noise. Axes: N tokens of an image, C channels, R noise levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.draw import Use, draw_mask, draw_mask_ratio, sample_generator, source_seed
from mmar_megatron.data.index import BadDataError
from mmar_megatron.data.sequence import Document, DocumentImage, Text
from mmar_megatron.data.shards import Sample, ShardReader
from mmar_megatron.data.source import DataSet, DataSource
from mmar_megatron.data.stream import DocumentPlan, Task
from mmar_megatron.data.vae import sample_tokens


class DocumentMaker:
    """Makes the training documents that a plan asks for; each is a function of (seed, source, sample, epoch).

    Args:
        source: the opened data sets.
        readers: of each set's training samples, in the same order.
        seed: of masks and noise.
        timestep_multiplier: noise levels for each masked token, R.
    """

    def __init__(self, source: DataSource, *, readers: Sequence[ShardReader], seed: int, timestep_multiplier: int) -> None:
        self._source = source
        self._readers = readers
        self._seeds = [source_seed(seed, opened.name) for opened in source.sets]
        self._multiplier = timestep_multiplier

    def make(self, plan: DocumentPlan) -> Document:
        """Read and build.

        Raises:
            UndecodableSampleError: the sample's bytes are damaged.
            BadDataError: the index does not fit the samples.
            StorageError: the bytes could not be had.
        """
        opened, builder = self._source.sets[plan.source], self._source.builder
        sample = self._readers[plan.source].read(plan.number)
        sample_id = opened.first_id + sample.sample_id
        generator = sample_generator(plan.number, seed=self._seeds[plan.source], epoch=plan.epoch, use=Use.TRAINING)
        flip = generator.random() < self._source.config.horizontal_flip
        if plan.task is Task.CONTENT:
            return self._content(sample, opened, sample_id=sample_id, generator=generator, flip=flip)
        if plan.task is Task.IMAGE_ONLY:
            number = 0 if sample.content is None else sample.content[-1]["image"]
            image = self._image(sample, number, generator, flip=flip, paint=True)
            return builder.text_to_image([], image=image, sample_id=sample_id)
        texts = [text for language in opened.index.languages for text in sample.captions.get(language, [])]
        text = self._encode(texts[plan.text : plan.text + 1], sample, opened, text=plan.text)[0]
        paint = plan.task is Task.TEXT_TO_IMAGE
        image = self._image(sample, 0, generator, flip=flip, paint=paint)
        build = builder.text_to_image if paint else builder.image_to_text
        return build(text, image=image, sample_id=sample_id)

    def _content(
        self, sample: Sample, opened: DataSet, *, sample_id: int, generator: np.random.Generator, flip: bool
    ) -> Document:
        parts = sample.content or []
        ends = sum(part.get("end", False) for part in parts)
        tokens = iter(self._encode([part["text"] for part in parts if "text" in part], sample, opened, ends=ends))
        made = made_of(
            parts,
            encode=lambda _: next(tokens),
            image=lambda number, paint: self._image(sample, number, generator, flip=flip, paint=paint),
        )
        return self._source.builder.content(made, sample_id=sample_id)

    def _encode(self, texts: Sequence[str], sample: Sample, opened: DataSet, *, text: int = 0, ends: int = 0) -> list[list[int]]:
        """Tokens of texts that the index counts as one; the plan of the row relies on the count."""
        tokens = [self._source.tokenizer.encode(t) for t in texts]
        found, index = sum(map(len, tokens)) + ends, opened.index
        counted = int(index.text_tokens[int(index.text_start[sample.sample_id]) + text])
        if not texts or found != counted:
            raise BadDataError(
                f"{opened.path}: sample {sample.key} has a text of {found} tokens, the index says {counted}: "
                f"`python tools/prepare_data.py index {opened.path}` makes the index anew"
            )
        return tokens

    def _image(self, sample: Sample, number: int, generator: np.random.Generator, *, flip: bool, paint: bool) -> DocumentImage:
        latents_NC = latents_of(sample, number, source=self._source, generator=generator, flip=flip)
        teacher_NF = _teacher_of(sample, number, source=self._source, flip=flip)
        if not paint:
            return visible_image(latents_NC, teacher_NF=teacher_NF)
        (num_tokens, channels), multiplier = latents_NC.shape, self._multiplier
        ratio = draw_mask_ratio(generator, self._source.config.mask_ratio)
        return DocumentImage(
            latents_NC=latents_NC,
            masked_N=draw_mask(generator, num_tokens=num_tokens, ratio=ratio),
            timesteps_NR=generator.random((num_tokens, multiplier), dtype=np.float32),
            noise_NRC=generator.standard_normal((num_tokens, multiplier, channels), dtype=np.float32),
            teacher_NF=teacher_NF,
        )


def made_of(
    parts: Sequence[dict[str, Any]],
    *,
    encode: Callable[[str], list[int]],
    image: Callable[[int, bool], DocumentImage],
) -> list[Text | DocumentImage]:
    """The parts of a content sample, as `DocumentBuilder.content` takes them.

    Args:
        parts: see `content`.
        encode: text -> ids; asked in the order of the parts.
        image: the sample's picture with this number, to be painted or seen.
    """
    return [
        Text(encode(part["text"]), learn=part.get("learn", False), end=part.get("end", False))
        if "text" in part
        else image(part["image"], part.get("learn", False))
        for part in parts
    ]


def visible_image(latents_NC: NDArray[np.float32], *, teacher_NF: NDArray[np.float32] | None = None) -> DocumentImage:
    """An image that is read, and nothing of which is to be painted."""
    return DocumentImage(latents_NC=latents_NC, masked_N=np.zeros(len(latents_NC), dtype=np.bool_), teacher_NF=teacher_NF)


def latents_of(
    sample: Sample, number: int, *, source: DataSource, generator: np.random.Generator, flip: bool = False
) -> NDArray[np.float32]:
    """Tokens [N, C] of one of the sample's pictures: drawn from cached moments where it has them, else encoded from pixels."""
    moments_I2NC = sample.flipped_I2NC if flip else sample.moments_I2NC
    if moments_I2NC is not None:
        return sample_tokens(moments_I2NC[number], generator)
    image_HW3 = sample.image(number)
    return source.codec.encode(image_HW3[:, ::-1] if flip else image_HW3)


def _teacher_of(sample: Sample, number: int, *, source: DataSource, flip: bool) -> NDArray[np.float32] | None:
    if not source.teacher_features or sample.teacher_INF is None:
        return None
    teacher_NF = sample.teacher_INF[number].astype(np.float32)
    if not flip:
        return teacher_NF
    grid = teacher_NF.reshape(source.codec.grid_height, source.codec.grid_width, -1)
    return grid[:, ::-1].reshape(teacher_NF.shape)  # of the mirrored picture they would be about this
