"""The endless stream of training documents: which come in which order, and which share a row. Nothing is read but the index.

Position p of the stream belongs to one of the sources, by their weights. A source gives its samples epoch after epoch, each once
in an epoch; its k-th document is its place k. Documents are planned window by window: the next so many positions of the stream
become rows, one document in each or, under packing, as many as fit. All of it is a function of seed, settings and index, so that
every rank and every worker plans the same, and where a run stands is a `StreamState`.

Axes: D documents of a window, T texts of a source, n samples of a source.
"""

from __future__ import annotations

import enum
import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.draw import ShuffledOrder, Use, choose, low_discrepancy, source_seed, uniforms
from mmar_megatron.data.packing import pack

_VERSION = 1
"""Of the rules below: a change of them that changes rows raises it."""


class Task(enum.IntEnum):
    """What a document teaches; the first three are made of pairs, by the shares of `data.tasks`."""

    TEXT_TO_IMAGE = 0
    IMAGE_TO_TEXT = 1
    IMAGE_ONLY = 2
    CONTENT = 3


_TASKS = list(Task)


class DocumentPlan(NamedTuple):
    """How to make one document."""

    source: int
    number: int
    """Of the sample within its source's split."""
    epoch: int
    task: Task
    text: int
    """Which of the sample's texts."""


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Where in the stream a run stands: with seed and settings, all that the next step needs to know."""

    position: int = 0
    """Of the current window's first document."""
    row: int = 0
    """Rows of that window that are consumed."""
    places: Mapping[str, int] = field(default_factory=dict)
    """How many documents each source gave before that window, by its name."""
    plan: str = ""
    """What the window was planned by (`Planner.fingerprint`)."""
    documents: int = 0
    """Consumed in all, like the following."""
    tokens: int = 0
    """Positions that hold a document; those of images too."""
    images: int = 0

    def plus(self, consumed: NDArray[np.int64], **changes: Any) -> StreamState:
        """With so many more documents, tokens and images (one row of `Window.consumed`), and these changes."""
        documents, tokens, images = consumed.tolist()
        totals = {"documents": self.documents + documents, "tokens": self.tokens + tokens, "images": self.images + images}
        return replace(self, **totals, **changes)


@dataclass(frozen=True, kw_only=True)
class SourceLengths:
    """What a plan needs to know of a source: columns of its index, for one split."""

    name: str
    weight: float
    """Share of the stream's documents, relative to the other sources'."""
    task_weights: tuple[float, float, float]
    """Of text to image, image to text, image only."""
    fingerprint: str
    """Of the data."""
    is_pair: NDArray[np.bool_]
    """[n]; the others are content."""
    images: NDArray[np.integer]
    """[n], in content."""
    paints: NDArray[np.bool_]
    """[n]: the last image of a content is to be painted."""
    learned: NDArray[np.integer]
    """[n]: text tokens to be learned, in content."""
    text_start: NDArray[np.integer]
    """[n + 1] into the two that follow."""
    text_tokens: NDArray[np.integer]
    """[T]"""
    text_group: NDArray[np.integer]
    """[T]: the language, or -1 where it is not among the configured ones."""

    def __len__(self) -> int:
        return len(self.is_pair)


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What the plan follows beside the sources."""

    seed: int
    sequence_length: int
    image_tokens: int
    packing: bool
    window: int
    """Documents planned at a time."""
    caption_dropout: float
    shuffle_block: int
    shuffle_pool: int


@dataclass(frozen=True, kw_only=True)
class Window:
    """The next documents of the stream, and the rows that they form."""

    source_D: NDArray[np.int64]
    number_D: NDArray[np.int64]
    epoch_D: NDArray[np.int64]
    task_D: NDArray[np.int64]
    text_D: NDArray[np.int64]
    length_D: NDArray[np.int64]
    images_D: NDArray[np.int64]
    labels_D: NDArray[np.int64]
    """Text tokens to be learned."""
    painted_D: NDArray[np.int64]
    """Images to be painted, 0 or 1."""
    cut_D: NDArray[np.int64]
    """1 where a document is too long, and loses its end."""
    rows: list[list[int]]
    """Of each row, its documents."""

    def plan(self, row: int) -> list[DocumentPlan]:
        """The documents of a row."""
        return [self._plans[d] for d in self.rows[row]]

    @cached_property
    def _plans(self) -> list[DocumentPlan]:
        columns = (self.source_D, self.number_D, self.epoch_D, self.task_D, self.text_D)
        return [
            DocumentPlan(source=source, number=number, epoch=epoch, task=_TASKS[task], text=text)
            for source, number, epoch, task, text in zip(*(column.tolist() for column in columns), strict=True)
        ]

    @cached_property
    def consumed(self) -> NDArray[np.int64]:
        """[rows + 1, 3]: documents, tokens and images of all rows before each."""
        order_D = np.fromiter(chain.from_iterable(self.rows), dtype=np.int64, count=len(self.source_D))
        of_document = np.stack([np.ones_like(order_D), self.length_D[order_D], self.images_D[order_D]], axis=1)
        before_D = np.concatenate([np.zeros((1, 3), dtype=np.int64), np.cumsum(of_document, axis=0)])
        return before_D[np.cumsum([0, *map(len, self.rows)])]


_COLUMNS = [f.name for f in fields(Window) if f.name not in ("source_D", "rows")]


class Planner:
    """Plans windows of the stream.

    Args:
        sources: at least one, of positive weight.
        settings: see there.

    Attributes:
        fingerprint: of all that decides on the rows of a window.
    """

    def __init__(self, sources: Sequence[SourceLengths], settings: PlanSettings) -> None:
        self.sources, self.settings = sources, settings
        self._seeds = [source_seed(settings.seed, source.name) for source in sources]
        self._orders: dict[tuple[int, int], ShuffledOrder] = {}
        decisive: list[Any] = [_VERSION, settings.seed, settings.window, settings.shuffle_block, settings.shuffle_pool]
        decisive += [(s.name, s.weight, s.fingerprint) for s in sources]
        if settings.packing:  # then it also matters how long documents are
            groups = [hashlib.sha256(s.text_group.tobytes()).hexdigest() for s in sources]
            decisive += [settings, [s.task_weights for s in sources], groups]
        self.fingerprint = hashlib.sha256(repr(decisive).encode()).hexdigest()[:16]

    def window(self, position: int, *, places: Mapping[str, int]) -> Window:
        """The documents from a position of the stream on, of which each source gave so many before."""
        weights = [source.weight for source in self.sources]
        positions_D = np.arange(position, position + self.settings.window)
        source_D = choose(low_discrepancy(positions_D, seed=self.settings.seed), weights=weights)
        columns = {name: np.zeros_like(source_D) for name in _COLUMNS}
        for s, source in enumerate(self.sources):
            mine = np.flatnonzero(source_D == s)
            first = places.get(source.name, 0)
            for name, values in self._documents(s, places=np.arange(first, first + len(mine))).items():
                columns[name][mine] = values
        if self.settings.packing:
            rows = pack(columns["length_D"], sequence_length=self.settings.sequence_length)
            # Packing sorts by length; a step shall have all lengths.
            order = np.argsort(uniforms(np.arange(len(rows)), seed=self.settings.seed, epochs_P=position, use=Use.ROWS))
            rows = [rows[i] for i in order.tolist()]
        else:
            rows = [[d] for d in range(len(source_D))]
        return Window(source_D=source_D, **columns, rows=rows)

    def places_after(self, window: Window, *, places: Mapping[str, int]) -> dict[str, int]:
        """How many documents each source gave before the window that follows; sources that are gone keep their place."""
        given = np.bincount(window.source_D, minlength=len(self.sources)).tolist()
        now = {source.name: places.get(source.name, 0) + count for source, count in zip(self.sources, given, strict=True)}
        return {**places, **now}

    def _documents(self, s: int, *, places: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The columns of a window for the documents at these places of a source."""
        source, settings, seed = self.sources[s], self.settings, self._seeds[s]
        epochs, within = np.divmod(places, len(source))
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            numbers[epochs == epoch] = self._order(s, epoch)(within[epochs == epoch])
        drawn = partial(uniforms, numbers, seed=seed, epochs_P=epochs)
        pair = source.is_pair[numbers]
        task = choose(low_discrepancy(places, seed=seed), weights=source.task_weights) if pair.any() else np.zeros_like(places)
        dropped = drawn(use=Use.DROPOUT) < settings.caption_dropout
        paints = np.where(pair, task == Task.TEXT_TO_IMAGE, source.paints[numbers])
        task = np.where(dropped & paints, Task.IMAGE_ONLY, np.where(pair, task, Task.CONTENT))

        text = _draw_texts(source, numbers, group_u=drawn(use=Use.LANGUAGE), u=drawn(use=Use.CAPTION))
        tokens = source.text_tokens[text].astype(np.int64)
        images = np.where(task == Task.CONTENT, source.images[numbers], 1)
        alone = settings.image_tokens + 4
        room = settings.sequence_length - alone
        told = task == Task.IMAGE_TO_TEXT
        text_length = np.minimum(tokens, room) - (told & (tokens > room))  # a text to be learned that is cut has no <eos>
        content = 1 + tokens + images * (settings.image_tokens + 2)
        kinds = [task == Task.CONTENT, task == Task.IMAGE_ONLY]
        length = np.select(kinds, [content, np.full_like(tokens, alone)], default=alone + text_length)
        cut = np.select(kinds, [content > settings.sequence_length, np.zeros_like(pair)], default=tokens > room)
        return {
            "number_D": numbers,
            "epoch_D": epochs,
            "task_D": task,
            "text_D": text - source.text_start[numbers].astype(np.int64),
            "length_D": np.minimum(length, settings.sequence_length),
            "images_D": images,
            "labels_D": np.select([task == Task.CONTENT, told], [source.learned[numbers], text_length + 1], default=0),
            "painted_D": np.where(task == Task.CONTENT, source.paints[numbers], ~told),
            "cut_D": cut,
        }

    def _order(self, s: int, epoch: int) -> ShuffledOrder:
        key = (s, epoch)
        if key not in self._orders:
            self._orders = {k: order for k, order in self._orders.items() if k[0] != s or k[1] == epoch - 1}
            size, settings = len(self.sources[s]), self.settings
            self._orders[key] = ShuffledOrder(
                size, seed=self._seeds[s], epoch=epoch, block=settings.shuffle_block, pool=settings.shuffle_pool
            )
        return self._orders[key]


def _draw_texts(
    source: SourceLengths, numbers: NDArray[np.int64], *, group_u: NDArray[np.float64], u: NDArray[np.float64]
) -> NDArray[np.int64]:
    """A text for each sample: one of its groups (languages), then a text in that, each equally likely; as an index into T."""
    starts = source.text_start[numbers].astype(np.int64)
    counts = source.text_start[numbers + 1].astype(np.int64) - starts
    sample = np.repeat(np.arange(len(numbers)), counts)
    text = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(starts, counts)
    group = source.text_group[text].astype(np.int64)
    allowed = group >= 0
    sample, text, group = sample[allowed], text[allowed], group[allowed]

    begins = np.flatnonzero(np.diff(sample, prepend=-1) | np.diff(group, prepend=-1))
    sizes = np.diff(begins, append=len(sample))
    groups_of = np.bincount(sample[begins], minlength=len(numbers))
    chosen = np.cumsum(groups_of) - groups_of + (group_u * groups_of).astype(np.int64)
    return text[begins[chosen] + (u * sizes[chosen]).astype(np.int64)]


class _Placed(NamedTuple):
    """A window, the state at its begin, and the number of its first row, counted from where the stream was entered."""

    first_row: int
    state: StreamState
    window: Window


class Stream:
    """Walks along the planned rows.

    Args:
        planner: see there.
        state: where to enter. If its window was planned by other settings, that window is begun anew under these, so
            that some of its documents come a second time and none is left out: `again` tells.

    Attributes:
        again: rows that the run had consumed of the window that is begun anew.
    """

    def __init__(self, planner: Planner, state: StreamState) -> None:
        self._planner = planner
        self.again = state.row if state.plan not in ("", planner.fingerprint) else 0
        state = replace(state, row=state.row - self.again, plan=planner.fingerprint)
        self._windows: deque[_Placed] = deque()
        self._append(-state.row, replace(state, row=0), entered_at=state.row)

    def _append(self, first_row: int, state: StreamState, *, entered_at: int = 0) -> None:
        window = self._planner.window(state.position, places=state.places)
        # The totals are those at the row where the stream was entered, not at the window's begin.
        state = state.plus(-window.consumed[entered_at])
        self._windows.append(_Placed(first_row, state, window))

    def rows(self, begin: int, end: int) -> Iterator[list[DocumentPlan]]:
        """The documents of rows, numbered from where the stream was entered."""
        for row in range(begin, end):
            placed = self._at(row)
            yield placed.window.plan(row - placed.first_row)

    def after(self, row: int) -> StreamState:
        """The state when all rows before this one are consumed."""
        placed = self._at(row)
        number = row - placed.first_row
        return placed.state.plus(placed.window.consumed[number], row=number)

    def forget(self, row: int) -> None:
        """Rows before this one are not asked for any more."""
        while len(self._windows) > 1 and self._windows[1].first_row <= row:
            self._windows.popleft()

    def _at(self, row: int) -> _Placed:
        while row >= (end := self._windows[-1].first_row + len(self._windows[-1].window.rows)):
            self._append(end, self._after_window(self._windows[-1]))
        return self._windows[bisect_right([placed.first_row for placed in self._windows], row) - 1]

    def _after_window(self, placed: _Placed) -> StreamState:
        """The state at the begin of the window that follows."""
        before, window = placed.state, placed.window
        return before.plus(
            window.consumed[-1],
            position=before.position + len(window.source_D),
            places=self._planner.places_after(window, places=before.places),
        )
