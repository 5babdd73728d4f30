"""Stopping on request: a signal to any rank, and all of them stop after the same step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import Any, Self

import torch

from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.platform import STOP_SIGNALS

_ECHO_S = 3.0
"""SLURM signals all processes of a step, and torchrun, one of these, passes the signal on: that is one request, not two."""
_SHELLS_BASE = 128
"""Shells report the end by a signal as 128 and its number, and so does a process that ends itself for one."""


class StopRequest:
    """Within this context the first of `STOP_SIGNALS` is noted, and a second one, if it is no echo, ends the process at once.

    A thread listens for it: Python runs handlers in the main thread alone, which may be waiting in a collective.

    Args:
        groups: process groups.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self._control = groups.control
        self._received, self._since = 0, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        self._mouth = mouth
        self._wakeup_before = signal.set_wakeup_fd(mouth.fileno())
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        Thread(target=self._listen, args=(ear,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._mouth.close()  # ends the thread

    def _listen(self, ear: socket.socket) -> None:
        with ear:
            while heard := ear.recv(1):
                if heard[0] not in STOP_SIGNALS:
                    continue
                if self._received and time.monotonic() - self._since > _ECHO_S:
                    kill_helpers()
                    os._exit(_SHELLS_BASE + heard[0])
                self._note(heard[0])

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        if not self._received:
            self._since, self._received = time.monotonic(), number

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
