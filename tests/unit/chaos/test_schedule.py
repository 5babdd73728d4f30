"""The schedule of a trial: a function of its seed, with something of everything."""

from __future__ import annotations

from collections import Counter

import pytest

from mmar_megatron.chaos.damage import KINDS
from mmar_megatron.chaos.schedule import LifePlan, draw_schedule


def draw(*, seed: int = 0, kills: int = 100, signals: int = 10, damages: int = 20, steps: int = 400) -> list[LifePlan]:
    return draw_schedule(seed=seed, kills=kills, signals=signals, damages=damages, nproc=2, steps=steps, save_every=5)


def test_a_seed_is_a_schedule() -> None:
    assert draw(seed=3) == draw(seed=3)
    assert draw(seed=3) != draw(seed=4)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("kills", "signals", "damages"), [(100, 10, 20), (6, 2, 5), (1, 0, 1), (0, 0, 7)])
def test_all_that_was_asked_for(seed: int, kills: int, signals: int, damages: int) -> None:
    plans = draw(seed=seed, kills=kills, signals=signals, damages=damages)
    events = [plan.event for plan in plans if plan.event]
    assert Counter(event.action == "kill" for event in events) == Counter({True: kills, False: signals})
    assert len([plan for plan in plans if plan.damage]) == damages
    assert plans[0].damage is None, "before the first life there is no checkpoint"
    assert plans[-1].event is None, "the last life runs to the end"


def test_a_short_one_has_everything_too() -> None:
    plans = draw(kills=6, signals=3, damages=5, steps=60)
    events = [plan.event for plan in plans if plan.event]
    assert {event.phase for event in events if event.action == "kill"} == {"save", "step", "start-up"}
    assert {event.action for event in events} == {"kill", "SIGTERM", "SIGUSR1", "SIGTERM and kill"}
    assert {event.rank is None for event in events} == {True, False}
    assert {plan.damage for plan in plans if plan.damage} == set(KINDS)


def test_events_come_in_the_order_of_their_steps_and_not_too_late() -> None:
    steps = [plan.event.step for plan in draw() if plan.event]
    assert steps == sorted(steps)
    assert steps[0] >= 1
    assert steps[-1] <= 390, "two saves come after it"


def test_too_few_steps() -> None:
    with pytest.raises(ValueError, match="give at least 11"):
        draw(steps=10)
