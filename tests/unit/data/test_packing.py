"""Every document has its place, no sequence is too long, and few are needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from mmar_megatron.data.packing import best_fit, exact_fit, pack

RANDOM = np.random.default_rng(3)
PICTURES = RANDOM.integers(73, 99, 4096)
MIXED = np.where(RANDOM.random(4096) < 0.7, PICTURES, RANDOM.integers(20, 401, 4096))


@pytest.mark.parametrize("algorithm", [best_fit, exact_fit, pack])
@pytest.mark.parametrize("lengths_D", [PICTURES, MIXED, RANDOM.integers(1, 513, 1000), np.array([512]), np.array([256, 255])])
def test_each_document_is_in_one_row_which_it_fits(
    algorithm: Callable[..., list[list[int]]], lengths_D: NDArray[np.int64]
) -> None:
    rows = algorithm(lengths_D, sequence_length=512)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths_D)))
    assert max(lengths_D[row].sum() for row in rows) <= 512
    assert algorithm(lengths_D, sequence_length=512) == rows


def test_best_fit_puts_the_longest_first_and_each_where_least_is_left() -> None:
    assert best_fit(np.array([5, 3, 6, 2]), sequence_length=8) == [[2, 3], [0, 1]]


def test_exact_fit_is_left_aside_where_it_takes_more_rows() -> None:
    lengths_D = np.array([13, 9, 16, 16, 16, 17, 10, 16, 9])
    assert pack(lengths_D, sequence_length=31) == best_fit(lengths_D, sequence_length=31)
    assert len(exact_fit(lengths_D, sequence_length=31)) > len(best_fit(lengths_D, sequence_length=31))


def test_exact_fit_finds_two_and_three_that_fill_a_row() -> None:
    lengths_D = np.array([4, 4, 4, 3, 3, 3, 3, 3, 3])
    assert [lengths_D[row].tolist() for row in exact_fit(lengths_D, sequence_length=10)] == [[4, 3, 3]] * 3
    assert len(best_fit(lengths_D, sequence_length=10)) == 4


@pytest.mark.parametrize(("lengths_D", "share"), [(PICTURES, 0.96), (MIXED, 0.97)])
def test_few_positions_are_left_unused(lengths_D: NDArray[np.int64], share: float) -> None:
    rows = pack(lengths_D, sequence_length=512)
    assert lengths_D.sum() / (512 * len(rows)) >= share
    assert len(rows) <= len(best_fit(lengths_D, sequence_length=512))


def test_edges() -> None:
    assert pack(np.array([], dtype=np.int64), sequence_length=8) == []
    assert pack(np.array([8, 8]), sequence_length=8) == [[0], [1]]
