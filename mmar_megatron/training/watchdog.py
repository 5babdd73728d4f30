"""When one rank fails or hangs, all of them end within seconds, and each says why.

Ranks that wait in a collective for a lost one would else wait for ever, or fail with a message about sockets. So a thread of each
rank looks into the job's key-value store, which needs no collective, once a second. What is in there:

    failure      the first one: "rank 3: BadDataError: ..."
    seen/RANK    this rank knows of it, so it is alive, and about to end; what it was about when it learned of it
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from contextlib import suppress
from textwrap import shorten
from types import TracebackType
from typing import NoReturn, Self

import torch
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training.signals import kill_helpers

_POLL_S = 1.0
_PATIENCE_S = 5.0
"""For the others to learn of a failure. A rank whose thread is still silent then is dead, or as good as dead."""
_GRACE_S = 3.0
"""For the failed rank to end before those that follow it: launchers name the first to end as the cause."""
_MARGIN_S = 30.0
"""After which a hanging process is ended even if it lets no Python thread run."""
_STORE_IS_GONE = "the job's store is gone, and so is the process that kept it: torchrun on the first machine, or else rank 0"
_NAMED_RANKS = 8
_STDERR = 2


class RanksLost(Exception):
    """This rank failed and others are gone: most likely it failed because of them."""


class Watchdog:
    """Ends this process when another rank has failed, and all processes when this one fails or hangs.

    It is a context manager around everything that ranks do together. An exception that leaves the context is made known to the
    other ranks, which print it as their error and end with status 1.

    Args:
        hang_timeout_s: seconds without a `beat` after which this rank is taken to hang; 0: it may take for ever.
        groups: process groups.

    Raises:
        RanksLost: at the end of the context, in place of an exception, where other ranks are gone.
    """

    def __init__(self, *, hang_timeout_s: float, groups: ParallelGroups) -> None:
        self._limit_s = hang_timeout_s
        self._control = groups.control
        self._rank, self._ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # A connection of its own, for the main thread may be waiting on the other one.
        self._store = PrefixStore("watchdog", _get_default_store().clone())  # type: ignore[attr-defined]
        self._last_beat = (time.monotonic(), "")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, phase: str) -> None:
        """Say that this rank goes on, and with what. Takes some 40 us."""
        self._last_beat = (time.monotonic(), phase)
        if self._limit_s:
            # Of C, for a Python thread does not run while the main one keeps the interpreter's lock.
            faulthandler.dump_traceback_later(self._limit_s + _MARGIN_S, exit=True, file=_STDERR)

    def __enter__(self) -> Self:
        self.beat("building the model")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            torch.distributed.barrier(group=self._control)  # until here another rank may fail, at the very end of its work
        self._done.set()
        self._thread.join()  # for ever, where it is ending this process
        if error is None:
            # Who keeps the store may leave only when nobody looks into it any more.
            torch.distributed.barrier(group=self._control)
            faulthandler.cancel_dump_traceback_later()
            return
        # A failed process must end, whatever its threads and libraries do on the way out.
        faulthandler.dump_traceback_later(_MARGIN_S, exit=True, file=_STDERR)
        own = f"rank {self._rank}: {describe(error)}"
        if lost := self._tell(own):
            traceback.print_exception(error)
            raise RanksLost(f"{lost}; {own}") from error

    def _tell(self, failure: str) -> str | None:
        """Make a failure known, and wait until the others know. Returns which of them are gone, in words; None if none is."""
        try:
            first = self._store.compare_set("failure", "", failure).decode()
            if first != failure:
                self._follow(first)  # it came before, and most likely brought this one about
            self._store.set(f"seen/{self._rank}", self._last_beat[1])
            end = time.monotonic() + _PATIENCE_S
            while (missing := self._missing()) and time.monotonic() < end:
                time.sleep(_POLL_S / 10)
        except RuntimeError:  # torch's, of a lost connection
            return _STORE_IS_GONE
        return f"no sign of life from {_ranks(missing)}" if missing else None

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._ranks) if not self._store.check([f"seen/{rank}"])]

    # --- the thread -------------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._done.wait(_POLL_S):
            try:
                failure = self._store.get("failure").decode() if self._store.check(["failure"]) else None
            except RuntimeError:
                failure = _STORE_IS_GONE
            if failure is not None:
                self._follow(failure)
            if 0 < self._limit_s < self._silence_s():
                self._hang()

    def _silence_s(self) -> float:
        return time.monotonic() - self._last_beat[0]

    def _follow(self, failure: str) -> NoReturn:
        """End this process after another one."""
        with suppress(RuntimeError):
            self._store.set(f"seen/{self._rank}", self._last_beat[1])
        if 0 < self._limit_s / 2 < self._silence_s():
            self._show_where()  # either this rank waited for the one that hung, or the reverse
        print(f"error: {failure}", file=sys.stderr, flush=True)
        time.sleep(_GRACE_S)
        _exit()

    def _hang(self) -> NoReturn:
        self._show_where()
        failure = f"rank {self._rank} makes no progress, for {self._silence_s():.0f} s in {self._last_beat[1]}"
        lost = self._tell(failure)
        print("error: " + "; ".join(filter(None, (failure, lost, self._places()))), file=sys.stderr, flush=True)
        _exit()

    def _places(self) -> str:
        """What the living ranks are about, the fewest first: most wait in a collective, and a few keep them waiting."""
        places = defaultdict(list)
        with suppress(RuntimeError):
            for rank in set(range(self._ranks)).difference(self._missing()):
                places[self._store.get(f"seen/{rank}").decode()].append(rank)
        groups = sorted(places.items(), key=lambda place: len(place[1]))
        return "; ".join(f"{_ranks(ranks)} in {phase}" for phase, ranks in groups)

    def _show_where(self) -> None:
        seconds, phase = self._silence_s(), self._last_beat[1]
        print(f"rank {self._rank} has spent {seconds:.0f} s in {phase}; its threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=_STDERR)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return shorten(f"{type(error).__name__}: {error}", width=500, placeholder=" ...")


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _NAMED_RANKS} more" if len(ranks) > _NAMED_RANKS else ""
    return f"rank {', '.join(map(str, ranks[:_NAMED_RANKS]))}{more}"


def _exit() -> NoReturn:
    """End this process from any thread."""
    kill_helpers()
    os._exit(1)
