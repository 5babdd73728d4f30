"""What is kept of steps that went wrong: a line for each, and a diagnosis of a run that is given up for them.

RUN_DIR/incidents.jsonl                  one JSON object for each skipped step, each step once, also after a resume
RUN_DIR/diagnosis/step_XXXXXXXX/         summary.json; of each rank rank_XXXXX.json and its microbatches, batch_XXXXX.pt
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from heapq import nlargest
from pathlib import Path
from typing import Any

import torch

from mmar_megatron import platform
from mmar_megatron.data.batch import Batch
from mmar_megatron.engine.base import Engine
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training.checkpoint import Progress
from mmar_megatron.training.metrics import Metrics, finite_or_none, keep_until, read_rows

INCIDENTS_FILE = "incidents.jsonl"
_NAMED_SAMPLES = 8
_LARGEST = 10


class Incidents:
    """Keeps account of skipped steps.

    Args:
        run_dir: the run's directory.
        resume_step: of the checkpoint that is continued, 0 at the beginning; what was written of later steps is dropped.
        groups: process groups.
        name_of: what a sample is called, by its id in `Batch.sample_ids_BK`.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, groups: ParallelGroups, name_of: Callable[[int], str]) -> None:
        self._run_dir, self._groups, self._name_of = run_dir, groups, name_of
        self._path = run_dir / INCIDENTS_FILE
        if groups.is_main:
            keep_until(self._path, resume_step)

    def report(self, reason: str, metrics: Metrics, *, microbatches: Sequence[Batch], step: int) -> str:
        """Write a skipped step down; returns the line that tells of it. All ranks call it together."""
        names = [self._name_of(i) for i in sample_ids(microbatches, groups=self._groups)]
        if self._groups.is_main:
            row = {"step": step, "reason": reason, **finite_or_none(metrics), "samples": names}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        more = f" and {len(names) - _NAMED_SAMPLES} more" if len(names) > _NAMED_SAMPLES else ""
        named = ", ".join(names[:_NAMED_SAMPLES])
        return f"step {step}: {reason}; the step is skipped (samples {named}{more}, see {self._path})"

    def diagnose(self, engine: Engine, *, microbatches: Sequence[Batch], progress: Progress) -> Path:
        """Write down all that may tell why the last steps were bad; all ranks call it together.

        Returns:
            The directory, which has its name when it is complete.
        """
        final = self._run_dir / "diagnosis" / f"step_{progress.step:08d}"
        partial = final.with_name(f".{final.name}.partial")
        rank = torch.distributed.get_rank()
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier(group=self._groups.control)
        _write_json(partial / f"rank_{rank:05d}.json", {"rank": rank, **_health(engine)})
        tensors = [{f.name: getattr(batch, f.name) for f in fields(batch)} for batch in microbatches]
        torch.save(tensors, partial / f"batch_{rank:05d}.pt")
        if self._groups.is_main:
            bad_steps = read_rows(self._path)[-progress.bad_steps_in_a_row :]
            where = {"layout": self._groups.describe(), "versions": platform.versions()}
            _write_json(partial / "summary.json", {**asdict(progress), "bad_steps": bad_steps, **where})
        torch.distributed.barrier(group=self._groups.control)
        if rank == 0:
            shutil.rmtree(final, ignore_errors=True)  # of an earlier attempt, that came as far
            partial.rename(final)
        return final


def sample_ids(microbatches: Sequence[Batch], *, groups: ParallelGroups) -> list[int]:
    """Ids of the samples of a step, those of all data-parallel ranks, in the order of the stream. All ranks call it together."""
    own = [batch.sample_ids_BK.tolist() for batch in microbatches]
    gathered: list[list[list[list[int]]]] = [[]] * groups.data.size()
    torch.distributed.all_gather_object(gathered, own, group=groups.data)  # of as many documents as each row happens to have
    return [i for microbatch in zip(*gathered, strict=True) for rows in microbatch for row in rows for i in row if i >= 0]


def _health(engine: Engine) -> dict[str, Any]:
    """Which parameters of this rank are not finite, or their gradients, and the norms of the largest gradients that are.

    Where the engine keeps no gradients, nothing is said of them.
    """
    bad_weights, bad_gradients, norms = [], [], {}
    for name, weights, gradient in engine.parameters_and_gradients():
        if not weights.isfinite().all():
            bad_weights.append(name)
        if gradient is None:
            continue
        if gradient.isfinite().all():
            norms[name] = float(gradient.double().norm())
        else:
            bad_gradients.append(name)
    if not norms and not bad_gradients:
        return {"weights_not_finite": bad_weights}
    largest = {name: norms[name] for name in nlargest(_LARGEST, norms, key=norms.__getitem__)}
    return {"weights_not_finite": bad_weights, "gradients_not_finite": bad_gradients, "largest_gradient_norms": largest}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
