"""What has become of a run, from its files alone: nothing is known that a process which is killed could take along.

`attempts.jsonl` in the run's directory has a line for the beginning of each attempt and one for its end. Who trains holds the
lock of `run.lock`, and so does every process that inherits it: a training whose starter was killed still holds it. Whether a run
is done is read from what the trainer itself wrote.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmar_megatron.training.manifest import MANIFEST
from mmar_megatron.training.metrics import read_metrics

ATTEMPTS = "attempts.jsonl"
LOCK = "run.lock"
LOG = "log.txt"

Condition = Literal["waiting", "running", "stopped", "failed", "done"]
"""`waiting`: not begun, or failed with retries left. `stopped`: asked to, or killed with its starter; it goes on with the next
`run`."""

_LOCK_WAIT_S = 2.0
"""Longer than anyone holds a lock just to see whether it is free."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What its files say of a run."""

    condition: Condition
    step: int
    """Last one that was logged."""
    attempts: int
    failures: int
    """In a row, without a checkpoint between them."""
    status: int | None
    """Exit status of the last attempt that ended; -N: by signal N."""
    host: str | None
    """Where it was last started."""
    pid: int | None
    """Of the process that did, which passes signals on to the training."""
    metrics: list[dict[str, Any]]


def read_state(run_dir: Path, *, steps: int, retries: int) -> RunState:
    """Of a run of so many steps.

    Raises:
        ValueError: a line of its metrics or attempts, but for a torn last one, makes no sense.
    """
    lines = _lines(run_dir)
    metrics = read_metrics(run_dir)
    failed = _failures(lines)
    begun, ended = _last(lines, "begin"), _last(lines, "end")
    condition: Condition = "waiting"
    if is_held(run_dir):
        condition = "running"
    elif is_done(run_dir, steps=steps):
        condition = "done"
    elif failed > retries:
        condition = "failed"
    elif lines and (lines[-1]["event"] == "begin" or (lines[-1]["event"] == "end" and not _is_failure(lines[-1]))):
        condition = "stopped"
    return RunState(
        condition=condition,
        step=metrics[-1]["step"] if metrics else 0,
        attempts=sum(line["event"] == "begin" for line in lines),
        failures=failed,
        status=ended["status"] if ended else None,
        host=begun["host"] if begun else None,
        pid=begun["pid"] if begun else None,
        metrics=metrics,
    )


def is_done(run_dir: Path, *, steps: int) -> bool:
    """Whether the last step was logged and its checkpoint is complete."""
    metrics = read_metrics(run_dir)
    return bool(metrics) and metrics[-1]["step"] >= steps and checkpoint_step(run_dir) >= steps


def has_begun(run_dir: Path) -> bool:
    """Whether it was ever started."""
    return (run_dir / ATTEMPTS).exists() or bool(read_metrics(run_dir))


def checkpoint_step(run_dir: Path) -> int:
    """Of the newest complete checkpoint; 0: there is none."""
    steps = [
        int(found[1])
        for path in (run_dir / "checkpoints").glob(f"step_*/{MANIFEST}")
        if (found := re.fullmatch(r"step_(\d{8})", path.parent.name))
    ]
    return max(steps, default=0)


def log_tail(run_dir: Path, *, lines: int) -> list[str]:
    """The last lines of what a run printed."""
    path = run_dir / LOG
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200 * (lines + 1)))
        return file.read().decode(errors="replace").splitlines()[-lines:]


# --- attempts -------------------------------------------------------------------------------------------------------------------


def begin(run_dir: Path) -> None:
    """An attempt begins."""
    _append(run_dir, {"event": "begin", "at": time.time(), "host": socket.gethostname(), "pid": os.getpid()})


def end(run_dir: Path, *, status: int, asked: bool) -> None:
    """It has ended.

    Args:
        status: exit status; -N: by signal N.
        asked: whether it was told to stop.
    """
    _append(run_dir, {"event": "end", "at": time.time(), "status": status, "asked": asked, "step": checkpoint_step(run_dir)})


def forgive(run_dir: Path) -> None:
    """Failures are counted anew."""
    _append(run_dir, {"event": "forgive", "at": time.time()})


def _append(run_dir: Path, line: dict[str, Any]) -> None:
    """One line, on the disk before anything else happens; what a torn line lacks is made up for."""
    path = run_dir / ATTEMPTS
    with path.open("a+b") as file:
        torn = file.tell() > 0 and not path.read_bytes().endswith(b"\n")
        file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / ATTEMPTS
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            lines.append({"event": values["event"], **values})
        except (ValueError, TypeError, KeyError):
            continue  # torn by a machine that died: its attempt counts as one that never ended
    return lines


def failures(run_dir: Path) -> int:
    """How often it failed in a row without getting further."""
    return _failures(_lines(run_dir))


def _failures(lines: list[dict[str, Any]]) -> int:
    """In a row at the end, all at the same checkpoint."""
    count, step = 0, None
    for line in reversed(lines):
        if line["event"] == "forgive":
            break
        if line["event"] == "end":
            if not _is_failure(line) or step not in (None, line["step"]):
                break
            count, step = count + 1, line["step"]
    return count


def _is_failure(line: dict[str, Any]) -> bool:
    return line["status"] != 0 and not line["asked"]


def _last(lines: list[dict[str, Any]], event: str) -> dict[str, Any] | None:
    return next((line for line in reversed(lines) if line["event"] == event), None)


# --- the lock -------------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(run_dir: Path) -> Iterator[int | None]:
    """The lock's file, to be handed down to who trains; None: someone else has it."""
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while not (taken := _try(descriptor)) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield descriptor if taken else None
    finally:
        os.close(descriptor)


def is_held(run_dir: Path) -> bool:
    """Whether someone trains it now, on any machine that shares the file system."""
    path = run_dir / LOCK
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        return not _try(descriptor)
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
