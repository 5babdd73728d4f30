"""Checkpoints: where they are, which of them are good, and how a run goes on from one. `saving.py` writes them.

    RUN_DIR/checkpoints/step_00001000/           megatron-core's files, with config.yaml and manifest.json
    RUN_DIR/checkpoints/step_00001000.damaged/   one that was found not to be as it was written; nothing of ours deletes it
    RUN_DIR/checkpoints/.step_...                not complete yet, or being deleted: of no use to anybody

Model, optimizer, average of the weights and loader state do not depend on the layout that wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from mmar_megatron import platform
from mmar_megatron.data.stream import StreamState
from mmar_megatron.engine.base import Engine
from mmar_megatron.engine.sharding import AVERAGE_PREFIX, OPTIMIZER_PREFIX
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training import manifest
from mmar_megatron.training.manifest import MANIFEST

CONFIG = "config.yaml"
WEIGHTS_ONLY = "weights_only"
"""Is true in the manifest of a checkpoint that no run wrote: it has no optimizer's state."""
IMPORTED_FROM = "imported_from"
"""In the manifest of such a one, the name of the model that it was made of."""
_T = TypeVar("_T")
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: with model, optimizer and generators, all that a resumed run needs to know."""

    step: int = 0
    stream: StreamState = field(default_factory=StreamState)
    """Where the data stand, and how much of them was consumed."""
    skipped_steps: int = 0
    bad_steps_in_a_row: int = 0
    """Of the skipped steps, those up to here without a good one between."""
    recent_losses: tuple[float, ...] = ()
    """Of the last `train.spike_window` good steps, oldest first."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of tokenizer and codec: with others, the model's tokens would mean something else."""
    interrupted: bool = False
    """A signal left no time for the validation and preview that were due at this step."""


# --- which there are ------------------------------------------------------------------------------------------------------------


def directory(run_dir: str | Path, *, step: int) -> Path:
    """Where the checkpoint of a step stands once it is complete."""
    return Path(run_dir, "checkpoints", f"step_{step:08d}")


def step_of(path: Path) -> int:
    """Undo of `directory`."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def under_final_names(run_dir: str | Path) -> list[Path]:
    """What stands under a checkpoint's name, good or damaged, oldest first."""
    return sorted(path for path in Path(run_dir, "checkpoints").glob("step_*") if _NAME.fullmatch(path.name))


def newest_good(
    run_dir: str | Path, *, groups: ParallelGroups | None = None, set_aside: bool = False, say: Callable[[str], None] = print
) -> Path | None:
    """The newest checkpoint in a run directory that is as it was written. None: the run has never saved one.

    Args:
        run_dir: a run's directory.
        groups: of a job whose ranks call this together and share the reading; none: this process alone.
        set_aside: give damaged ones another name, so that the next start does not read them again. They are never deleted.
        say: is told of each one that is passed over.

    Raises:
        ValueError: there are some, but none is good; or not all ranks see the same.
    """
    if set_aside and _is_first(groups):
        restore_replaced(run_dir)
    found = _seen_by_all(run_dir, groups=groups)
    for path in reversed(found):
        try:
            wrong = problems(path, groups=groups)
        except OSError as error:
            say(f"the checkpoint {path} cannot be read: {error}")
            continue
        if not wrong:
            return path
        say(f"the checkpoint {path} is damaged: {'; '.join(wrong[:3])}" + (f"; and {len(wrong) - 3} more" * (len(wrong) > 3)))
        if set_aside and _is_first(groups):
            put_aside(path)
    if found or any(Path(run_dir, "checkpoints").glob("step_*.damaged*")):
        raise ValueError(
            f"No checkpoint in {run_dir} is good, so the run cannot go on: bring one back, or begin in another run_dir."
        )
    return None


def resolve(path: str | Path, *, groups: ParallelGroups | None = None, say: Callable[[str], None] = print) -> Path:
    """The checkpoint that a path means: itself, or the newest good one of a run directory. Arguments as `newest_good`'s.

    Raises:
        ValueError: there is none, or it is damaged, or not all ranks see the same.
    """
    path = Path(path)
    is_one = path.is_dir() and (_NAME.fullmatch(path.name) is not None or (path / MANIFEST).exists())
    if _as_first_sees(is_one, groups=groups):
        if wrong := problems(path, groups=groups):
            raise ValueError(f"The checkpoint {path} is damaged ({wrong[0]}): give another one.")
        return path
    found = newest_good(path, groups=groups, say=say)
    if found is None:
        raise ValueError(f"There is no checkpoint at {path}: give a directory step_XXXXXXXX with {MANIFEST}, or a run directory.")
    return found


def problems(path: Path, *, groups: ParallelGroups | None = None) -> list[str]:
    """What is wrong with a checkpoint; the ranks of a job read a part each, and all get the same answer.

    Raises:
        OSError: the storage does not give what it has, to one of them at least.
        ValueError: one finds it damaged, and rank 0 does not: they do not see the same storage.
    """
    if groups is None:
        return manifest.problems(path)
    rank, found = torch.distributed.get_rank(), [list[str]() for _ in range(groups.world_size)]
    with groups.fail_together():
        mine = manifest.problems(path, rank=rank, ranks=groups.world_size)
    torch.distributed.all_gather_object(found, mine, group=groups.control)
    suspicious = next((rank for rank, wrong in enumerate(found) if wrong), None)
    if suspicious is None:
        return []
    # A machine without its mount misses every file: only what rank 0 finds too is damage, for it may set the checkpoint aside.
    with groups.fail_together():
        confirmed = manifest.problems(path) if rank == 0 else []
        if rank == 0 and not confirmed:
            raise ValueError(
                f"Rank {suspicious} finds the checkpoint {path} damaged ({found[suspicious][0]}) and rank 0 does not: "
                "see that all machines have the same storage at this place."
            )
    return _as_first_sees(confirmed, groups=groups)


def put_aside(path: Path) -> None:
    """Give a damaged checkpoint another name."""
    names = (path.with_name(f"{path.name}.damaged{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    try:
        path.rename(next(name for name in names if not name.exists()))
    except OSError:
        return  # of storage that cannot be written, where saving will complain soon enough; for reading it is good


def replaced(path: Path) -> Path:
    """Where a checkpoint stands while another one takes its name."""
    return path.with_name(f"{path.name}.replaced")


def restore_replaced(run_dir: str | Path) -> None:
    """Give back its name to a checkpoint that was to be replaced when the process was killed."""
    for old in Path(run_dir, "checkpoints").glob("step_*.replaced"):
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))


def _seen_by_all(run_dir: str | Path, *, groups: ParallelGroups | None) -> list[Path]:
    """What stands under a checkpoint's name as rank 0 sees it: another rank may still see what network storage had before.

    Raises:
        ValueError: some ranks see nothing there.
    """
    mine = under_final_names(run_dir)
    if groups is None:
        return mine
    seen: list[list[Path]] = [[] for _ in range(groups.world_size)]
    torch.distributed.all_gather_object(seen, mine, group=groups.control)
    blind = [rank for rank, paths in enumerate(seen) if not paths]
    if 0 < len(blind) < len(seen):
        raise ValueError(
            f"Rank {blind[0]} sees no checkpoint in {run_dir} and others do: see that all machines have the same storage there."
        )
    return seen[0]


def _as_first_sees(value: _T, *, groups: ParallelGroups | None) -> _T:
    """Rank 0's value."""
    if groups is not None:
        torch.distributed.broadcast_object_list(shared := [value], group=groups.control)
        (value,) = shared
    return value


def _is_first(groups: ParallelGroups | None) -> bool:
    return groups is None or torch.distributed.get_rank() == 0


# --- going on -------------------------------------------------------------------------------------------------------------------


def load(engine: Engine, path: Path, *, groups: ParallelGroups) -> Progress:
    """Continue from a checkpoint: model, optimizer, average, generators; all ranks call it together.

    Raises:
        ValueError: it is of another model or engine, or holds weights alone.
    """
    facts = manifest.read(path)
    if facts.get(WEIGHTS_ONLY):
        raise ValueError(
            f"The checkpoint {path} holds weights alone, which no run can continue: give it as checkpoint.init_from."
        )
    if (written_by := facts.get("engine", "native")) != engine.name:
        raise ValueError(
            f"The checkpoint {path} has the optimizer's state of the engine {written_by}: continue with --engine {written_by}, "
            "or start from its weights by checkpoint.init_from."
        )
    # The generators' states belong to one layout. In another they start anew, which only dropout can tell.
    same_layout = facts["layout"] == groups.layout()
    state = engine.sharded_state_dict(is_loading=True, average=facts["average"])
    state |= generators(groups) if same_layout else {}
    loaded = _read(state, path)
    engine.load_state_dict(loaded)
    if same_layout:
        platform.set_rng_state(loaded["generators"])
    return Progress(**{**loaded["progress"], "stream": StreamState(**loaded["progress"]["stream"])})


def check_fingerprints(path: Path, fingerprints: Mapping[str, str]) -> None:
    """Refuses data of another tokenizer or codec than those that a checkpoint was trained on.

    Raises:
        ValueError: names both sides.
    """
    for name, before in manifest.read(path)["fingerprints"].items():
        if (now := fingerprints.get(name, before)) != before:
            raise ValueError(
                f"The checkpoint {path} was trained with the {name} ({before[:64]}), the data are made for ({now[:64]}): give "
                f"data that were prepared with the same {name}."
            )


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What became of the weights when they alone were taken from a checkpoint; names as in checkpoints."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    """Of the model, not in the checkpoint: they keep their initial values."""
    unused: tuple[str, ...]
    """In the checkpoint, not of the model."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.new:
            parts.append(f"{len(self.new)} new, which keep their initial values: {_shortened(self.new)}")
        if self.unused:
            parts.append(f"{len(self.unused)} in the checkpoint that this model has no place for: {_shortened(self.unused)}")
        return "; ".join(parts)


def load_weights(engine: Engine, path: Path, *, average: bool = False) -> WeightsReport:
    """Take the weights alone, for another stage of training; all ranks call it together.

    Args:
        average: take their moving average in place of the weights themselves.

    Raises:
        ValueError: they are of another model, or hold no average.
    """
    prefix = AVERAGE_PREFIX if average else ""
    state = engine.model_sharded_state_dict(average=average)
    wanted = _on_all_ranks(
        {value.key for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory)}
    )
    there = {key for key in dist_checkpointing.load_tensors_metadata(str(path)) if key.startswith(AVERAGE_PREFIX) == average}
    there = {key for key in there if not key.startswith(OPTIMIZER_PREFIX)}
    if average and not there:
        raise ValueError(f"The checkpoint {path} holds no average of the weights: train with optimizer.ema_decay above 0.")
    if lacking := sorted(key for key in wanted - there if key.removeprefix(prefix).startswith("decoder.")):
        raise ValueError(f"The checkpoint {path} is of another model: it has no {lacking[0]}. Give the sizes in its {CONFIG}.")
    engine.load_weights(_read(state, path, strict=StrictHandling.IGNORE_ALL))
    names = (sorted(key.removeprefix(prefix) for key in keys) for keys in (wanted & there, wanted - there, there - wanted))
    loaded, new, unused = map(tuple, names)
    return WeightsReport(loaded=loaded, new=new, unused=unused)


def changed_options(path: Path, config_yaml: str) -> list[str]:
    """Which options differ between the configuration that wrote a checkpoint and this one: `train.steps: 6 -> 12`."""
    if manifest.read(path)["config_sha256"] == manifest.digest_of_text(config_yaml):
        return []
    before, now = (_flattened(yaml.safe_load(text)) for text in ((path / CONFIG).read_text(), config_yaml))
    return [f"{name}: {before.get(name)} -> {now.get(name)}" for name in before | now if before.get(name) != now.get(name)]


def generators(groups: ParallelGroups) -> dict[str, Any]:
    """The generators' states of this rank; those of one model-parallel rank are alike on all its data-parallel replicas."""
    tensor, pipeline = groups.tensor, groups.pipeline
    shape, place = (pipeline.size(), tensor.size()), (pipeline.rank(), tensor.rank())
    return {"generators": ShardedObject("generators", platform.rng_state(), shape, place, replica_id=groups.data.rank())}


def _read(state: dict[str, Any], path: Path, *, strict: StrictHandling = StrictHandling.ASSUME_OK_UNEXPECTED) -> dict[str, Any]:
    """Fill a sharded state dict. Raises ValueError where the checkpoint is of another model."""
    try:
        return dist_checkpointing.load(state, str(path), strict=strict)
    except CheckpointException as error:  # torch's, around what each rank raised
        reason = next(iter(error.failures.values()))[0]
        if not isinstance(reason, CheckpointingException):
            raise
        raise ValueError(f"The checkpoint {path} is of another model ({reason}): give the sizes in its {CONFIG}.") from error


def _flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _on_all_ranks(mine: set[str]) -> set[str]:
    parts: list[set[str]] = [set() for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, mine)
    return set().union(*parts)


def _shortened(names: tuple[str, ...], longest: int = 6) -> str:
    return ", ".join(names[:longest]) + (f", and {len(names) - longest} more" if len(names) > longest else "")
