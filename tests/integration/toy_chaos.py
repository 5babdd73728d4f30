"""A trial by chaos of a toy run, which needs no torch and commits the sin it is told to; the trial must see it.

Arguments: a directory, a sin. Printed is what the trial found wrong, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from mmar_megatron.chaos import life
from mmar_megatron.chaos.damage import MANIFEST, checkpoints, is_whole
from mmar_megatron.chaos.schedule import Event, LifePlan
from mmar_megatron.chaos.trial import Trial

STEPS, SAVE_EVERY = 30, 5


class Toy:
    """Adds up its steps; saves the sum, and goes on from it."""

    def __init__(self, run_dir: Path, sin: str) -> None:
        self.run_dir, self.sin = run_dir, sin
        self.resumed, self.stop, self.total = False, False, 0.0

    def run(self) -> None:
        if self.sin != "is deaf":
            signal.signal(signal.SIGTERM, self.note)
        if self.sin == "leaves a helper":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        for step in range(self.restore() + 1, STEPS + 1):
            self.total += step
            if not (self.sin == "skips a row" and self.resumed and step % 7 == 0):
                with (self.run_dir / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, "total": self.total}) + "\n")
            print(f"step {step}/{STEPS}", flush=True)
            if step % SAVE_EVERY == 0 or self.stop:
                self.save(step)
            if self.stop:
                break
            time.sleep(0.02)
        else:
            print(f"{self.run_dir} stands at step {STEPS}, the last of train.steps {STEPS}", flush=True)
        (self.run_dir / "end").touch()

    def note(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def restore(self) -> int:
        """The step it stands at."""
        (self.run_dir / "end").unlink(missing_ok=True)
        for path in reversed(checkpoints(self.run_dir)):
            if is_whole(path):
                self.resumed, state = True, json.loads((path / "state.json").read_text())
                self.total = 0.0 if self.sin == "forgets" else state["total"]
                self.keep_rows(state["step"])
                print(f"continues {path} at step {state['step']}", flush=True)
                return int(state["step"])
            if self.sin != "is silent":
                print(f"the checkpoint {path} is damaged", flush=True)
            if self.sin == "deletes":
                shutil.rmtree(path)
            else:
                path.rename(path.with_name(f"{path.name}.damaged"))
        self.run_dir.mkdir(exist_ok=True)
        self.keep_rows(0)
        return 0

    def keep_rows(self, last: int) -> None:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= last))

    def save(self, step: int) -> None:
        final = self.run_dir / "checkpoints" / f"step_{step:08d}"
        path = final if self.sin == "writes in place" else final.with_name(f".{final.name}.partial")
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        content = json.dumps({"step": step, "total": self.total}).encode()
        (path / "state.json").write_bytes(content)
        time.sleep(0.1)
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / MANIFEST).write_text(json.dumps({"files": {"state.json": entry}}))
        path.rename(final)


def train(options: list[str]) -> None:
    """As `pretrain_mmar.main`; the last rank does it all, and the others wait for its end."""
    sin, run_dir = options[0], Path(options[options.index("--run_dir") + 1])
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        Toy(run_dir, sin).run()
    while not (run_dir / "end").exists():
        time.sleep(0.02)


def event(action: str, phase: str, *, step: int, rank: int | None) -> Event:
    return Event(action=action, phase=phase, step=step, rank=rank, delay=0.3)  # type: ignore[arg-type]


def main(directory: str, sin: str) -> None:
    """The trial."""
    life.END_LIMIT_S = life.HELPERS_LIMIT_S = 1.0
    nproc = 2 if sin == "outlives" else 1
    events = [
        event("kill", "step", step=10, rank=None),
        event("kill", "save", step=17, rank=nproc - 1),
        event("SIGTERM", "step", step=22, rank=None),
    ]
    schedule = [LifePlan(event=one, damage=None, async_save=False) for one in events]
    schedule.append(LifePlan(event=None, damage="flipped bit", async_save=False))
    trial = Trial(train, [sin], nproc=nproc, out=Path(directory), save_every=SAVE_EVERY, seed=0, log=lambda _: None)
    tally = trial.run(schedule)
    print(json.dumps(tally.problems + tally.differences))


if __name__ == "__main__":
    main(*sys.argv[1:])
