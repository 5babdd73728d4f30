"""Work that tells how far it is, as something to iterate over, and to stop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Told = TypeVar("Told")


class _Stopped(BaseException):
    """Leaves the work from within; no `except Exception` on the way holds it up."""


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def stream(work: Callable[[Callable[[Told], None]], None], *, stop: threading.Event) -> Iterator[Told]:
    """What the work tells, while it goes on in a thread.

    It is left the next time it tells something after `stop` was set, or after the iterator was closed or dropped, which does not
    wait for it.

    Args:
        work: is given the function to tell by.
        stop: set from elsewhere to end the work.

    Raises:
        Whatever the work raises.
    """
    told: queue.SimpleQueue[Told | _End] = queue.SimpleQueue()
    dropped = threading.Event()

    def tell(something: Told) -> None:
        told.put(something)
        if stop.is_set() or dropped.is_set():
            raise _Stopped

    def run() -> None:
        try:
            work(tell)
        except _Stopped:
            told.put(_End(None))
        except BaseException as error:  # raised where the results are awaited
            told.put(_End(error))
        else:
            told.put(_End(None))

    threading.Thread(target=run).start()  # no daemon: torch aborts a process that ends while it is at work
    try:
        while not isinstance(something := told.get(), _End):
            yield something
        if something.error is not None:
            raise something.error
    finally:
        dropped.set()
