"""Positions of image tokens."""

from __future__ import annotations

import math

import torch

from mmar_megatron.model.vision import PositionEmbedding2D


def test_positions_begin_as_sines_and_cosines_of_row_and_column() -> None:
    position_NV = PositionEmbedding2D(grid_height=3, grid_width=5, width=8, scale=0.5)().detach()
    assert position_NV.shape == (15, 8)
    for row in range(3):
        for column in range(5):
            of_row = [math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
            of_column = [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)]
            torch.testing.assert_close(position_NV[row * 5 + column], 0.5 * torch.tensor(of_row + of_column))


def test_an_odd_width_is_filled_and_every_position_differs() -> None:
    position_NV = PositionEmbedding2D(grid_height=4, grid_width=4, width=9, scale=1.0)().detach()
    assert position_NV.shape == (16, 9)
    distance_NN = torch.cdist(position_NV, position_NV) + torch.eye(16)
    assert distance_NN.min() > 0.1
