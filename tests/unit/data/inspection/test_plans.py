from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mmar_megatron.data.inspection.plans import gather_stream, lengths_around
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.stream import Stream, StreamState, Task
from tests.unit.data.inspection.conftest import SEQUENCE_LENGTH, SHAPES, TALKS

SEED = 3


def test_packing_is_that_of_the_stream(mix: DataSource) -> None:
    facts = gather_stream(mix, seed=SEED)
    chosen = facts.chosen
    stream = Stream(mix.planner(seed=SEED), StreamState())
    state = stream.after(chosen.rows)
    assert (state.documents, chosen.documents) == (mix.config.packing_window,) * 2
    assert chosen.used == pytest.approx(state.tokens / (chosen.rows * SEQUENCE_LENGTH), rel=1e-12)
    assert chosen.documents_per_row == state.documents / chosen.rows
    assert chosen.images_per_row == state.images / chosen.rows


def test_one_document_in_a_row(mix: DataSource) -> None:
    table = {(facts.sequence_length, facts.packing): facts for facts in gather_stream(mix, seed=SEED).table}
    assert set(table) == {(length, packing) for length in (128, 256, 512, 1024, 2048) for packing in (False, True)}
    for (length, packing), facts in table.items():
        assert facts.cut == table[length, not packing].cut
        if not packing:
            assert (facts.rows, facts.documents_per_row) == (facts.documents, 1.0)
            assert facts.used < table[length, True].used
    assert table[128, False].cut > 0  # two images do not fit
    assert table[2048, False].cut == 0


def test_shares(mix: DataSource) -> None:
    facts = gather_stream(mix, seed=SEED)
    assert [share.name for share in facts.sources] == [SHAPES, TALKS]
    assert [share.documents for share in facts.sources] == pytest.approx([0.25, 0.75], abs=0.01)
    window = mix.planner(seed=SEED).window(0, places={})
    tasks = {share.name: share for share in facts.tasks}
    assert set(tasks) == {task.name.lower() for task in Task}
    for task in Task:
        share, mine = tasks[task.name.lower()], window.task_D == task
        assert share.documents == mine.mean()
        assert share.positions == window.length_D[mine].sum() / window.length_D.sum()
        assert (share.images, share.labels) == (window.images_D[mine].sum(), window.labels_D[mine].sum())
        assert share.painted == window.painted_D[mine].sum()
    for shares in (facts.sources, facts.tasks):
        assert sum(share.documents for share in shares) == pytest.approx(1)
        assert sum(share.positions for share in shares) == pytest.approx(1)
        assert sum(share.images for share in shares) == int(np.sum(window.images_D))


def test_lengths_have_room_for_an_image() -> None:
    assert list(lengths_around(128, num_tokens=64)) == [128, 256, 512, 1024]
    assert list(lengths_around(138, num_tokens=64)) == [69, 138, 276, 552, 1104]


def test_unpacked_stream(mix: DataSource) -> None:
    single = DataSource(replace(mix.config, packing=False))
    assert gather_stream(single, seed=SEED).chosen.rows == single.config.packing_window
