"""Checkpoints: megatron-core's distributed format with a manifest, visible under their name only when complete.

    RUN_DIR/checkpoints/step_00001000/     the tensors, common.pt, metadata.json (megatron-core's), manifest.json (ours)

Model, optimizer and loader state do not depend on the layout that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

import mmar_megatron
from mmar_megatron import platform
from mmar_megatron.engine.base import Engine
from mmar_megatron.parallel import ParallelGroups

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: with model, optimizer and generators, all that a resumed run needs to know."""

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    bad_steps_in_a_row: int = 0
    """Of the skipped steps, those up to here without a good one between."""
    recent_losses: tuple[float, ...] = ()
    """Of the last `train.spike_window` good steps, oldest first."""


def newest(run_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step in a run directory."""
    found = [path for path in Path(run_dir, "checkpoints").glob("step_*") if _NAME.fullmatch(path.name)]
    return max((path for path in found if (path / MANIFEST).is_file()), default=None)


def resolve(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest one of a run directory.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    found = newest(path)
    if found is None:
        raise ValueError(f"There is no checkpoint at {path}: give a directory step_XXXXXXXX with {MANIFEST}, or a run directory.")
    return found


def save(engine: Engine, *, run_dir: str | Path, progress: Progress, config_yaml: str, groups: ParallelGroups) -> Path:
    """Write a checkpoint; all ranks call it together.

    It is written under a temporary name, flushed to the disk and renamed by one process, so that a run killed at any moment
    leaves either all of it or nothing that is ever looked at.
    """
    final = Path(run_dir, "checkpoints", f"step_{progress.step:08d}")
    partial = final.with_name(f".{final.name}.partial")
    is_main = torch.distributed.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    with engine.evaluating():  # parameters may still be on their way from the ranks that updated them
        state = {**engine.sharded_state_dict(), "progress": asdict(progress), **_generators(groups)}
        dist_checkpointing.save(state, str(partial))
    if is_main:
        (partial / "config.yaml").write_text(config_yaml)
        _write_manifest(partial, progress=progress, groups=groups)
        _put_in_place(partial, final)
    torch.distributed.barrier()
    return final


def load(engine: Engine, path: Path, *, groups: ParallelGroups) -> Progress:
    """Continue from a checkpoint: model, optimizer, generators; all ranks call it together.

    Raises:
        ValueError: it is of another model.
    """
    # The generators' states belong to one layout. In another they start anew, which only dropout can tell.
    same_layout = json.loads((path / MANIFEST).read_text())["layout"] == _layout(groups)
    state = engine.sharded_state_dict(is_loading=True) | (_generators(groups) if same_layout else {})
    loaded = _read(state, path)
    engine.load_state_dict(loaded)
    if same_layout:
        platform.set_rng_state(loaded["generators"])
    return Progress(**loaded["progress"])


def load_weights(engine: Engine, path: Path) -> None:
    """Take the weights alone, for another stage of training; all ranks call it together.

    Raises:
        ValueError: they are of another model.
    """
    engine.load_weights(_read(engine.model_sharded_state_dict(), path))


def _read(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fill a sharded state dict. Raises ValueError where the checkpoint is of another model."""
    try:
        return dist_checkpointing.load(state, str(path))
    except CheckpointException as error:  # torch's, around what each rank raised
        reason = next(iter(error.failures.values()))[0]
        if not isinstance(reason, CheckpointingException):
            raise
        raise ValueError(f"The checkpoint {path} is of another model ({reason}): give the sizes in its config.yaml.") from error


def _layout(groups: ParallelGroups) -> dict[str, int]:
    return {"tensor": groups.tensor.size(), "pipeline": groups.pipeline.size(), "data": groups.data.size()}


def _generators(groups: ParallelGroups) -> dict[str, Any]:
    """The generators' states of this rank; those of one model-parallel rank are alike on all its data-parallel replicas."""
    tensor, pipeline = groups.tensor, groups.pipeline
    shape, place = (pipeline.size(), tensor.size()), (pipeline.rank(), tensor.rank())
    return {"generators": ShardedObject("generators", platform.rng_state(), shape, place, replica_id=groups.data.rank())}


def _write_manifest(directory: Path, *, progress: Progress, groups: ParallelGroups) -> None:
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                files[str(path.relative_to(directory))] = {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
                os.fsync(file.fileno())
    manifest = {
        **asdict(progress),
        "layout": _layout(groups),
        "versions": {
            "mmar_megatron": mmar_megatron.__version__,
            "megatron_core": megatron.core.__version__,
            "torch": torch.__version__,
        },
        "files": files,
    }
    with (directory / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush(directory)


def _put_in_place(partial: Path, final: Path) -> None:
    """Give the new directory its name; one that an earlier course of the run left under it makes way."""
    old = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Make the names in a directory durable, not only the files' contents."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
