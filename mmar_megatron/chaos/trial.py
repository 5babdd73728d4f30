"""A trial: a run left alone, the same run under a schedule of mishaps, and what was found wrong with the second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from mmar_megatron.chaos.comparison import differences
from mmar_megatron.chaos.damage import Kind, checkpoints, damage, is_whole
from mmar_megatron.chaos.life import Ending, Life, Main, Pace, adopt_orphans, end_descendants
from mmar_megatron.chaos.schedule import Event, LifePlan, Phase
from mmar_megatron.training.metrics import read_metrics

KEPT_ERRORS = 20


@dataclass(kw_only=True)
class Tally:
    """What happened, and what was wrong. A trial has passed if `problems` and `differences` are empty."""

    lives: int = 0
    kills: Counter[Phase] = field(default_factory=Counter)
    """By the phase in which the run really died."""
    kills_of_one_rank: int = 0
    signals: Counter[str] = field(default_factory=Counter)
    """Obeyed, by name."""
    stops_cut_short: int = 0
    """Kills soon after SIGTERM."""
    damages: Counter[Kind] = field(default_factory=Counter)
    fallbacks: Counter[Kind] = field(default_factory=Counter)
    """Damages that the run reported, put aside, and fell back from."""
    steps_run: int = 0
    """Including those that were lost and run again."""
    steps_compared: int = 0
    differences: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems and not self.differences


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A checkpoint that was damaged and is not yet found out."""

    path: Path
    kind: Kind
    inode: int
    """Which a new name does not change."""


class Trial:
    """Runs the training command as often as the schedule says.

    Args:
        main: the training command, given its options.
        options: those of both runs.
        nproc: ranks.
        out: directory for both runs and the output of each life.
        save_every: steps between checkpoints, as `options` say.
        seed: of which file and bit a damage hits.
        log: takes one line for each life.
    """

    def __init__(
        self, main: Main, options: list[str], *, nproc: int, out: Path, save_every: int, seed: int, log: Callable[[str], None]
    ) -> None:
        self._main, self._options, self._nproc, self._save_every, self._log = main, options, nproc, save_every, log
        self._out, self._run_dir = out, out / "run"
        self._rng = Random(seed)
        self._pace = Pace()
        self._waiting: list[Kind] = []
        self._damaged: list[Damaged] = []
        self._put_aside: set[int] = set()
        self.tally = Tally()

    def run(self, schedule: list[LifePlan]) -> Tally:
        """The whole trial. No process of it is left, however it ends."""
        began = time.monotonic()
        adopt_orphans()
        try:
            self._run_undisturbed()
            for plan in schedule:
                self._run_life(plan)
            while self._waiting and not self.tally.problems:
                self._run_life(LifePlan(event=None, damage=None, async_save=False))
        finally:
            end_descendants()
        self._compare()
        self.tally.seconds = time.monotonic() - began
        return self.tally

    def _start(self, run_dir: Path, *, name: str, async_save: bool) -> Life:
        options = [*self._options, "--run_dir", str(run_dir), "--checkpoint.async_save", str(async_save).lower()]
        return Life(self._main, options, nproc=self._nproc, run_dir=run_dir, log_dir=self._out / "lives" / name)

    def _run_undisturbed(self) -> None:
        life = self._start(self._out / "undisturbed", name="undisturbed", async_save=False)
        ending = life.run(None, self._pace)
        if not ending.reached or any(ending.statuses):
            raise ValueError(f"The run does not work when left alone: see {life.logs[-1].parent}.")
        self._log(f"undisturbed: {life.last_step} steps, start-up {self._pace.startup_s:.1f} s, step {self._pace.step_s:.3f} s")

    # --- one life ---------------------------------------------------------------------------------------------------------------

    def _run_life(self, plan: LifePlan) -> None:
        began, number = time.monotonic(), self.tally.lives
        done = self._damage(plan.damage)
        whole = [path for path in checkpoints(self._run_dir) if is_whole(path)]
        life = self._start(self._run_dir, name=f"{number:03d}", async_save=plan.async_save)
        ending = life.run(plan.event, self._pace)
        problems = [
            *self._check_ending(plan.event, ending, life),
            *self._check_start(life, whole),
            *self._check_checkpoints(life),
        ]
        self.tally.lives += 1
        if life.last_step is not None:
            self.tally.steps_run += life.last_step - (life.resumed_from[1] if life.resumed_from else 0)
        self.tally.problems += [f"life {number:03d}: {problem}" for problem in problems]
        self._log(f"life {number:03d}  {done}{_account(plan, ending, life)}  {time.monotonic() - began:.1f} s")
        for problem in problems:
            self._log(f"  WRONG: {problem}")

    def _damage(self, kind: Kind | None) -> str:
        """Damage the newest checkpoint, if an older one is whole too and no damage is still to be found; else this one waits."""
        self._waiting += [kind] if kind else []
        whole = [path for path in checkpoints(self._run_dir) if is_whole(path)]
        if not self._waiting or self._damaged or len(whole) < 2:
            return ""
        kind = self._waiting.pop(0)
        step = int(whole[-1].name.removeprefix("step_"))
        path = damage(whole[-1], kind, rng=self._rng, next_step=step + self._save_every)
        self._damaged.append(Damaged(path=path, kind=kind, inode=path.stat().st_ino))
        self.tally.damages[kind] += 1
        return f"{kind} in {path.name}; "

    # --- what must hold ---------------------------------------------------------------------------------------------------------

    def _check_ending(self, event: Event | None, ending: Ending, life: Life) -> list[str]:
        statuses = ending.statuses
        problems = [f"rank {rank} did not end by itself" for rank in ending.hung]
        if not ending.reached:
            return [*problems, f"{event or 'the end of the run'} was not reached, the ranks ended with {statuses}"]
        if event is None:
            if any(statuses) or "the last of train.steps" not in life.output:
                problems.append(f"the run did not end well, but with {statuses}")
        elif event.action == "SIGTERM and kill":
            self.tally.stops_cut_short += 1
        elif event.action == "kill":
            alone = event.rank is not None
            if 0 in statuses:
                problems.append(f"a rank took another's death for success: {statuses}")
            if not ending.hung:
                self.tally.kills[life.phase()] += 1
                self.tally.kills_of_one_rank += alone
        else:
            problems += self._check_obeyed(event, ending, life)
        if ending.helpers and not (event and event.kills):
            problems.append(f"{ending.helpers} processes outlived the ranks that had started them")
        return problems

    def _check_obeyed(self, event: Event, ending: Ending, life: Life) -> list[str]:
        saved = max((int(path.name.removeprefix("step_")) for path in checkpoints(self._run_dir) if is_whole(path)), default=None)
        if any(ending.statuses):
            return [f"{event.action} ended the ranks with {ending.statuses} instead of 0"]
        if saved != life.last_step:
            return [f"{event.action} came, the last step was {life.last_step}, the last checkpoint is of step {saved}"]
        self.tally.signals[event.action] += 1
        return []

    def _check_start(self, life: Life, whole: list[Path]) -> list[str]:
        """A life that is past its start-up says which damage it met, and continues the newest whole checkpoint."""
        problems = []
        past_startup = life.last_step is not None
        lines = life.output.splitlines()
        for damaged in list(self._damaged):
            reported = any("is damaged" in line and str(damaged.path) in line for line in lines)
            moved = not damaged.path.exists() or damaged.path.stat().st_ino != damaged.inode
            # One that is killed during its start-up may have put the checkpoint aside without living to say so.
            if moved and (reported or not past_startup):
                self.tally.fallbacks[damaged.kind] += 1
                self._put_aside.add(damaged.inode)
                self._damaged.remove(damaged)
            elif past_startup:
                problems.append(f"{damaged.path.name} ({damaged.kind}) was {'not put aside' if reported else 'not reported'}")
                self._damaged.remove(damaged)
        expected = whole[-1] if whole else None
        continued = life.resumed_from[0] if life.resumed_from else None
        if past_startup and continued != expected:
            problems.append(f"continued {continued} instead of {expected}")
        return problems

    def _check_checkpoints(self, life: Life) -> list[str]:
        """Under a final name is a whole checkpoint, unless it was damaged here; what was damaged is still there."""
        known = {damaged.path for damaged in self._damaged}
        problems = [
            f"{path.name} is not whole" for path in checkpoints(self._run_dir) if path not in known and not is_whole(path)
        ]
        there = {path.stat().st_ino for path in (self._run_dir / "checkpoints").glob("step_*.damaged*")}
        if lost := len(self._put_aside - there):
            problems.append(f"{lost} damaged checkpoints were deleted")
            self._put_aside &= there
        return problems

    def _compare(self) -> None:
        expected, found = read_metrics(self._out / "undisturbed"), read_metrics(self._run_dir)
        self.tally.steps_compared = len(found)
        self.tally.differences = differences(expected, found)


def _account(plan: LifePlan, ending: Ending, life: Life) -> str:
    """What a life was, in one line."""
    start = life.resumed_from[1] if life.resumed_from else 0
    steps = f"steps {start + 1} to {life.last_step}" if life.last_step else "no step"
    came = f", came during {life.phase()}" if plan.event and plan.event.kills else ""
    return (
        f"{plan.event or 'to the end'}{came}: {steps}{', async saves' if plan.async_save else ''}, ended with {ending.statuses}"
    )


def summary(tally: Tally) -> str:
    """The tally as a table, with what was wrong below it."""
    kills, one = tally.kills, tally.kills_of_one_rank
    rows = {
        "kills survived": f"{kills.total()} ({kills['save']} during saves, {kills['start-up']} during start-up, "
        f"{kills['step']} between; {one} of one rank, {kills.total() - one} of all)",
        "signals obeyed": f"{tally.signals.total()} ({_each(tally.signals)})",
        "stops cut short": f"{tally.stops_cut_short}",
        "checkpoints damaged": f"{tally.damages.total()} ({_each(tally.damages)})",
        "  found, fallen back": f"{tally.fallbacks.total()}",
        "starts": f"{tally.lives}",
        "steps run": f"{tally.steps_run}",
        "steps compared": f"{tally.steps_compared}",
        "  of them different": f"{len(tally.differences)}",
        "other problems": f"{len(tally.problems)}",
        "seconds": f"{tally.seconds:.0f}",
    }
    lines = [f"{name:<22}{value}" for name, value in rows.items()]
    return "\n".join([*lines, *tally.problems[:KEPT_ERRORS], *tally.differences[:KEPT_ERRORS]])


def _each(counts: Counter[str] | Counter[Kind]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
