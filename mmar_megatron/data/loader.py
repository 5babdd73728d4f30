"""Loaders: the microbatches of one data-parallel rank, for training and for validation.

Step n of a run takes the positions [n * G, (n + 1) * G) of the training stream, G being the global batch size; microbatch m of
rank r takes the block of B of them that begins at (m * ranks + r) * B. What a position holds does not depend on the layout. So
the state of the stream is one integer, the number of samples consumed, and each step sees the same samples at any number of
ranks and of workers. Axes: N tokens of an image, C channels, R noise levels, B sequences.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from threading import Thread
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.codec import ImageCodec, build_codec
from mmar_megatron.data.draw import Permutation, Use, draw_mask, draw_mask_ratio, draw_task, sample_generator
from mmar_megatron.data.sequence import Document, DocumentBuilder, DocumentImage, assemble
from mmar_megatron.data.shards import BadDataError, Index, Sample, ShardReader, Split
from mmar_megatron.data.tokenizer import Tokenizer, load_tokenizer
from mmar_megatron.platform import STOP_SIGNALS, die_with_parent

if TYPE_CHECKING:
    from mmar_megatron.config import DataConfig

_CACHE_BYTES = 512 * 2**20
"""For decoded samples, on each rank, over all its workers."""
_LEAST_READ = 1000
"""The share of bad images is not judged on fewer samples than this, or than the split has."""


class DataSource:
    """An opened data set with the tokenizer and the codec that go with it.

    Args:
        config: the data section.

    Raises:
        ValueError: nothing is there, or it was made with another tokenizer or codec, or lacks all of the languages.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.index = Index.load(config.path)
        self.codec: ImageCodec = build_codec(config.codec)
        self.tokenizer: Tokenizer = load_tokenizer(config.tokenizer or config.path)
        self.builder = DocumentBuilder(self.tokenizer, num_tokens=self.codec.num_tokens, sequence_length=config.sequence_length)
        self._check()

    def _check(self) -> None:
        path, config = self.config.path, self.config
        if self.index.codec != self.codec.fingerprint:
            raise ValueError(
                f"{path} was made for the codec ({self.index.codec}), data.codec is ({self.codec.fingerprint}): "
                f"change data.codec or prepare the data set anew"
            )
        if self.index.tokenizer != self.tokenizer.fingerprint:
            raise ValueError(
                f"{path} was made with the tokenizer {self.index.tokenizer[:16]}..., but {config.tokenizer or path} is "
                f"{self.tokenizer.fingerprint[:16]}...: change data.tokenizer or prepare the data set with it"
            )
        index = self.index
        codes = [code for code, language in enumerate(index.languages) if language in config.languages]
        usable = np.concatenate([[0], np.cumsum(np.isin(index.text_language, codes))])
        lacking = usable[index.text_start[1:]] == usable[index.text_start[:-1]]
        if lacking.any():
            raise ValueError(
                f"{path}: sample {int(lacking.argmax())} has no caption in the languages {config.languages} of data.languages; "
                f"the data set has {index.languages}"
            )

    def reader(self, split: Split, *, cache_bytes: int = 0) -> ShardReader:
        """Opens the samples of a split. Raises ValueError where it is empty, or a shard missing or truncated."""
        return ShardReader(self.config.path, index=self.index, split=split, cache_bytes=cache_bytes)

    def captions(self, sample: Sample) -> list[str]:
        """All captions of a sample in the configured languages."""
        return [text for language in self.config.languages for text in sample.captions.get(language, [])]

    def draw_caption(self, sample: Sample, generator: np.random.Generator) -> str:
        """One caption: a configured language that the sample has, then a caption in it, each equally likely."""
        languages = [language for language in self.config.languages if language in sample.captions]
        texts = sample.captions[languages[generator.integers(len(languages))]]
        return texts[generator.integers(len(texts))]

    def assemble(self, documents: Sequence[Document | None], *, timestep_multiplier: int) -> Batch:
        """One document in each row; None is an empty row."""
        return assemble(
            [[document] if document else [] for document in documents],
            sequence_length=self.config.sequence_length,
            image_shape=(self.codec.num_tokens, self.codec.channels),
            timestep_multiplier=timestep_multiplier,
            pad_id=self.tokenizer.pad_id,
        )


class Counts(NamedTuple):
    """What happened while samples were read."""

    read: int = 0
    skipped: int = 0
    """Images that could not be decoded."""
    truncated: int = 0
    """Captions that were too long."""

    def plus(self, other: Counts) -> Counts:
        """The sum of both."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class _Microbatches(Dataset[tuple[Batch, Counts]]):
    """Microbatch k of this rank as a pure function of k, so that any worker may make it."""

    def __init__(self, source: DataSource, *, reader: ShardReader, seed: int, timestep_multiplier: int, starts: _Starts) -> None:
        self._source = source
        self._reader = reader
        self._seed = seed
        self._timestep_multiplier = timestep_multiplier
        self._starts = starts
        self._shares = asdict(source.config.tasks)

    def __getitem__(self, k: int) -> tuple[Batch, Counts]:
        begin = self._starts.begin(k)
        documents, counts = [], Counts()
        for position in range(begin, begin + self._starts.micro_batch_size):
            document, of_one = self._document(position)
            documents.append(document)
            counts = counts.plus(of_one)
        return self._source.assemble(documents, timestep_multiplier=self._timestep_multiplier), counts

    def _document(self, position: int) -> tuple[Document, Counts]:
        epoch, number = divmod(position, len(self._reader))
        order = Permutation(len(self._reader), seed=self._seed, epoch=epoch)
        sample, skipped = self._reader.read_or_next(order[number])
        generator = sample_generator(sample.sample_id, seed=self._seed, epoch=epoch, use=Use.TRAINING)

        source, builder = self._source, self._source.builder
        task = draw_task(position, shares=self._shares, seed=self._seed)
        text = source.tokenizer.encode(source.draw_caption(sample, generator))
        drop = generator.random() < source.config.caption_dropout
        latents_NC = source.codec.encode(sample.image_HW3)
        if task == "image_to_text":
            image = _visible_image(latents_NC)
            document = builder.image_to_text(text, image=image, sample_id=sample.sample_id)
        else:
            text = [] if task == "image_only" or drop else text
            image = self._masked_image(latents_NC, generator)
            document = builder.text_to_image(text, image=image, sample_id=sample.sample_id)
        return document, Counts(read=1, skipped=skipped, truncated=int(len(text) > builder.max_text))

    def _masked_image(self, latents_NC: NDArray[np.float32], generator: np.random.Generator) -> DocumentImage:
        (num_tokens, channels), multiplier = latents_NC.shape, self._timestep_multiplier
        ratio = draw_mask_ratio(generator, self._source.config.mask_ratio)
        return DocumentImage(
            latents_NC=latents_NC,
            masked_N=draw_mask(generator, num_tokens=num_tokens, ratio=ratio),
            timesteps_NR=generator.random((num_tokens, multiplier), dtype=np.float32),
            noise_NRC=generator.standard_normal((num_tokens, multiplier, channels), dtype=np.float32),
        )


def _visible_image(latents_NC: NDArray[np.float32]) -> DocumentImage:
    return DocumentImage(latents_NC=latents_NC, masked_N=np.zeros(len(latents_NC), dtype=np.bool_))


class _Starts(NamedTuple):
    """Where in the stream each microbatch of a rank begins."""

    start_sample: int
    micro_batch_size: int
    global_batch_size: int
    rank: int
    ranks: int

    def begin(self, k: int) -> int:
        step, m = divmod(k, self.global_batch_size // (self.micro_batch_size * self.ranks))
        return self.start_sample + step * self.global_batch_size + (m * self.ranks + self.rank) * self.micro_batch_size


class TrainLoader:
    """Iterates over the microbatches of this rank, without end.

    Args:
        config: the data section.
        seed: of order, tasks, masks and noise.
        timestep_multiplier: noise levels for each image token, R.
        micro_batch_size: sequences in a microbatch, B.
        global_batch_size: sequences in a step, over all microbatches and ranks.
        data_parallel_rank, data_parallel_size: which share is this rank's.
        start_sample: samples consumed by the run so far: the whole state of the stream.
        pin_memory: for faster copies to a GPU.

    Attributes:
        source: the opened data set, with `tokenizer` and `codec`.
        counts: samples read, images skipped, captions truncated on this rank in the microbatches handed out so far.

    Raises:
        ValueError: bad data (see `DataSource`); batch sizes that do not divide; while iterating, too many bad images.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        timestep_multiplier: int,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        start_sample: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if global_batch_size % (micro_batch_size * data_parallel_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
                f"x {data_parallel_size} data-parallel ranks: change one of them"
            )
        self.source = DataSource(config)
        self.counts = Counts()
        self._reader = self.source.reader("train", cache_bytes=_CACHE_BYTES // max(1, config.num_workers))
        self._pin_memory = pin_memory
        starts = _Starts(start_sample, micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
        self._microbatches = _Microbatches(
            self.source, reader=self._reader, seed=seed, timestep_multiplier=timestep_multiplier, starts=starts
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        """Ends, and its workers with it, when it is closed."""
        # The generator keeps DataLoader from drawing a seed out of torch's global one, which belongs to the model.
        loader = DataLoader(
            self._microbatches,
            batch_size=None,
            sampler=count(),  # endless
            num_workers=self.source.config.num_workers,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),
            worker_init_fn=_outlive_stop_signals,
        )
        try:
            for batch, counts in loader:
                self.counts = self.counts.plus(counts)
                self._check_bad_fraction()
                yield batch
        except BadDataError as error:
            # torch puts a worker's traceback before the message, which is all that a user can act on.
            raise BadDataError(
                str(error).strip().splitlines()[-1].removeprefix(f"{BadDataError.__module__}.BadDataError: ")
            ) from error

    def _check_bad_fraction(self) -> None:
        limit = self.source.config.max_bad_fraction
        read = max(self.counts.read, min(_LEAST_READ, len(self._reader)))
        if self.counts.skipped > limit * read:
            raise BadDataError(
                f"{self.source.config.path}: {self.counts.skipped} images could not be decoded while reading {self.counts.read} "
                f"samples, which is more than data.max_bad_fraction = {limit}: prepare the data set anew or raise the limit"
            )


def _outlive_stop_signals(worker: int) -> None:
    """Let a worker end when the trainer ends or says so: stop signals reach all processes, and the last step needs its data."""
    die_with_parent()  # and with it its copies of the trainer's connections, by which others see that the trainer is gone
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class ValidationLoader:
    """Iterates over a fixed selection of the held-out samples, in a fixed grid of (mask ratio x noise level x noise).

    The selection is spread evenly over the split. Sample i of it has mask ratio `mask_ratios[i % len(mask_ratios)]` and the noise
    levels (k + 0.5) / R at every token. Nothing depends on the layout; the last microbatches are filled up with empty rows, so
    that every rank has equally many.

    Args:
        config: the data section.
        seed: of masks and noise.
        timesteps: noise levels for each image token, R.
        mask_ratios: share of the image tokens that is masked in text to image.
        samples: how many to read, at most the split's.
        micro_batch_size: sequences in a microbatch.
        data_parallel_rank, data_parallel_size: which share is this rank's.
        task: text_to_image for the image loss, image_to_text for the text loss.
        wrong_condition: give each sample the caption (or, in image_to_text, the image) of another one with another caption: the
            loss must rise, or the condition is ignored.
    """

    def __init__(
        self,
        config: DataConfig,
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
        self.source = DataSource(config)
        self._reader = self.source.reader("validation", cache_bytes=_CACHE_BYTES)
        self._seed = seed
        self._timesteps = timesteps
        self._mask_ratios = mask_ratios
        self._samples = min(samples, len(self._reader))
        self._micro_batch_size = micro_batch_size
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._task = task
        self._wrong_condition = wrong_condition

    def __len__(self) -> int:
        """Microbatches on each rank."""
        return -(-self._samples // (self._micro_batch_size * self._ranks))

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            begin = (step * self._ranks + self._rank) * self._micro_batch_size
            documents = [self._document(i) if i < self._samples else None for i in range(begin, begin + self._micro_batch_size)]
            yield self.source.assemble(documents, timestep_multiplier=self._timesteps)

    def _document(self, i: int) -> Document:
        source, builder = self.source, self.source.builder
        number = i * len(self._reader) // self._samples
        sample, caption = self._read(number)
        generator = sample_generator(sample.sample_id, seed=self._seed, epoch=0, use=Use.VALIDATION)
        partner, partner_caption = self._partner(number, caption) if self._wrong_condition else (sample, caption)
        if self._task == "image_to_text":
            image = _visible_image(source.codec.encode(partner.image_HW3))
            return builder.image_to_text(source.tokenizer.encode(caption), image=image, sample_id=sample.sample_id)

        latents_NC = source.codec.encode(sample.image_HW3)
        num_tokens, channels = latents_NC.shape
        ratio = self._mask_ratios[i % len(self._mask_ratios)]
        levels_R = (np.arange(self._timesteps, dtype=np.float32) + 0.5) / self._timesteps
        image = DocumentImage(
            latents_NC=latents_NC,
            masked_N=draw_mask(generator, num_tokens=num_tokens, ratio=ratio),
            timesteps_NR=np.broadcast_to(levels_R, (num_tokens, self._timesteps)),
            noise_NRC=generator.standard_normal((num_tokens, self._timesteps, channels), dtype=np.float32),
        )
        return builder.text_to_image(source.tokenizer.encode(partner_caption), image=image, sample_id=sample.sample_id)

    def _read(self, number: int) -> tuple[Sample, str]:
        """The sample (or the next that can be decoded) and the caption that stands for it."""
        sample, _ = self._reader.read_or_next(number)
        captions = self.source.captions(sample)
        return sample, captions[sample.sample_id % len(captions)]

    def _partner(self, number: int, caption: str) -> tuple[Sample, str]:
        """A sample with another caption, from 0.618 of the split away.

        Neighbours in a data set tend to be alike, and so do samples a simple fraction apart: the same emoji in two styles.
        """
        size = len(self._reader)
        for step in range(size):
            sample, other = self._read((number + int(0.618 * size) + step) % size)
            if other != caption:
                return sample, other
        raise ValueError(f"all validation samples in {self.source.config.path} have the caption {caption!r}: none can be wrong")
