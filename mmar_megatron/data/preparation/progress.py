"""How far it is: rate and time left."""

from __future__ import annotations

import time
from collections.abc import Callable

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_ON_A_TERMINAL = 0.5


class Progress:
    """Says how far the work is, every few seconds; on a terminal in one line that is rewritten.

    Args:
        total: pieces of work, with those done before.
        done: of them done before.
        what: is done, as in "pictures looked at".
        log: takes the lines.
        live: whether they go to a terminal.
    """

    def __init__(self, total: int, *, done: int = 0, what: str, log: Callable[[str], None], live: bool) -> None:
        self._total, self._done, self._before = total, done, done
        self._what, self._log = what, log
        self._live = live
        self._begin = self._last = time.monotonic()

    def add(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._last < (_SECONDS_ON_A_TERMINAL if self._live else _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        rate = (self._done - self._before) / (now - self._begin)
        left = (self._total - self._done) / rate if rate else 0.0
        line = f"{self._done:,} of {self._total:,} {self._what}, {rate:,.0f} a second, {_duration(left)} left"
        if self._live:
            print(f"\r{line}\033[K", end="", flush=True)
        else:
            self._log(line)

    def close(self) -> None:
        """Clears the line of a terminal."""
        if self._live:
            print("\r\033[K", end="", flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
