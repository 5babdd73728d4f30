"""The whole check of a job's machines, by all ranks of a group that torchrun starts as it will start the run."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from mmar_megatron import platform
from mmar_megatron.cluster.facts import Facts, collect
from mmar_megatron.cluster.findings import Finding, Needs, error, of_clocks, of_machines, of_room
from mmar_megatron.cluster.together import clock_offsets, gather, storage_problem, sum_up
from mmar_megatron.config import Config
from mmar_megatron.config_checks import validate_machine, validate_world
from mmar_megatron.data.index import INDEX_NAME
from mmar_megatron.training.building import open_data
from mmar_megatron.training.checkpoint import under_final_names
from mmar_megatron.training.planning import plan_run

_TIMEOUT = timedelta(minutes=5)
_MEGABYTES = {True: 256, False: 4}
"""Summed up over all ranks, with GPUs and without."""
_SAVED_BYTES = {"fp32": 12, "bf16": 14}
"""Of a parameter in a checkpoint: weight, and the optimizer's fp32 weight (beside bf16) and two moments."""
_AVERAGE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found, the same on all ranks."""

    facts: list[Facts]
    findings: list[Finding]
    measured: list[str]

    @property
    def passed(self) -> bool:
        """Whether the run may start."""
        return all(finding.severity != "error" for finding in self.findings)

    def __str__(self) -> str:
        first = self.facts[0]
        nodes = len({facts.node for facts in self.facts})
        gpus = f" ({first.gpus[0]}, driver {first.driver})" if first.gpus else ""
        versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
        lines = [f"nodes: {nodes}, processes: {len(self.facts)}{gpus}; {versions}"]
        return "\n".join([*lines, *self.measured, *map(str, self.findings)])


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a checkpoint."""

    num_bytes: int = 0
    unknown: str | None = None
    """Why the run cannot be planned."""


def check(config: Config, *, say: Callable[[str], object]) -> Report:
    """Finds out what would hinder a run. Joins a process group of its own and leaves it.

    Args:
        config: of the run.
        say: is told the report, on the last rank, which speaks for the run too.

    Raises:
        ValueError: the number of processes does not fit the layout; or the launcher is not torchrun.
    """
    validate_world(config, world_size=platform.world_size())
    if platform.launched() and "GROUP_RANK" not in os.environ:
        raise ValueError("the check does not know which ranks share a node: start it by torchrun")
    # This pretends process groups, so it comes before the real one.
    size = checkpoint_size(config) if platform.rank() == 0 else Size()
    join()
    try:
        report = look(config, size=size)
        if platform.rank() == platform.world_size() - 1:
            say(str(report))
        torch.distributed.barrier()  # torchrun ends all ranks when one ends with an error
    finally:
        torch.distributed.destroy_process_group()
    return report


def look(config: Config, *, size: Size, clock: Callable[[], float] = time.time) -> Report:
    """What all ranks, having joined, find out together.

    Args:
        config: of the run.
        size: of its checkpoints; the first rank's counts.
        clock: seconds since the epoch.
    """
    size = gather(size)[0]
    facts: list[Facts] = gather(collect(_paths(config)))
    own = facts[torch.distributed.get_rank()]
    needs = Needs(
        transformer_engine=config.model.backbone.transformer_impl == "transformer_engine",
        tensor_parallel=config.parallel.tensor_model_parallel_size > 1,
        loader_processes=config.data.num_workers > 0,
        run_dir=config.run_dir,
        checkpoint_bytes=size.num_bytes,
        kept_checkpoints=max(1, (config.checkpoint.keep_last or 2) + 1 - len(under_final_names(config.run_dir))),
    )
    findings = of_machines(facts, needs=needs) + ([error(size.unknown)] if size.unknown else [])
    findings += dict.fromkeys(error(problem) for problem in gather(_machine_problem(config)) if problem is not None)
    run_dir = Path(config.run_dir)
    for place, problem in gather((own.place, storage_problem(run_dir, is_first_of_node=own.local_rank == 0))):
        if problem is not None:
            findings.append(
                error(f"on {place} {run_dir} {problem}: choose a run_dir on storage that all nodes share and may write")
            )
    free_bytes = gather(_free_bytes(run_dir))[0]
    findings += of_room(free_bytes, needs=needs)
    offsets = clock_offsets(clock=clock)
    findings += of_clocks(offsets, ranks=facts)
    measured = [
        f"clocks within {max(offsets) - min(offsets):.3f} s; {free_bytes / 1e9:,.1f} GB free for {run_dir}, "
        f"where a checkpoint takes {size.num_bytes / 1e9:,.3f} GB"
    ]
    report = Report(facts=facts, findings=findings, measured=measured)
    if report.passed and len(facts) > 1:  # where there are errors GPUs may not be there at all
        _sum_up(report)
    return report


def _sum_up(report: Report) -> None:
    """Adds what comes of it."""
    megabytes = _MEGABYTES[platform.HAS_CUDA]
    group = None
    if platform.HAS_CUDA:
        platform.choose_device()
        group = torch.distributed.new_group(backend="nccl", timeout=_TIMEOUT)
    right, rates = zip(*gather(sum_up(group, num_bytes=megabytes * 2**20)), strict=True)
    report.measured.append(f"a sum of {megabytes} MiB over all ranks goes at {min(rates) / 1e9:.2f} GB/s on each")
    report.findings.extend(
        error(f"a sum over all ranks is wrong on GPU {facts.local_rank} of {facts.place}: leave the node out and have it tested")
        for facts, is_right in zip(report.facts, right, strict=True)
        if not is_right
    )


def join() -> None:
    """Through the host: what may be wrong is the device."""
    if platform.launched():
        torch.distributed.init_process_group(backend="gloo", timeout=_TIMEOUT)
    else:
        torch.distributed.init_process_group(backend="gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def checkpoint_size(config: Config) -> Size:
    """By the plan of the run; no process group may exist yet."""
    try:
        planned = plan_run(config, source=open_data(config), world_size=platform.world_size())
    except (ValueError, OSError) as failure:
        return Size(unknown=str(failure))
    of_each = _SAVED_BYTES[config.precision.dtype] + _AVERAGE_BYTES * (config.optimizer.ema_decay > 0)
    return Size(num_bytes=of_each * sum(planned.parameters.values()))


def _machine_problem(config: Config) -> str | None:
    """Why this rank's device cannot compute what is configured, if it cannot."""
    try:
        validate_machine(config, compute_capability=platform.compute_capability())
    except ValueError as failure:
        return str(failure)
    return None


def _paths(config: Config) -> list[str]:
    """What each node reads, but for URLs and what is made on first use."""
    data = config.data
    sets = [source.path for source in data.sources.values()] or ([] if data.generate else [data.path])
    paths = [str(Path(path) / INDEX_NAME) for path in sets if "://" not in path]
    paths += [path for path in (data.tokenizer, data.codec.path) if path is not None]
    if config.checkpoint.init_from is not None and not under_final_names(config.run_dir):
        paths.append(config.checkpoint.init_from)
    return paths


def _free_bytes(run_dir: Path) -> int:
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
