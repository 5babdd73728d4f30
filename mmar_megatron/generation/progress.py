"""How far a command is, on stderr: in one line that is rewritten on a terminal, else in a few lines a minute."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_ON_A_TERMINAL = 0.5


class Progress:
    """Tells pieces done and seconds left.

    Args:
        total: pieces of work, with those done before.
        done: of them done before.
        what: is done, as in "pictures".
    """

    def __init__(self, total: int, *, done: int, what: str) -> None:
        self._total, self._before, self._what = total, done, what
        self._live = sys.stderr.isatty()
        self._begin = time.monotonic()
        self._last = -float("inf") if self._live else self._begin

    def at(self, done: float) -> None:
        """So much is done now; a share of a piece counts for the seconds left."""
        now = time.monotonic()
        if now - self._last < (_SECONDS_ON_A_TERMINAL if self._live else _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        more = done - self._before
        left = f", {(now - self._begin) * (self._total - done) / more:,.0f} s left" if more else ""
        line = f"{int(done):,} of {self._total:,} {self._what}{left}"
        print(f"\r{line}\033[K" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clears the line of a terminal."""
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
