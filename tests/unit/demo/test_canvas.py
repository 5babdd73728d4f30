"""What is redrawn where this is marked, and how gaps look."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmar_megatron.demo.canvas import Canvas, with_gaps


def canvas_of(*drawn: int) -> Canvas:
    """Of 2 x 3 tokens."""
    drawn_N = np.zeros(6, dtype=np.bool_)
    drawn_N[list(drawn)] = True
    return Canvas(latents_NC=torch.zeros(6, 2), drawn_N=drawn_N, record={})


def test_marks_and_gaps_are_redrawn() -> None:
    assert np.flatnonzero(canvas_of(*range(6)).to_redraw([4, 1, 4])).tolist() == [1, 4]
    assert np.flatnonzero(canvas_of(0, 1, 5).to_redraw([0])).tolist() == [0, 2, 3, 4]
    assert np.flatnonzero(canvas_of(0, 1, 5).to_redraw([])).tolist() == [2, 3, 4]
    whole = canvas_of(*range(6))
    whole.to_redraw([3])
    assert whole.drawn_N.all()


@pytest.mark.parametrize("mark", [6, -1, "2", 1.0, True, None])
def test_marks_beside_the_picture(mark: Any) -> None:
    with pytest.raises(ValueError, match="is marked, but the picture has the tokens 0 to 5: clear the marks"):
        canvas_of(*range(6)).to_redraw([0, mark])


def test_nothing_to_redraw() -> None:
    with pytest.raises(ValueError, match="There is no picture to change yet"):
        canvas_of().to_redraw([1])
    with pytest.raises(ValueError, match="Nothing is marked"):
        canvas_of(*range(6)).to_redraw([])


def test_a_part_is_nothing_to_read() -> None:
    canvas_of(*range(6)).check_whole()
    with pytest.raises(ValueError, match="There is no whole picture"):
        canvas_of(0).check_whole()


@pytest.mark.parametrize("pixels", [1, 2, 4, 5])
def test_gaps_are_grey_squares_and_the_rest_is_as_it_was(pixels: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2 * pixels, 3 * pixels, 3), dtype=np.uint8)
    shown = with_gaps(picture, drawn_N=canvas_of(1, 3).drawn_N, grid=(2, 3))
    cells, before = (
        pixels_HW3.reshape(2, pixels, 3, pixels, 3).transpose(0, 2, 1, 3, 4).reshape(6, pixels, pixels, 3)
        for pixels_HW3 in (shown, picture)
    )
    np.testing.assert_array_equal(cells[[1, 3]], before[[1, 3]])
    assert set(cells[[0, 2, 4, 5]].flatten().tolist()) == {205, 235}
    if pixels > 1:  # each token has both greys
        assert all(set(cells[token].flatten().tolist()) == {205, 235} for token in (0, 2, 4, 5))
