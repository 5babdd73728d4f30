import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmar_megatron.data.preparation.pool import ordered

ROOT = Path(__file__).resolve().parents[3]


def square(number: int) -> int:
    time.sleep(0.01 * (number % 3))
    return number**2


def die(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


def fail(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_tasks_are_taken_as_needed(workers: int) -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(30):
            taken.append(number)
            yield number

    for count, result in enumerate(ordered(square, tasks(), workers=workers)):
        assert result == count**2
        assert len(taken) <= count + 1 + 2 * workers
    assert count == 29


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_job_raises_comes_through(workers: int) -> None:
    with pytest.raises(ValueError, match="three"):
        list(ordered(fail, range(10), workers=workers))


def test_a_worker_that_dies_ends_the_work() -> None:
    with pytest.raises(ValueError, match=r"a worker process died, perhaps for want of memory: start the same command again"):
        list(ordered(die, range(10), workers=2))


KILLED = """
import os, time
from mmar_megatron.data.preparation.pool import ordered
def job(number):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece: the workers share the pipe
    time.sleep(60)
if __name__ == "__main__":
    list(ordered(job, range(4), workers=2))
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "killed.py")], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
