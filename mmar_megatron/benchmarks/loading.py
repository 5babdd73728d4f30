"""Samples a second: the same tars in their order and at random, whole microbatches, and what a training step takes of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mmar_megatron.benchmarks.timing import WARM_UP, in_turn, median, ratio
from mmar_megatron.benchmarks.training import one_step_of_data, prepare
from mmar_megatron.config import Config, parse_command_line
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.data.shards import Sample, decode_image, decode_npy
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.stream import Stream, StreamState
from mmar_megatron.training.building import build_engine, open_source

_PREFETCH = 2
"""Microbatches that each worker makes in advance: torch's default."""
_SETTLE_S = 0.2
"""After which workers have made them, and leave the cores to who has the next turn."""


def compare_loaders(options: Sequence[str], *, microbatches: int, cold: bool, rounds: int) -> dict[str, Any]:
    """Samples a second of each way of reading, all of them without the cache of decoded samples, and ratios.

    Args:
        options: of pretrain_mmar.py. Microbatches are made unpacked and packed; the step trains on those that it asks for.
        microbatches: of each way in each round.
        cold: whether the system forgets the shards before each turn.
        rounds: of which medians are taken.

    Raises:
        ValueError: the data are not on this machine.
    """
    config, source, groups = prepare(parse_command_line(options).config)
    tars = [Path(opened.path) / shard.name for opened in source.sets for shard in opened.index.shards if shard.split == "train"]
    if not all(tar.is_file() for tar in tars):
        raise ValueError("webdataset is to read the same tars in their order: copy the data to a disk of this machine")
    batches = one_step_of_data(config, source=source, groups=groups)
    step = partial(build_engine(config, source=source, groups=groups).train_step, batches, learning_rate=config.optimizer.lr)
    unpacked, packed = (open_source(replace(config, data=replace(config.data, packing=packing))) for packing in (False, True))
    with ExitStack() as stack:
        loaders = [stack.enter_context(closing(iter(_loader(made_into, config)))) for made_into in (unpacked, packed)]
        taken = {
            "webdataset": map(_samples, in_order(tars, config)),
            "random_access": map(_samples, at_random(unpacked, config)),
            "unpacked": map(_documents, loaders[0]),
            "packed": map(_documents, loaders[1]),
        }
        readings = [Reading(sizes, microbatches=microbatches, workers=config.data.num_workers) for sizes in taken.values()]
        before = partial(_drop_from_cache, tars) if cold else _nothing
        seconds = in_turn([*readings, step], rounds=rounds, before=before, after=partial(sleep, _SETTLE_S))
    speeds = {name: reading.samples_per_s(s) for name, reading, s in zip(taken, readings, seconds, strict=False)}
    speeds["step"] = [sum(map(_documents, batches)) / s for s in seconds[-1]]
    return {
        "cold": cold,
        "workers": config.data.num_workers,
        "packing": config.data.packing,
        "samples_per_s": {name: median(values) for name, values in speeds.items()},
        "random_access_to_webdataset": ratio(speeds["random_access"], speeds["webdataset"]),
        "loader_to_step": ratio(speeds["packed" if config.data.packing else "unpacked"], speeds["step"]),
    }


class Reading:
    """One way of reading, of which each turn takes some microbatches.

    Args:
        sizes: samples of each microbatch, without end.
        microbatches: of a turn.
        workers: that make them.
    """

    def __init__(self, sizes: Iterator[int], *, microbatches: int, workers: int) -> None:
        self._sizes = sizes
        self._ready = _PREFETCH * workers
        self._taken = microbatches + self._ready
        self._samples: list[int] = []

    def __call__(self) -> None:
        """A turn."""
        self._samples.append(sum(islice(self._sizes, self._taken)))

    def samples_per_s(self, seconds: Sequence[float]) -> list[float]:
        """In each round; microbatches that lay ready when the turn began do not count."""
        made = 1 - self._ready / self._taken
        return [made * samples / turn for samples, turn in zip(self._samples[WARM_UP:], seconds, strict=True)]


class Decoded(NamedTuple):
    """All of a sample."""

    metadata: dict[str, Any]
    images: list[NDArray[np.uint8]]
    arrays: list[NDArray[Any]]


def in_order(tars: Sequence[Path], config: Config) -> Iterator[list[Any]]:
    """By webdataset, over and over; each worker has its own tars."""
    workers = config.data.num_workers
    if len(tars) < workers:
        raise ValueError(
            f"webdataset gives each worker its own tars, of which there are {len(tars)}: set data.num_workers to that"
        )
    decode = partial(_decode, image_size=config.data.codec.image_size)
    dataset = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).map(decode).repeat()
    return iter(DataLoader(dataset, batch_size=config.train.micro_batch_size, num_workers=workers, collate_fn=_collate))


def _decode(members: dict[str, Any], *, image_size: int) -> Decoded:
    return Decoded(
        json.loads(members["json"]),
        [decode_image(content, image_size=image_size) for name, content in members.items() if name.endswith("png")],
        [decode_npy(memoryview(content)) for name, content in members.items() if name.endswith("npy")],
    )


def _collate(samples: list[Decoded]) -> list[Any]:
    """As one tensor of pictures, and one for each kind of array, if the samples are alike."""
    images = [image for sample in samples for image in sample.images]
    return [
        [sample.metadata for sample in samples],
        torch.from_numpy(np.stack(images)) if images else None,
        [torch.from_numpy(np.stack(arrays)) for arrays in zip(*(sample.arrays for sample in samples), strict=False)],
    ]


def at_random(source: DataSource, config: Config) -> Iterator[list[Any]]:
    """The samples of the training stream, and nothing made of them."""
    dataset = _RandomAccess(source, seed=config.seed, size=config.train.micro_batch_size)
    return iter(DataLoader(dataset, batch_size=None, sampler=count(), num_workers=config.data.num_workers))


class _RandomAccess(Dataset[list[Any]]):
    def __init__(self, source: DataSource, *, seed: int, size: int) -> None:
        self._size = size
        self._readers = [source.reader("train", of=opened) for opened in source.sets]
        self._stream = Stream(source.planner(seed=seed), StreamState())

    def __getitem__(self, k: int) -> list[Any]:
        begin = k * self._size
        rows = self._stream.rows(begin, begin + self._size)
        samples = [self._readers[plan.source].read(plan.number) for (plan,) in rows]
        self._stream.forget(begin)
        return _collate([_all_of(sample) for sample in samples])


def _all_of(sample: Sample) -> Decoded:
    arrays = (sample.moments_I2NC, sample.flipped_I2NC, sample.teacher_INF)
    return Decoded(sample.metadata, sample.images, [array for array in arrays if array is not None])


def _loader(source: DataSource, config: Config) -> TrainLoader:
    train = config.train
    return TrainLoader(
        source,
        seed=config.seed,
        timestep_multiplier=config.model.head.timestep_multiplier,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        cache_bytes=0,
    )


def _samples(collated: list[Any]) -> int:
    return len(collated[0])


def _documents(batch: Batch) -> int:
    return int((batch.sample_ids_BK >= 0).sum())


def _drop_from_cache(files: Sequence[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _nothing() -> None: ...
