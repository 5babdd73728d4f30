"""Work in a thread: what it tells, its errors, and its end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from mmar_megatron.demo.streaming import stream

SECONDS = 10


class Counting:
    """Tells 1, 2, 3 ...; knows how it ended."""

    def __init__(self, *, to: int) -> None:
        self.to, self.reached, self.left = to, 0, threading.Event()

    def __call__(self, tell: Callable[[int], None]) -> None:
        try:
            for number in range(1, self.to + 1):
                self.reached = number
                tell(number)
        finally:
            self.left.set()


def test_all_is_told_in_order() -> None:
    assert list(stream(Counting(to=100), stop=threading.Event())) == list(range(1, 101))


def test_it_is_told_while_work_goes_on() -> None:
    heard = threading.Event()

    def waits(tell: Callable[[str], None]) -> None:
        tell("begun")
        assert heard.wait(SECONDS)
        tell("done")

    told = []
    for something in stream(waits, stop=threading.Event()):
        told.append(something)
        heard.set()
    assert told == ["begun", "done"]


def test_errors_are_raised_where_it_is_heard() -> None:
    def fails(tell: Callable[[int], None]) -> None:
        tell(1)
        raise ValueError("unfit")

    told: list[int] = []
    with pytest.raises(ValueError, match="unfit"):
        told.extend(stream(fails, stop=threading.Event()))
    assert told == [1]


def test_stopped_it_is_left_with_what_it_told_last() -> None:
    stop, work = threading.Event(), Counting(to=10**9)
    told = []
    for number in stream(work, stop=stop):
        told.append(number)
        if number == 3:
            stop.set()
    assert told == list(range(1, work.reached + 1))
    assert work.left.is_set()


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_nobody_hears_it_any_more(how: str) -> None:
    work = Counting(to=10**9)
    heard = stream(work, stop=threading.Event())
    assert next(heard) == 1
    if how == "closed":
        heard.close()  # type: ignore[attr-defined]
    del heard
    assert work.left.wait(SECONDS)
    assert work.reached < 10**9
