"""What the ranks of a job can find out together only: whether they share storage and time, and how fast they add up."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from mmar_megatron import platform

_CLOCK_ROUNDS = 5
_ATTEMPTS = 10
_ATTEMPT_S = 1.0
"""Network storage shows a new file after some seconds, as long as it believes its cache of the directory."""
_REPEATS = 5


def gather(value: Any) -> list[Any]:
    """Of all ranks, on all ranks."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def clock_offsets(*, clock: Callable[[], float]) -> list[float]:
    """Seconds by which each rank's clock is ahead of the first rank's: the median of several looks at the same moment."""
    looks = []
    for _ in range(_CLOCK_ROUNDS):
        torch.distributed.barrier()
        looks.append(clock())
    of_ranks = gather(looks)
    return [statistics.median(own - first for own, first in zip(times, of_ranks[0], strict=True)) for times in of_ranks]


def storage_problem(run_dir: Path, *, is_first_of_node: bool) -> str | None:
    """What is wrong with the run directory as this rank sees it: it must see the first rank's file and write one beside it.

    The directory is left as it was; all ranks call this together.
    """
    is_first, made = torch.distributed.get_rank() == 0, []
    name: list[str | None] = [None]
    problem = None
    if is_first:
        name = [f".check_{secrets.token_hex(8)}"]
        try:
            made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / str(name[0])).touch()
        except OSError as failure:
            problem, name = f"cannot be written ({failure.strerror})", [None]
    torch.distributed.broadcast_object_list(name)
    if name[0] is not None and is_first_of_node and not is_first:
        problem = _problem_elsewhere(run_dir / name[0])
    torch.distributed.barrier()
    if is_first:
        if name[0] is not None:
            (run_dir / name[0]).unlink()
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    return problem


def _problem_elsewhere(file: Path) -> str | None:
    for _ in range(_ATTEMPTS):
        if file.exists():
            break
        time.sleep(_ATTEMPT_S)
    else:
        return "does not show what the first node writes there"
    own = file.with_name(f"{file.name}_{torch.distributed.get_rank()}")
    try:
        own.touch()
        own.unlink()
    except OSError as failure:
        return f"cannot be written ({failure.strerror})"
    return None


def sum_up(group: ProcessGroup | None, *, num_bytes: int) -> tuple[bool, float]:
    """Sums over all ranks: whether the result is right here, and bytes per second that this rank sends and receives.

    Of the whole these are 2 (n - 1) / n for n ranks, however they divide the work.
    """
    ranks = torch.distributed.get_world_size()
    values = torch.full((num_bytes // 4,), torch.distributed.get_rank() + 1.0, device=platform.device())
    torch.distributed.all_reduce(values, group=group)
    right = bool((values == ranks * (ranks + 1) / 2).all())
    values.zero_()
    platform.synchronize()
    start = time.perf_counter()
    for _ in range(_REPEATS):
        torch.distributed.all_reduce(values, group=group)
    platform.synchronize()
    return right, 2 * (ranks - 1) / ranks * num_bytes * _REPEATS / (time.perf_counter() - start)
