"""What happens to a run, and when: drawn from a seed before anything starts.

Moments are steps of the run, and shares of the time that a start-up, a step or a save takes; never seconds. So a seed gives
nearly the same course of events on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Literal, TypeVar

from mmar_megatron.chaos.damage import KINDS, Kind

Action = Literal["kill", "SIGTERM", "SIGUSR1", "SIGTERM and kill"]
"""The last is what schedulers do to a run that takes too long to stop."""
Phase = Literal["start-up", "step", "save"]

# What is taken in turn, so that a short schedule has something of everything too.
KILLS: tuple[Phase, ...] = ("save", "step", "start-up", "save", "step")
SIGNALS: tuple[tuple[Action, Phase], ...] = (
    *(("SIGTERM", "step"), ("SIGUSR1", "save"), ("SIGTERM and kill", "step")),
    *(("SIGTERM", "save"), ("SIGUSR1", "step"), ("SIGTERM and kill", "step")),
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Event:
    """What ends a life of the run.

    No signal comes during start-up: until its handlers are there, one ends a process as it ends any.
    """

    action: Action
    phase: Phase
    step: int
    """The phase's first occurrence at this step or a later one; during start-up it means nothing."""
    rank: int | None
    """None: all ranks at once, with all that they started, as a scheduler does it."""
    delay: float
    """From the moment the phase is seen, as a share of how long it usually takes, in [0, 1). Between SIGTERM and kill, a share of
    how long a step and two saves take."""

    @property
    def kills(self) -> bool:
        """Whether it leaves no time to end in order."""
        return self.action in ("kill", "SIGTERM and kill")

    def __str__(self) -> str:
        whom = "all ranks" if self.rank is None else f"rank {self.rank}"
        when = (
            "during start-up" if self.phase == "start-up" else f"{'after' if self.phase == 'step' else 'saving'} step {self.step}"
        )
        return f"{self.action} {'of' if self.action == 'kill' else 'to'} {whom} {when}"


@dataclass(frozen=True, kw_only=True)
class LifePlan:
    """One start of the run, and what precedes and ends it."""

    event: Event | None
    """None: it may run to its last step."""
    damage: Kind | None
    """Done to the newest checkpoint before the start."""
    async_save: bool
    """How this life saves, which must not change what it computes."""


def draw_schedule(
    *, seed: int, kills: int, signals: int, damages: int, nproc: int, steps: int, save_every: int
) -> list[LifePlan]:
    """All lives of a trial; the last of them run to the end.

    Events spread over the run and leave enough of its end that none comes too late.

    Raises:
        ValueError: the run is too short.
    """
    last = steps - 2 * save_every  # a save follows each step up to here, and is not the final one
    if last < 1:
        raise ValueError(f"{steps} steps leave no room for events between saves: give at least {2 * save_every + 1}.")
    rng = Random(seed)
    what: list[tuple[Action, Phase]] = [*(("kill", phase) for phase in _in_turn(KILLS, kills)), *_in_turn(SIGNALS, signals)]
    alone = list(_in_turn((True, False, False), len(what)))  # fewer of one rank, for the others take seconds to give it up
    rng.shuffle(what)
    rng.shuffle(alone)
    events: list[Event | None] = [
        Event(action=action, phase=phase, step=step, rank=rng.randrange(nproc) if one else None, delay=rng.random())
        for (action, phase), one, step in zip(what, alone, sorted(rng.choices(range(1, last + 1), k=len(what))), strict=True)
    ]
    events += [None] * max(1, damages - len(events))
    kinds = list(_in_turn(KINDS, damages))
    rng.shuffle(kinds)
    before = dict(zip(sorted(rng.sample(range(1, len(events) + 1), damages)), kinds, strict=True))
    if len(events) in before:  # there is nothing to damage before the first life, so one slot lies behind the last event
        events.append(None)
    return [LifePlan(event=event, damage=before.get(index), async_save=rng.random() < 0.5) for index, event in enumerate(events)]


def _in_turn(values: Sequence[T], count: int) -> Iterator[T]:
    return islice(cycle(values), count)
