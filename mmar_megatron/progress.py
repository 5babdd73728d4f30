"""How far a command is: rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_ON_A_TERMINAL = 0.5


class Progress:
    """Says how far the work is, every few seconds; on a terminal in one line that is rewritten.

    Args:
        total: pieces of work, with those done before.
        done: of them done before.
        what: is done, as in "pictures looked at".
        log: takes the lines.
        terminal: takes them instead.
    """

    def __init__(
        self, total: int, *, done: int = 0, what: str, log: Callable[[str], None], terminal: TextIO | None = None
    ) -> None:
        self._total, self._done, self._before = total, float(done), done
        self._what, self._log, self._terminal = what, log, terminal
        self._begin = self._last = time.monotonic()

    @classmethod
    def on_stderr(cls, total: int, *, done: int = 0, what: str) -> Progress:
        """For a command whose results go to stdout."""
        terminal = sys.stderr if sys.stderr.isatty() else None
        return cls(total, done=done, what=what, log=lambda line: print(line, file=sys.stderr, flush=True), terminal=terminal)

    def add(self, count: float) -> None:
        """So many more are done."""
        self.at(self._done + count)

    def at(self, done: float) -> None:
        """So many are done now; a share of a piece counts for the rate."""
        self._done = done
        now = time.monotonic()
        if now - self._last < (_SECONDS_BETWEEN_LINES if self._terminal is None else _SECONDS_ON_A_TERMINAL):
            return
        self._last = now
        line = f"{int(done):,} of {self._total:,} {self._what}"
        if done > self._before:
            rate = (done - self._before) / (now - self._begin)
            pace = f"{rate:,.0f} a second" if rate >= 1 else f"{60 * rate:,.1f} a minute"
            line += f", {pace}, {_duration((self._total - done) / rate)} left"
        if self._terminal is None:
            self._log(line)
        else:
            print(f"\r{line}\033[K", end="", file=self._terminal, flush=True)

    def close(self) -> None:
        """Clears the line of a terminal."""
        if self._terminal is not None:
            print("\r\033[K", end="", file=self._terminal, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
