"""The training microbatches of one data-parallel rank.

A step takes the next G rows of the stream (see `stream`), G being the global batch size; of them microbatch m of rank r takes the
block of B that begins at (m * ranks + r) * B. What a row holds does not depend on the layout. So the state of the stream is the
same on all ranks, and each step sees the same rows at any number of ranks and of workers. Axes: B sequences, R noise levels.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from itertools import count
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.documents import DocumentMaker
from mmar_megatron.data.index import BadDataError
from mmar_megatron.data.shards import UndecodableSampleError
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.storage import StorageError
from mmar_megatron.data.stream import Stream, StreamState
from mmar_megatron.platform import STOP_SIGNALS, die_with_parent

_CACHE_BYTES = 512 * 2**20
"""For decoded samples, on each rank, over all its workers."""
_LEAST_READ = 1000
"""The share of bad samples is not judged on fewer samples than this, or than the data have."""


class Counts(NamedTuple):
    """What happened while samples were read."""

    read: int = 0
    skipped: int = 0
    """Samples that could not be decoded."""
    truncated: int = 0
    """Documents that were too long."""

    def plus(self, other: Counts) -> Counts:
        """The sum of both."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Loaded(NamedTuple):
    """A microbatch, and what is to be known of it."""

    batch: Batch
    counts: list[Counts]
    """Of each source, on this rank."""
    state: StreamState
    """After the step to which the microbatch belongs."""
    problem: str | None
    """Why the last of the samples that were skipped could not be decoded."""


class _Shares(NamedTuple):
    """Which rows of the stream are whose, counted from where it was entered."""

    micro_batch_size: int
    global_batch_size: int
    rank: int
    ranks: int

    def begin(self, k: int) -> int:
        """Of the rank's microbatch k."""
        step, m = divmod(k, self.microbatches)
        return step * self.global_batch_size + (m * self.ranks + self.rank) * self.micro_batch_size

    def end_of_step(self, k: int) -> int:
        """Rows up to the end of the step with the rank's microbatch k."""
        return (k // self.microbatches + 1) * self.global_batch_size

    @property
    def microbatches(self) -> int:
        """In a step, on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.ranks)


class _Microbatches(Dataset[Loaded]):
    """The rank's microbatch k as a pure function of k, so that any worker may make it; each asks for them in rising order."""

    def __init__(
        self,
        source: DataSource,
        *,
        seed: int,
        timestep_multiplier: int,
        shares: _Shares,
        state: StreamState,
        cache_bytes: int,
    ) -> None:
        self._source, self._shares = source, shares
        self._timestep_multiplier = timestep_multiplier
        cache_bytes = cache_bytes // max(1, source.config.num_workers) // len(source.sets)
        self.readers = [source.reader("train", of=opened, cache_bytes=cache_bytes) for opened in source.sets]
        self._maker = DocumentMaker(source, readers=self.readers, seed=seed, timestep_multiplier=timestep_multiplier)
        self.stream = Stream(source.planner(seed=seed), state)
        self._announced = -1

    def __getitem__(self, k: int) -> Loaded:
        self._read_ahead(k)
        begin = self._shares.begin(k)
        counts, problem = [Counts() for _ in self._source.sets], None
        rows = []
        for plans in self.stream.rows(begin, begin + self._shares.micro_batch_size):
            documents = []
            for plan in plans:
                try:
                    document = self._maker.make(plan)
                except UndecodableSampleError as error:
                    # Its place in the row stays empty, on every layout alike.
                    counts[plan.source] = counts[plan.source].plus(Counts(read=1, skipped=1))
                    problem = str(error)
                    continue
                counts[plan.source] = counts[plan.source].plus(Counts(read=1, truncated=int(document.truncated)))
                documents.append(document)
            rows.append(documents)
        batch = self._source.assemble(rows, timestep_multiplier=self._timestep_multiplier)
        state = self.stream.after(self._shares.end_of_step(k))
        self.stream.forget(begin)
        return Loaded(batch, counts, state, problem)

    def _read_ahead(self, k: int) -> None:
        """Announce what this worker will read for its next microbatches, which are every so many-th."""
        worker = get_worker_info()
        stride = worker.num_workers if worker else 1
        last = k + self._source.config.read_ahead * stride
        first = self._announced + stride if self._announced >= k else k
        for coming in range(first, last + 1, stride):
            begin = self._shares.begin(coming)
            wanted: dict[int, list[int]] = {}
            for plans in self.stream.rows(begin, begin + self._shares.micro_batch_size):
                for plan in plans:
                    wanted.setdefault(plan.source, []).append(plan.number)
            for s, numbers in wanted.items():
                self.readers[s].read_ahead(numbers)
            self._announced = coming


class TrainLoader:
    """Iterates over the microbatches of this rank, without end.

    Args:
        source: the opened data sets.
        seed: of order, tasks, masks and noise.
        timestep_multiplier: noise levels for each image token, R.
        micro_batch_size: sequences in a microbatch, B.
        global_batch_size: sequences in a step, over all microbatches and ranks.
        data_parallel_rank, data_parallel_size: which share is this rank's.
        state: where the run stands in the stream.
        pin_memory: for faster copies to a GPU.
        cache_bytes: for decoded samples, over all workers.

    Attributes:
        state: after the step to which the last microbatch handed out belongs; the same on all ranks.
        counts: by source, samples read and skipped and documents truncated, on this rank in the microbatches handed out so far.
        last_problem: why the last sample that was skipped could not be decoded.
        again: rows of the stream that come a second time, because the settings of the data have changed since the state was kept.

    Raises:
        ValueError: bad data (see `DataSource`); batch sizes that do not divide; while iterating, too many bad samples.
    """

    def __init__(
        self,
        source: DataSource,
        *,
        seed: int,
        timestep_multiplier: int,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        state: StreamState | None = None,
        pin_memory: bool = False,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        if global_batch_size % (micro_batch_size * data_parallel_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
                f"x {data_parallel_size} data-parallel ranks: change one of them"
            )
        self.source = source
        self._pin_memory = pin_memory
        self.state = state or StreamState()
        self._microbatches = _Microbatches(
            source,
            seed=seed,
            timestep_multiplier=timestep_multiplier,
            shares=_Shares(micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size),
            state=self.state,
            cache_bytes=cache_bytes,
        )
        self.again = self._microbatches.stream.again
        self._samples = sum(map(len, self._microbatches.readers))
        self.counts = {opened.name: Counts() for opened in source.sets}
        self.last_problem: str | None = None

    def __iter__(self) -> Generator[Batch, None, None]:
        """Ends, and its workers with it, when it is closed."""
        # The generator keeps DataLoader from drawing a seed out of torch's global one, which belongs to the model.
        loader: DataLoader[Loaded] = DataLoader(
            self._microbatches,
            batch_size=None,
            sampler=count(),  # endless
            num_workers=self.source.config.num_workers,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),
            worker_init_fn=_outlive_stop_signals,
        )
        try:
            for batch, counts, state, problem in loader:
                for name, of_batch in zip(self.counts, counts, strict=True):
                    self.counts[name] = self.counts[name].plus(of_batch)
                self.last_problem = problem or self.last_problem
                self._check_bad_fraction()
                self.state = state
                yield batch
        except (BadDataError, StorageError) as error:
            # torch puts a worker's traceback before the message, which is all that a user can act on.
            kind = type(error)
            last_line = str(error).strip().splitlines()[-1]
            raise kind(last_line.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")) from error

    def _check_bad_fraction(self) -> None:
        limit = self.source.config.max_bad_fraction
        read, skipped, _ = Counts(*np.sum(list(self.counts.values()), axis=0).tolist())
        if skipped > limit * max(read, min(_LEAST_READ, self._samples)):
            bad = ", ".join(f"{found.skipped} of {name}" for name, found in self.counts.items() if found.skipped)
            raise BadDataError(
                f"{skipped} samples could not be decoded while reading {read} ({bad}; the last one: {self.last_problem}), "
                f"which is more than data.max_bad_fraction = {limit}: prepare the data set anew or raise the limit"
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
