"""Stopping on request: a signal to any rank, and all of them stop after the same step."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch

from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.platform import STOP_SIGNALS

_ECHO_S = 3.0
"""SLURM signals all processes of a step, and torchrun, one of these, passes the signal on: that is one request, not two."""


class StopRequest:
    """Within this context the first of `STOP_SIGNALS` is noted, and a second one, if it is no echo, ends the process at once.

    Args:
        groups: process groups.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self._control = groups.control
        self._received, self._since = 0, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _ECHO_S:
            kill_helpers()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agreed(self) -> signal.Signals | None:
        """What any rank has received; all ranks call it together."""
        number = torch.tensor(self._received, dtype=torch.int32)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=self._control)
        return signal.Signals(int(number)) if number else None


def kill_helpers() -> None:
    """Of a process that ends without its usual way out: some of the children it has started would outlive it."""
    for child in multiprocessing.active_children():
        child.kill()


@contextmanager
def sheltered() -> Iterator[None]:
    """Processes started within never receive `STOP_SIGNALS`, which ask the trainer to stop: it waits for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
