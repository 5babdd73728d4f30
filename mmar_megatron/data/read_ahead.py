"""Fetches announced ranges in background threads before they are read.

    announce([...])   neighbouring ranges of a file become one block, which is one request; blocks wait in their order
    threads           fetch them, as long as blocks fetched and not yet read take no more than `most_bytes`
    take(range)       waits for a block that is under way, fetches one that has not begun itself, and forgets it when all is read

What was announced and is never read gives way, the oldest first: when a reader has to fetch for itself, and, where there is no
room for more, when what is being read was announced two calls later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Literal

Range = tuple[str, int, int]
"""(name, offset, size)"""

_MOST_RANGES = 100_000
"""Announced and not yet read; what was announced before is forgotten."""


@dataclass(eq=False, kw_only=True)
class _Block:
    """One request, for one or several ranges of a file."""

    name: str
    start: int
    end: int
    call: int = 0
    """Which call announced it."""
    unread: set[Range] = field(default_factory=set)
    state: Literal["waiting", "running", "done"] = "waiting"
    content: bytes = b""
    error: Exception | None = None

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class ReadAheadLimits:
    """Of one process."""

    threads: int = 16
    """Requests at a time."""
    most_bytes: int = 64 * 2**20
    """Fetched or under way and not yet read; one block may take more, and so may what readers fetch for themselves."""
    join_gap: int = 256 * 2**10
    """Ranges no further apart than so many bytes become one request, which fetches the gap too."""
    join_bytes: int = 8 * 2**20
    """No request gets larger by joining."""


class ReadAhead:
    """See the top of the file.

    Args:
        fetch: (name, start, end) -> bytes.
        limits: see there.
    """

    def __init__(self, fetch: Callable[[str, int, int], bytes], *, limits: ReadAheadLimits) -> None:
        self._fetch = fetch
        self._limits = limits
        self._changed = Condition()
        self._of_range: dict[Range, _Block] = {}
        self._waiting: dict[_Block, None] = {}
        self._done: dict[_Block, None] = {}
        self._held_bytes = 0  # of blocks that are running or done
        self._started = 0
        self._calls = 0
        self._reached = 0  # the last call of whose ranges one was read
        self._closed = False

    def announce(self, ranges: Iterable[Range]) -> None:
        """Ranges that are going to be read, about in this order."""
        with self._changed:
            self._calls += 1
            wanted = [r for r in dict.fromkeys(ranges) if r[2] > 0 and r not in self._of_range]
            for block in join(wanted, gap=self._limits.join_gap, most_bytes=self._limits.join_bytes):
                block.call = self._calls
                self._waiting[block] = None
                self._of_range |= dict.fromkeys(block.unread, block)
            while len(self._of_range) > _MOST_RANGES and (self._done or self._waiting):
                self._forget(next(iter(self._done or self._waiting)))
            while self._started < min(self._limits.threads, len(self._waiting)) and not self._closed:
                self._started += 1
                Thread(target=self._run, name=f"read-ahead-{self._started}", daemon=True).start()
            self._changed.notify_all()

    def take(self, name: str, offset: int, size: int) -> bytes | None:
        """The bytes of a range; None where it was not announced, or is forgotten.

        Raises whatever the request raised.
        """
        wanted = (name, offset, size)
        with self._changed:
            block = self._of_range.pop(wanted, None)
            if block is None:
                return None
            self._reached = max(self._reached, block.call)
            mine = block.state == "waiting"
            if mine:
                self._begin(block)
                while self._held_bytes > self._limits.most_bytes and self._done:
                    self._forget(next(iter(self._done)))
        if mine:
            self._finish(block)
        with self._changed:
            self._changed.wait_for(lambda: block.state == "done" or self._closed)
            if block.state != "done":
                return None
            block.unread.discard(wanted)
            if not block.unread or block.error:
                self._forget(block)
        if block.error:
            raise block.error
        return block.content[offset - block.start : offset - block.start + size]

    def close(self) -> None:
        """Ends the threads, after the request that each may be at."""
        with self._changed:
            self._closed = True
            self._of_range.clear()
            self._waiting.clear()
            self._done.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                block = self._next()
                if self._closed or block is None:
                    return
                self._begin(block)
            self._finish(block)

    def _next(self) -> _Block | None:
        """The first block that waits, if there is room for it."""
        block = next(iter(self._waiting), None)
        if block is None:
            return None
        while self._held_bytes and self._held_bytes + block.size > self._limits.most_bytes:
            oldest = next(iter(self._done), None)
            if oldest is None or oldest.call + 2 > self._reached:
                return None
            self._forget(oldest)
        return block

    def _begin(self, block: _Block) -> None:
        del self._waiting[block]
        block.state = "running"
        self._held_bytes += block.size

    def _finish(self, block: _Block) -> None:
        try:
            block.content = self._fetch(block.name, block.start, block.end)
        except Exception as error:
            block.error = error
        with self._changed:
            block.state = "done"
            self._done[block] = None
            self._changed.notify_all()

    def _forget(self, block: _Block) -> None:
        """Whoever waits for it still has it."""
        for unread in block.unread:
            if self._of_range.get(unread) is block:
                del self._of_range[unread]
        self._waiting.pop(block, None)
        if block in self._done:
            del self._done[block]
            self._held_bytes -= block.size
            self._changed.notify_all()


def join(ranges: list[Range], *, gap: int, most_bytes: int) -> list[_Block]:
    """Blocks in the order in which the first range of each comes in the list."""
    blocks: list[_Block] = []
    of_range: dict[Range, _Block] = {}
    for name, offset, size in sorted(ranges):
        end = offset + size
        last = blocks[-1] if blocks else None
        if last and last.name == name and offset <= last.end + gap and max(end, last.end) - last.start <= most_bytes:
            last.end = max(end, last.end)
        else:
            blocks.append(last := _Block(name=name, start=offset, end=end))
        last.unread.add((name, offset, size))
        of_range[name, offset, size] = last
    return list(dict.fromkeys(of_range[wanted] for wanted in ranges))
