import itertools

import numpy as np
import pytest

from mmar_megatron.data.packing import pack


@pytest.mark.parametrize("seed", range(5))
def test_each_document_stands_once_in_a_row_that_holds_it(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 101, 500)
    rows = pack(lengths, sequence_length=100)
    assert sorted(itertools.chain(*rows)) == list(range(500))
    assert all(1 <= lengths[row].sum() <= 100 for row in rows)
    assert pack(lengths, sequence_length=100) == rows


def test_fullest_row_that_fits_is_taken() -> None:
    rows = pack(np.array([60, 50, 30, 40, 20]), sequence_length=100)
    assert sorted(map(sorted, rows)) == [[0, 3], [1, 2, 4]]


def test_it_is_near_the_fewest_possible() -> None:
    """Short documents fill what long ones leave."""
    lengths = np.concatenate([np.random.default_rng(0).integers(70, 100, 3000), np.random.default_rng(1).integers(5, 400, 1000)])
    rows = pack(lengths, sequence_length=512)
    assert lengths.sum() / (512 * len(rows)) > 0.97


def test_edges() -> None:
    assert pack(np.array([], dtype=np.int64), sequence_length=8) == []
    assert pack(np.array([8, 8]), sequence_length=8) == [[0], [1]]
