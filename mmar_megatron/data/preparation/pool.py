"""Worker processes: one job, many tasks, results in the order of the tasks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
_job: Callable[..., Any] | None = None


def ordered(job: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, ahead: int = 2) -> Iterator[Result]:
    """Does the tasks, and yields the results in the tasks' order.

    Args:
        job: travels to each worker once.
        tasks: taken as they are needed.
        workers: processes; 0: this one does everything.
        ahead: so many tasks for each worker are begun before their results are asked for, which bounds the memory.

    Raises:
        ValueError: a worker died. What a job raises comes through.
    """
    if not workers:
        yield from map(job, tasks)
        return
    # Processes begin anew and do not fork: this one may have threads, and a device.
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(job, os.getpid()))
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(executor.submit(_do, task))
            if len(pending) >= ahead * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process died, perhaps for want of memory: start the same command again, which goes on from here, "
            "or with fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(job: Callable[..., Any], parent: int) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends them
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _do(task: Any) -> Any:
    assert _job is not None
    return _job(task)
