"""One life of a run: its ranks are started, watched, and ended.

Ranks are forked from a process that has imported everything, for importing takes longer than all else they do. Otherwise they are
as any launcher starts them: each has its process group, its environment, and a file for its output. What they start in turn is
found as a scheduler would find it, also where a parent is dead: the forking process adopts orphans.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import re
import signal
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from mmar_megatron.chaos.schedule import Event, Phase

Main = Callable[[list[str]], None]
"""What a rank does, given its options: exits with a status or returns."""

LIFE_LIMIT_S = 120.0
"""Until an event's moment comes or an undisturbed run ends."""
END_LIMIT_S = 30.0
"""For ranks that lost one of them, or were told to stop."""
HELPERS_LIMIT_S = 3.0
"""For processes that a rank started and that outlive it."""
POLL_S = 0.004

_PORTS = range(20000, 32768)
"""Where ranks meet: below those that Linux gives to outgoing connections, of which even a rank's own could have taken it."""
_PR_SET_CHILD_SUBREAPER = 36
_STEP_LINE = re.compile(r"^step +(\d+)/", re.MULTILINE)
_RESUME_LINE = re.compile(r"^continues (.+) at step (\d+)$", re.MULTILINE)


@dataclass(kw_only=True)
class Pace:
    """Seconds that phases took last; what is not known yet is 0. Delays are shares of these."""

    startup_s: float = 0.0
    resumed_s: float = 0.0
    """From the checkpoint's loading to the first step."""
    step_s: float = 0.0
    save_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a life ended."""

    statuses: list[int]
    """Of each rank; -N: by signal N."""
    reached: bool
    """Whether the event's moment came, in time and while all ranks lived; without an event, whether the run ended in time."""
    hung: list[int]
    """Ranks that had to be killed, because they did not end by themselves."""
    helpers: int
    """Processes that outlived the ranks which had started them; they are killed, as a scheduler would."""


@dataclass
class _Seen:
    """What the life showed so far, with the moments."""

    steps: dict[int, float] = field(default_factory=dict)
    saves: dict[int, float] = field(default_factory=dict)
    saved: dict[int, float] = field(default_factory=dict)
    resumed: float | None = None


class Life:
    """One start of the run.

    Args:
        main: what each rank does.
        options: given to `main`.
        nproc: ranks.
        run_dir: where the run keeps its checkpoints.
        log_dir: gets one file for each rank, made here.
    """

    def __init__(self, main: Main, options: list[str], *, nproc: int, run_dir: Path, log_dir: Path) -> None:
        self._checkpoints = run_dir / "checkpoints"
        self.logs = [log_dir / f"rank_{rank}.log" for rank in range(nproc)]
        log_dir.mkdir(parents=True)
        self._seen = _Seen()
        self._reported = ""  # by the rank that reports, which is the last
        self._began = time.monotonic()
        context = multiprocessing.get_context("fork")
        self._ranks = [
            context.Process(target=_be_rank, args=(main, options, environment, log))
            for environment, log in zip(environments(nproc), self.logs, strict=True)
        ]
        for process in self._ranks:
            process.start()
            with suppress(PermissionError):  # it has done so itself by now
                os.setpgid(_pid(process), 0)

    @property
    def resumed_from(self) -> tuple[Path, int] | None:
        """The checkpoint it says it continues, and the step of it."""
        found = _RESUME_LINE.search(self._reported)
        return (Path(found[1]), int(found[2])) if found else None

    @property
    def last_step(self) -> int | None:
        """The last step reported; None if it was not past its start-up."""
        return max(self._seen.steps, default=None)

    @property
    def output(self) -> str:
        """Of all ranks."""
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def phase(self) -> Phase:
        """In what a dead life died, by what it left: a save in progress is a directory named so."""
        if not self._seen.steps:
            return "start-up"
        return "save" if self._saves_under_way() else "step"

    def run(self, event: Event | None, pace: Pace) -> Ending:
        """Let it live until the event, then do that, and see it end; without an event, see it end."""
        reached = self._await(event, pace)
        if reached and event is not None:
            self._do(event, pace)
        hung = self._await_end()
        self._look()
        self._learn(pace)
        # A killed rank cannot take its helpers along.
        helpers = _await_no_descendants(0 if event and event.kills else HELPERS_LIMIT_S)
        end_descendants()
        _reap_adopted()
        return Ending(statuses=[rank.exitcode or 0 for rank in self._ranks], reached=reached, hung=hung, helpers=helpers)

    def _await(self, event: Event | None, pace: Pace) -> bool:
        deadline = time.monotonic() + LIFE_LIMIT_S
        while time.monotonic() < deadline:
            self._look()
            moment = self._moment(event, pace) if event else None
            if moment is not None and time.monotonic() >= moment:
                return True
            if not all(rank.is_alive() for rank in self._ranks):
                return event is None
            time.sleep(POLL_S)
        return False

    def _moment(self, event: Event, pace: Pace) -> float | None:
        """When to act; None as long as the phase is not seen."""
        seen = self._seen
        if event.phase == "step":
            return _after(_first(seen.steps, event.step), event.delay * pace.step_s)
        if event.phase == "save":
            return _after(_first(seen.saves, event.step), event.delay * pace.save_s)
        if event.rank is None:
            return self._began + event.delay * pace.startup_s
        # Until the ranks have met, those left cannot know that one is missing: ending them is the launcher's part. So a rank that
        # dies alone dies later in the start-up.
        return _after(seen.resumed or _first(seen.steps, 0), event.delay * pace.resumed_s)

    def _do(self, event: Event, pace: Pace) -> None:
        if event.action == "SIGTERM and kill":
            self._send(signal.SIGTERM, event.rank)
            time.sleep(event.delay * (pace.step_s + 2 * pace.save_s))
        self._send(signal.SIGKILL if event.kills else signal.Signals[event.action], event.rank)

    def _send(self, number: signal.Signals, rank: int | None) -> None:
        for process in self._ranks if rank is None else [self._ranks[rank]]:
            with suppress(ProcessLookupError):  # ended by itself just now, which its status will tell
                (os.killpg if rank is None else os.kill)(_pid(process), number)

    def _await_end(self) -> list[int]:
        """See the ranks end; kill those that do not, and tell which."""
        deadline = time.monotonic() + END_LIMIT_S
        for rank in self._ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        hung = [number for number, rank in enumerate(self._ranks) if rank.is_alive()]
        for number in hung:
            self._ranks[number].kill()
            self._ranks[number].join()
        return hung

    def _look(self) -> None:
        """Take in what is new in the reporting rank's output and among the saves."""
        now, seen, log = time.monotonic(), self._seen, self.logs[-1]
        if log.exists() and (reported := log.read_text(errors="replace")) != self._reported:
            self._reported = reported
            for step in map(int, _STEP_LINE.findall(self._reported)):
                seen.steps.setdefault(step, now)
            if self.resumed_from and seen.resumed is None:
                seen.resumed = now
        under_way = self._saves_under_way()
        for step in under_way:
            seen.saves.setdefault(step, now)
        for step in seen.saves.keys() - under_way:
            seen.saved.setdefault(step, now)

    def _saves_under_way(self) -> set[int]:
        """Steps of this life that are being saved. What an earlier one left lies there too, until its step comes again."""
        steps = {int(path.name[len(".step_") :][:8]) for path in self._checkpoints.glob(".step_*.partial")}
        return steps & self._seen.steps.keys()

    def _learn(self, pace: Pace) -> None:
        """Note how long the phases took that this life went through."""
        seen, moments = self._seen, list(self._seen.steps.values())
        if moments:
            pace.startup_s = moments[0] - self._began
            pace.resumed_s = moments[0] - (seen.resumed or moments[0])
        if len(moments) > 1:
            pace.step_s = statistics.median(after - before for before, after in pairwise(moments))
        if seen.saved:
            pace.save_s = statistics.median(moment - seen.saves[step] for step, moment in seen.saved.items())


def adopt_orphans() -> None:
    """From now on, descendants of this process whose parent dies become its children, so that none is ever lost sight of."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed: this needs Linux 3.4 or later.")


def end_descendants() -> None:
    """Kill all that this process and its children started, until nothing is left: one may start another meanwhile."""
    while living := _descendants():
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(POLL_S)


def _descendants() -> list[psutil.Process]:
    living = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _await_no_descendants(seconds: float) -> int:
    """How many processes are left after at most so long."""
    deadline = time.monotonic() + seconds
    while (left := len(_descendants())) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left


def _reap_adopted() -> None:
    """Adopted processes that ended stay as zombies until asked for their status. The ranks' own have been asked for before."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _pid(process: BaseProcess) -> int:
    """Of a started process; a rank also leads the process group of that number, to which its helpers belong."""
    assert process.pid is not None
    return process.pid


def _be_rank(main: Main, options: list[str], environment: dict[str, str], log: Path) -> None:
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    main(options)


def environments(nproc: int) -> list[dict[str, str]]:
    """What a launcher sets for each rank."""
    port = next(port for port in random.sample(_PORTS, len(_PORTS)) if _is_free(port))
    job = {"WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _first(moments: dict[int, float], step: int) -> float | None:
    return min((moment for at, moment in moments.items() if at >= step), default=None)


def _after(moment: float | None, seconds: float) -> float | None:
    return None if moment is None else moment + seconds
