"""What the plan of the training stream comes to: how full its rows are, and who has which share of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.source import DataSource
from mmar_megatron.data.stream import Planner, Task, Window


@dataclass(frozen=True, kw_only=True)
class PackingFacts:
    """Rows of one length, made of the same documents."""

    sequence_length: int
    packing: bool
    documents: int
    rows: int
    used: float
    """Share of the positions that hold a document."""
    documents_per_row: float
    images_per_row: float
    cut: float
    """Share of the documents that lose their end."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one source or task has of the stream."""

    name: str
    documents: float
    positions: float
    images: int
    """In all."""
    labels: int
    """Text tokens to be learned, in all."""
    painted: int
    """Images to be painted, in all."""


@dataclass(frozen=True, kw_only=True)
class StreamFacts:
    """The first window of a stream."""

    sequence_length: int
    packing: bool
    window: int
    """Documents."""
    table: list[PackingFacts]
    """At several lengths, each with one document in a row and with as many as fit."""
    sources: list[Share]
    tasks: list[Share]

    @property
    def chosen(self) -> PackingFacts:
        """That of the stream as it is."""
        wanted = (self.sequence_length, self.packing)
        return next(facts for facts in self.table if (facts.sequence_length, facts.packing) == wanted)


def gather_stream(source: DataSource, *, seed: int) -> StreamFacts:
    """Plans the same window at several lengths.

    Args:
        source: the opened data sets, with the settings of the stream.
        seed: of the stream.
    """
    planner, config = source.planner(seed=seed), source.config
    table = [
        _packing(_window(planner, sequence_length=length, packing=packing), sequence_length=length, packing=packing)
        for length in lengths_around(config.sequence_length, num_tokens=source.codec.num_tokens)
        for packing in (False, True)
    ]
    window = _window(planner, sequence_length=config.sequence_length, packing=False)
    return StreamFacts(
        sequence_length=config.sequence_length,
        packing=config.packing,
        window=config.packing_window,
        table=table,
        sources=[_share(window, window.source_D == s, name=opened.name) for s, opened in enumerate(source.sets)],
        tasks=[_share(window, window.task_D == task, name=name_of(task)) for task in Task if (window.task_D == task).any()],
    )


def name_of(task: Task) -> str:
    """As the configuration has it."""
    return task.name.lower()


def lengths_around(sequence_length: int, *, num_tokens: int) -> Sequence[int]:
    """Half of it, if an image with a token of text has room in that, and up to eight times of it."""
    lengths = [sequence_length // 2, *(sequence_length * factor for factor in (1, 2, 4, 8))]
    return [length for length in lengths if length >= num_tokens + 5]


def _window(planner: Planner, *, sequence_length: int, packing: bool) -> Window:
    settings = replace(planner.settings, sequence_length=sequence_length, packing=packing)
    return Planner(planner.sources, settings).window(0, places={})


def _packing(window: Window, *, sequence_length: int, packing: bool) -> PackingFacts:
    rows = len(window.rows)
    return PackingFacts(
        sequence_length=sequence_length,
        packing=packing,
        documents=len(window.length_D),
        rows=rows,
        used=float(window.length_D.sum()) / (rows * sequence_length),
        documents_per_row=len(window.length_D) / rows,
        images_per_row=float(window.images_D.sum()) / rows,
        cut=float(window.cut_D.mean()),
    )


def _share(window: Window, mine: NDArray[np.bool_], *, name: str) -> Share:
    return Share(
        name=name,
        documents=float(mine.mean()),
        positions=float(window.length_D[mine].sum() / window.length_D.sum()),
        images=int(window.images_D[mine].sum()),
        labels=int(window.labels_D[mine].sum()),
        painted=int(window.painted_D[mine].sum()),
    )
