"""What is wrong with a job's machines, each finding one sentence with its fix. Pure functions of what the ranks have seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mmar_megatron.cluster.facts import Facts

_FEW_OPEN_FILES = 4096
_LITTLE_SHARED_MEMORY = 2**30
_OTHERS_MEMORY = 4 * 2**30
"""On a GPU, beyond what CUDA itself takes for each process that looks at it."""
_CLOCK_S = 2.0
_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence. A run with an error would fail or learn something else; one with a warning may."""

    severity: Literal["error", "warning"]
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run asks of its machines."""

    transformer_engine: bool
    tensor_parallel: bool
    loader_processes: bool
    run_dir: str
    checkpoint_bytes: int
    kept_checkpoints: int
    """That are to lie there beside those that do."""


def error(text: str) -> Finding:
    """One that ends the job."""
    return Finding(severity="error", text=text)


def warning(text: str) -> Finding:
    """One that does not."""
    return Finding(severity="warning", text=text)


def of_machines(ranks: Sequence[Facts], *, needs: Needs) -> list[Finding]:
    """Everything that follows from the facts of all ranks."""
    nodes = [facts for facts in ranks if facts.local_rank == 0]
    parts = (
        _versions(nodes),
        _packages(nodes, needs=needs),
        _gpus(nodes),
        _each_gpu(ranks, needs=needs),
        _files(nodes),
        _limits(nodes, needs=needs),
    )
    return [finding for part in parts for finding in part]


def of_clocks(offsets_s: Sequence[float], *, ranks: Sequence[Facts]) -> list[Finding]:
    """Args: offsets_s: how far each rank's clock is ahead of the first's."""
    return [
        warning(
            f"the clock of {facts.place} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} {ranks[0].place}'s: "
            "have both follow a time server, or logs of one moment bear different times and object stores may refuse requests"
        )
        for offset, facts in zip(offsets_s, ranks, strict=True)
        if facts.local_rank == 0 and abs(offset) > _CLOCK_S
    ]


def of_room(free_bytes: int, *, needs: Needs) -> list[Finding]:
    """Args: free_bytes: where the run directory is."""
    room = f"{needs.run_dir} has room for {free_bytes / 1e9:,.1f} GB"
    if free_bytes < needs.checkpoint_bytes:
        return [error(f"{room}, but a checkpoint takes {needs.checkpoint_bytes / 1e9:,.1f} GB: choose another run_dir")]
    together = needs.checkpoint_bytes * needs.kept_checkpoints
    if free_bytes < together:
        return [
            warning(
                f"{room}, but the {needs.kept_checkpoints} further checkpoints that are kept take {together / 1e9:,.1f} GB: "
                "lower checkpoint.keep_last or choose another run_dir"
            )
        ]
    return []


# --- of machines ----------------------------------------------------------------------------------------------------------------


def _versions(nodes: Sequence[Facts]) -> Iterator[Finding]:
    for name in nodes[0].versions:
        if differing := _differing((facts.versions[name], facts) for facts in nodes):
            yield error(f"{name} differs, {differing}: install the same versions on all of them")
    if differing := _differing((str(facts.driver), facts) for facts in nodes):
        yield warning(f"the GPUs' driver differs, {differing}: have them all on one")


def _packages(nodes: Sequence[Facts], *, needs: Needs) -> Iterator[Finding]:
    if wrong := [facts for facts in nodes if facts.wrong_apex]:
        yield error(
            f"{_places(wrong)} has a package named apex ({wrong[0].wrong_apex}), which is not NVIDIA's, but megatron-core would "
            "take it for that: pip uninstall apex; nothing here needs either"
        )
    missing = [facts for facts in nodes if facts.versions["transformer_engine"] == "not installed"]
    if needs.transformer_engine and missing:
        yield error(
            f"the model's layers are of Transformer Engine, which {_places(missing)} lacks: "
            "pip install --no-build-isolation -r requirements-gpu.txt"
        )


def _gpus(nodes: Sequence[Facts]) -> Iterator[Finding]:
    without = [facts for facts in nodes if not facts.gpus]
    if idle := [facts for facts in without if facts.driver is not None]:
        yield error(
            f"torch {idle[0].versions['torch']} cannot use the GPUs of {_places(idle)}: take one for driver {idle[0].driver}"
        )
    elif len(without) == len(nodes):
        yield warning("no node has a GPU, so the run will be on CPUs: if that is not meant, ask the scheduler for GPUs")
    elif without:
        yield error(f"{_places(without)} has no GPU, but others have: leave it out, or ask the scheduler for GPUs on all")
    for facts in nodes:
        if 0 < len(facts.gpus) < facts.processes:
            yield error(
                f"{facts.place} has {len(facts.gpus)} GPUs for {facts.processes} processes: set NPROC to {len(facts.gpus)} on "
                "all nodes, or leave that one out"
            )
        elif len(facts.gpus) > facts.processes:
            yield warning(
                f"{facts.place} has {len(facts.gpus)} GPUs, of which {len(facts.gpus) - facts.processes} stay idle: raise NPROC"
            )
    kinds = [(name, facts) for facts in nodes for name in sorted(set(facts.gpus))]
    if differing := _differing(kinds):
        yield error(f"the GPUs are not alike, {differing}, and the slowest would set the pace: ask the scheduler for one kind")


def _each_gpu(ranks: Sequence[Facts], *, needs: Needs) -> Iterator[Finding]:
    for facts in ranks:
        if facts.gpu_used_bytes > _OTHERS_MEMORY:
            yield error(
                f"GPU {facts.local_rank} of {facts.place} has {facts.gpu_used_bytes / 2**30:.1f} GiB in use by other processes: "
                "end those that nvidia-smi shows, or leave the node out"
            )
    if needs.tensor_parallel and any(facts.reorders_launches for facts in ranks):
        yield warning(
            "CUDA_DEVICE_MAX_CONNECTIONS is not 1, without which tensor parallelism does not overlap communication: export it"
        )


def _files(nodes: Sequence[Facts]) -> Iterator[Finding]:
    for path in nodes[0].sizes:
        missing = [facts for facts in nodes if facts.sizes[path] is None]
        if len(missing) == len(nodes):
            yield error(f"{path} is not there: make it, or change the option that names it")
        elif missing:
            yield error(f"{path} is not there on {_places(missing)}: put it on storage that all nodes share")
        elif differing := _differing((f"{facts.sizes[path]} bytes", facts) for facts in nodes):
            yield error(f"{path} differs, {differing}: put it on storage that all nodes share")


def _limits(nodes: Sequence[Facts], *, needs: Needs) -> Iterator[Finding]:
    few = [facts for facts in nodes if facts.open_files < _FEW_OPEN_FILES]
    if few:
        yield warning(
            f"a process on {_places(few)} may open {few[0].open_files} files, and loaders need thousands: "
            f"raise the limit (ulimit -n, limits.conf, or docker's --ulimit nofile) to {_FEW_OPEN_FILES} or more"
        )
    small = [facts for facts in nodes if facts.shared_memory_bytes < _LITTLE_SHARED_MEMORY]
    if needs.loader_processes and small:
        yield warning(
            f"/dev/shm of {_places(small)} has {small[0].shared_memory_bytes / 2**20:.0f} MiB, and loaders pass batches there: "
            "enlarge it (docker's --shm-size or --ipc=host), or set data.num_workers 0"
        )


def _differing(values: Iterable[tuple[str, Facts]]) -> str:
    """`a on node 0 (x), b on node 1 (y)`; empty where there is one value."""
    by_value: dict[str, list[Facts]] = defaultdict(list)
    for value, facts in values:
        by_value[value].append(facts)
    return ", ".join(f"{value} on {_places(where)}" for value, where in by_value.items()) if len(by_value) > 1 else ""


def _places(nodes: Sequence[Facts]) -> str:
    """The first of them by name."""
    named = ", ".join(facts.place for facts in nodes[:_NAMED])
    return named + (f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else "")
