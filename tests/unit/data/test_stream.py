"""The plan of the training stream, on made-up sources."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mmar_megatron.data.stream import DocumentPlan, Planner, PlanSettings, SourceLengths, Stream, StreamState, Task

SETTINGS = PlanSettings(
    seed=1,
    sequence_length=200,
    image_tokens=16,
    packing=True,
    window=64,
    caption_dropout=0.1,
    shuffle_block=8,
    shuffle_pool=32,
)


def pairs(name: str = "pairs", *, size: int = 70, weight: float = 1.0, **changes: Any) -> SourceLengths:
    """Pictures with one to three captions in each of two languages, of 1 to 60 tokens."""
    generator = np.random.default_rng(size)
    counts = generator.integers(1, 4, (size, 2))
    starts = np.concatenate([[0], np.cumsum(counts.sum(axis=1))])
    source = SourceLengths(
        name=name,
        weight=weight,
        task_weights=(0.5, 0.5, 0.0),
        fingerprint=name,
        is_pair=np.full(size, True),
        images=np.full(size, 1),
        paints=np.full(size, False),
        learned=np.zeros(size, dtype=int),
        text_start=starts,
        text_tokens=generator.integers(1, 60, starts[-1]),
        text_group=np.repeat(np.tile([0, 1], size), counts.flatten()),
    )
    return replace(source, **changes)


def texts(name: str = "texts", *, size: int = 30, weight: float = 1.0) -> SourceLengths:
    """Texts of 1 to 250 tokens, every fifth with two images, of which the second is to be painted."""
    tokens = np.random.default_rng(size).integers(1, 250, size)
    fifth = np.arange(size) % 5 == 0
    return SourceLengths(
        name=name,
        weight=weight,
        task_weights=(0.5, 0.5, 0.0),
        fingerprint=name,
        is_pair=np.full(size, False),
        images=np.where(fifth, 2, 0),
        paints=fifth,
        learned=tokens // 2,
        text_start=np.arange(size + 1),
        text_tokens=tokens,
        text_group=np.full(size, 255),
    )


def planner(*sources: SourceLengths, **settings: Any) -> Planner:
    return Planner(sources or (pairs(), texts()), replace(SETTINGS, **settings))


def documents(of: Planner, rows: int, state: StreamState | None = None) -> list[list[DocumentPlan]]:
    return list(Stream(of, state or StreamState()).rows(0, rows))


@pytest.mark.parametrize("packing", [False, True])
def test_each_source_gives_each_sample_once_an_epoch_in_its_share(packing: bool) -> None:
    of = planner(pairs(weight=3), texts(weight=1), packing=packing)
    flat = [plan for row in documents(of, 400) for plan in row]
    assert len(flat) == 400 if not packing else len(flat) > 400
    given = Counter(plan.source for plan in flat)
    assert given[0] / len(flat) == pytest.approx(0.75, abs=0.02)
    # A packed row may come before the rows of earlier documents of its window; within whole windows all is even.
    whole = [plan for row in documents(of, len(Stream(of, StreamState())._windows[0].window.rows)) for plan in row]
    assert Counter(plan.source for plan in whole)[0] == pytest.approx(48, abs=2)
    for source, size in ((0, 70), (1, 30)):
        per_epoch = Counter((plan.epoch, plan.number) for plan in flat if plan.source == source)
        assert max(per_epoch.values()) == 1
        complete = [epoch for epoch in range(4) if sum(e == epoch for e, _ in per_epoch) == size]
        assert complete[:1] == [0]


def test_orders_of_epochs_differ() -> None:
    of = planner(pairs(), packing=False)
    flat = [row[0] for row in documents(of, 140)]
    first, second = ([plan.number for plan in flat if plan.epoch == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(70))
    assert first != second


def test_up_sampling_repeats_the_small_source() -> None:
    of = planner(pairs(size=1000, weight=0.5), texts(size=10, weight=0.5), packing=False)
    epochs = [row[0].epoch for row in documents(of, 200) if row[0].source == 1]
    assert max(epochs) == pytest.approx(len(epochs) / 10, abs=1)
    assert epochs == sorted(epochs)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("entered", [0, 1, 23, 64, 100])
def test_a_stream_entered_anywhere_goes_on_as_if_never_left(packing: bool, entered: int) -> None:
    of = planner(packing=packing)
    whole = Stream(of, StreamState())
    expected = list(whole.rows(entered, entered + 150))
    state = Stream(of, StreamState()).after(entered)
    again = Stream(of, state)
    assert again.again == 0
    assert list(again.rows(0, 150)) == expected
    assert again.after(90) == Stream(of, StreamState()).after(entered + 90)
    # Left and entered a second time, in the midst of a window again.
    third = Stream(of, again.after(7))
    assert list(third.rows(0, 143)) == expected[7:]


def test_the_state_counts_what_was_consumed() -> None:
    of = planner()
    stream = Stream(of, StreamState())
    rows = list(stream.rows(0, 60))
    window = stream._windows[0].window
    state = stream.after(10)
    assert state.documents == sum(map(len, rows[:10]))
    assert state.tokens == sum(int(window.length_D[window.rows[i]].sum()) for i in range(10))
    later = stream.after(60)
    assert later.documents == sum(map(len, rows))
    assert sum(later.places.values()) == later.position == 64 * (later.position // 64)
    counts = [stream.after(n) for n in range(60)]
    assert all(a.documents < b.documents and a.tokens < b.tokens and a.images <= b.images for a, b in pairwise(counts))


def test_forgotten_windows_leave_the_rest_as_it_was() -> None:
    of = planner()
    stream, other = Stream(of, StreamState()), Stream(of, StreamState())
    for row in range(0, 120, 5):
        assert list(stream.rows(row, row + 5)) == list(other.rows(row, row + 5))
        stream.forget(row)
    assert len(stream._windows) < len(other._windows)


def test_lengths_are_those_of_the_tasks() -> None:
    of = planner(pairs(), texts(), caption_dropout=0.3)
    window = of.window(0, places={})
    for d in range(64):
        source = of.sources[window.source_D[d]]
        number, task = window.number_D[d], Task(window.task_D[d])
        tokens = source.text_tokens[source.text_start[number] + window.text_D[d]]
        expected = {
            Task.TEXT_TO_IMAGE: 20 + tokens,
            Task.IMAGE_TO_TEXT: 20 + tokens,
            Task.IMAGE_ONLY: 20,
            Task.CONTENT: min(200, 1 + tokens + 18 * source.images[number]),
        }
        assert window.length_D[d] == expected[task]
        assert window.cut_D[d] == (task is Task.CONTENT and 1 + tokens + 18 * source.images[number] > 200)
        assert window.images_D[d] == (source.images[number] if task is Task.CONTENT else 1)
    assert {Task(task) for task in window.task_D} == set(Task)
    assert all(window.length_D[row].sum() <= 200 for row in window.rows)


def test_captions_are_drawn_evenly_from_languages_and_anew_in_each_epoch() -> None:
    source = pairs(size=400)
    of = planner(source, window=400, packing=False)
    first, second = of.window(0, places={}), of.window(400, places={"pairs": 400})
    group = source.text_group[source.text_start[first.number_D] + first.text_D]
    assert group.mean() == pytest.approx(0.5, abs=0.1)
    text_of = [dict(zip(w.number_D.tolist(), w.text_D.tolist(), strict=True)) for w in (first, second)]
    assert sum(text_of[0][n] != text_of[1][n] for n in range(400)) > 200

    chinese = planner(pairs(size=400, text_group=np.where(source.text_group == 1, 1, -1)), window=400)
    window = chinese.window(0, places={})
    assert set(source.text_group[source.text_start[window.number_D] + window.text_D]) == {1}


def test_other_weights_keep_each_sources_place() -> None:
    before = planner(pairs(weight=1), texts(weight=1), packing=False)
    state = Stream(before, StreamState()).after(64)
    after = planner(pairs(weight=1), texts(weight=9), packing=False)
    stream = Stream(after, state)
    assert stream.again == 0
    rows = [row[0] for row in stream.rows(0, 64)]
    expected = {source: state.places[name] for source, name in enumerate(("pairs", "texts"))}
    for source, size in ((0, 70), (1, 30)):
        first = next(plan for plan in rows if plan.source == source)
        assert first.epoch == expected[source] // size
    assert Counter(plan.source for plan in rows)[1] > 50


def test_changed_settings_begin_the_window_anew_and_say_so() -> None:
    before = planner()
    state = Stream(before, StreamState()).after(5)
    stream = Stream(planner(sequence_length=150), state)
    assert stream.again == 5
    assert stream.after(0).documents == state.documents
    assert stream.after(0).position == state.position
    assert list(stream.rows(0, 20)) == documents(planner(sequence_length=150), 20)
    # Unpacked, the length of rows does not decide on the order.
    state = Stream(planner(packing=False), StreamState()).after(5)
    assert Stream(planner(packing=False, sequence_length=150), state).again == 0


def test_a_source_that_was_added_begins_at_its_begin() -> None:
    state = Stream(planner(pairs(), packing=False), StreamState()).after(64)
    stream = Stream(planner(pairs(), texts(), packing=False), state)
    assert stream.again == 0
    flat = [row[0] for row in stream.rows(0, 64)]
    assert next(plan for plan in flat if plan.source == 1).epoch == 0
    assert stream.after(64).places["texts"] == Counter(plan.source for plan in flat)[1]


def test_a_source_that_is_gone_keeps_its_place() -> None:
    before = Stream(planner(packing=False), StreamState()).after(64)
    without = Stream(planner(pairs(), packing=False), before).after(64)
    assert without.places["texts"] == before.places["texts"] > 0


def test_a_text_to_be_learned_that_is_cut_has_no_end() -> None:
    window = planner(pairs(), sequence_length=50, caption_dropout=0).window(0, places={})
    told, cut = window.task_D == Task.IMAGE_TO_TEXT, window.cut_D == 1
    assert set(window.length_D[cut & told]) == {49}
    assert set(window.length_D[cut & ~told]) == {50}
    np.testing.assert_array_equal(window.labels_D[told], window.length_D[told] - 20 + 1)
    assert set(window.labels_D[~told]) == {0}


def test_pairs_are_painted_or_told() -> None:
    window = planner(pairs(), caption_dropout=0.3).window(0, places={})
    np.testing.assert_array_equal(window.painted_D, window.task_D != Task.IMAGE_TO_TEXT)


def test_captions_to_be_learned_are_not_dropped() -> None:
    window = planner(pairs(task_weights=(0.0, 1.0, 0.0)), caption_dropout=1.0).window(0, places={})
    assert set(window.task_D) == {Task.IMAGE_TO_TEXT}


def test_captions_are_dropped_anew_in_each_epoch() -> None:
    of = planner(pairs(task_weights=(1.0, 0.0, 0.0)), window=70, caption_dropout=0.5)
    windows = [of.window(70 * epoch, places={"pairs": 70 * epoch}) for epoch in range(2)]
    first, second = (window.task_D[np.argsort(window.number_D)] for window in windows)
    assert 10 < (first != second).sum() < 60


def test_each_caption_is_drawn_as_often() -> None:
    size = 4000
    two_in_two = pairs(
        size=size,
        text_start=np.arange(0, 4 * size + 1, 4),
        text_tokens=np.ones(4 * size, dtype=int),
        text_group=np.tile([0, 0, 1, 1], size),
    )
    window = planner(two_in_two, window=size).window(0, places={})
    np.testing.assert_allclose(np.bincount(window.text_D, minlength=4) / size, 0.25, atol=0.03)


def test_sources_do_not_give_their_tasks_in_step() -> None:
    window = planner(pairs("one"), pairs("other"), window=128, caption_dropout=0).window(0, places={})
    one, other = (window.task_D[window.source_D == source][:60].tolist() for source in range(2))
    assert one != other


def test_packed_rows_come_in_another_order_in_each_window() -> None:
    of = planner(pairs(text_tokens=np.full(1000, 10)), caption_dropout=0)
    first, second = of.window(0, places={}).rows, of.window(64, places={"pairs": 64}).rows
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize(
    "changed",
    [planner(pairs(fingerprint="anew"), texts()), planner(pairs(task_weights=(1.0, 0.0, 0.0)), texts())],
    ids=["data", "tasks"],
)
def test_what_decides_on_rows_is_in_the_fingerprint(changed: Planner) -> None:
    assert changed.fingerprint != planner().fingerprint


@pytest.mark.parametrize("changes", [{"seed": 2}, {"window": 32}, {"shuffle_block": 16}, {"shuffle_pool": 64}], ids=str)
def test_unpacked_rows_too_are_told_by_the_settings_of_their_order(changes: dict[str, int]) -> None:
    assert planner(packing=False, **changes).fingerprint != planner(packing=False).fingerprint
