"""`plan.json`: the runs of a sweep, and how each is started. Read without torch, for the queue starts a reader for each run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

PLAN = "plan.json"
RUNS = "runs"
RUN_CONFIG = "run.yaml"
ROOT = Path(__file__).resolve().parents[2]
"""Of the repository."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training."""

    name: str
    """Of its directory too."""
    budget: float
    """FLOPs it was to have."""
    shape: str
    seed: int
    n_params: int
    """Of the whole model, embeddings included."""
    steps: int
    tokens: int
    """Expected positions that hold a document: `consumed_tokens` after the last step."""
    flops: int
    """Expected operations of all steps, with recomputation."""
    learning_rate: float
    epochs: float
    """Of the source that is read most often."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """All of them."""

    directory: Path
    configs: list[str]
    launch: list[str]
    """Words before pretrain_mmar.py."""
    working_directory: str
    """Where runs are started: what relative paths in configurations are relative to."""
    retries: int
    max_epochs: float
    slurm: list[str]
    setup: list[str]
    remarks: list[str]
    runs: list[PlannedRun]

    def run_dir(self, run: PlannedRun) -> Path:
        """Where a run keeps everything."""
        return self.directory / RUNS / run.name

    def command(self, run: PlannedRun) -> list[str]:
        """What starts a run, and what continues it."""
        files = [*self.configs, str(self.run_dir(run) / RUN_CONFIG)]
        return [*self.launch, str(ROOT / "pretrain_mmar.py"), *(word for file in files for word in ("--config", file))]

    def find(self, name: str) -> PlannedRun:
        """By its name, or by its number in the plan, from 0.

        Raises:
            ValueError: there is none.
        """
        found = [run for number, run in enumerate(self.runs) if name in (run.name, str(number))]
        if not found:
            raise ValueError(f"{self.directory / PLAN} has no run {name}")
        return found[0]

    def write(self) -> None:
        """To the directory, whole or not at all."""
        values = asdict(self)
        del values["directory"]
        write_whole(self.directory / PLAN, json.dumps(values, indent=1) + "\n")


def read_plan(directory: Path) -> SweepPlan:
    """Of a sweep's directory.

    Raises:
        ValueError: it has none, or not one that this version wrote.
    """
    path = directory / PLAN
    if not path.exists():
        raise ValueError(f"{directory} has no {PLAN}: make it with `python tools/sweep.py plan SPEC.yaml --out {directory}`")
    try:
        values = json.loads(path.read_text())
        runs = [PlannedRun(**run) for run in values.pop("runs")]
        return SweepPlan(directory=directory.resolve(), runs=runs, **values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a plan of this version ({error}): plan the sweep anew") from error


def write_whole(path: Path, text: str) -> None:
    """A file that is never found half-written."""
    partial = path.with_name(f".unfinished-{path.name}")
    partial.write_text(text)
    partial.replace(path)


def default_launch(processes: int) -> list[str]:
    """Python, or torchrun for several processes of one machine."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
