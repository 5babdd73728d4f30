"""What a comparison of two runs must not overlook."""

from __future__ import annotations

import pytest

from mmar_megatron.chaos.comparison import Row, differences


def rows() -> list[Row]:
    return [{"step": step, "loss": 1.0 / step, "mfu": None, "step_time_s": 0.1} for step in (1, 2, 3)]


def test_equal_but_for_the_clock() -> None:
    found = rows()
    found[1]["step_time_s"] = 0.2
    assert differences(rows(), found) == []


def test_a_changed_digit() -> None:
    found = rows()
    found[1]["loss"] = 0.5000000000000001
    assert differences(rows(), found) == ["step 2 has loss 0.5000000000000001 instead of 0.5"]


@pytest.mark.parametrize(
    ("order", "sentences"),
    [
        ([1, 3], ["step 2 is missing"]),
        ([1, 2], ["step 3 is missing"]),
        ([1, 2, 2, 3], ["step 2 stands there 2 times"]),
        ([1, 3, 2], ["step 2 comes after step 3"]),
        ([], ["step 1 is missing", "step 2 is missing", "step 3 is missing"]),
    ],
)
def test_steps_missing_doubled_or_out_of_order(order: list[int], sentences: list[str]) -> None:
    by_step = {row["step"]: row for row in rows()}
    assert differences(rows(), [by_step[step] for step in order]) == sentences


def test_a_step_too_many() -> None:
    assert differences(rows(), [*rows(), {"step": 4, "loss": 0.25}]) == ["step 4 is in this run alone"]


@pytest.mark.parametrize("absent_in_first", [True, False])
def test_a_column_that_only_one_has(absent_in_first: bool) -> None:
    whole = rows()
    whole[2]["val_loss_text"] = None
    one, two = (rows(), whole) if absent_in_first else (whole, rows())
    assert differences(one, two) == ["step 3 has val_loss_text None instead of None"]
