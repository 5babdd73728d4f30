"""One process of a group: saves in one layout after another, loads, and prints what differs and how training goes on.

Arguments: data directory, directory for checkpoints, JSON {name: [options]}. Each layout trains two steps, saves, loads what it
saved into a new engine and compares every tensor; then it loads what the *first* layout saved and takes the third step.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from mmar_megatron import parallel
from mmar_megatron.config import CheckpointConfig, ParallelConfig
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.training import checkpoint
from mmar_megatron.training.saving import CheckpointWriter
from tests.distributed.common import build, command, means, train


def tensors(engine: NativeEngine) -> list[Tensor]:
    """Copies of all parameters and of the optimizer's state."""
    found = [p.detach().clone() for chunk in engine.chunks for p in chunk.module.parameters()]
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for p in group["params"]:
                found += [p.detach().clone(), *(part.optimizer.state[p][k].clone() for k in ("step", "exp_avg", "exp_avg_sq"))]
    assert engine.average is not None
    return found + [average.clone() for average in engine.average._averages]


def averages(engine: NativeEngine) -> float:
    """One figure of the average of all weights, which any layout must agree on: the sum of its squares."""
    total = torch.zeros((), dtype=torch.float64)
    for shard in nested_values(engine.sharded_state_dict()["average"]):
        if is_main_replica(shard.replica_id):
            total += shard.data.double().square().sum()
    torch.distributed.all_reduce(total)
    return float(total)


def main() -> None:
    """Layout after layout in the same processes."""
    data, directory, layouts = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    first: Path | None = None
    for name, options in layouts.items():
        line = command(*options, "--optimizer.ema_decay=0.5", data=data)
        engine, loader, groups = build(line)
        batch = line.config.train
        microbatches = batch.global_batch_size // (batch.micro_batch_size * groups.data.size())
        train(engine, loader, steps=2, microbatches=microbatches)
        progress = checkpoint.Progress(step=2, stream=loader.state)
        config = CheckpointConfig(async_save=name.startswith("DP2"))
        writer = CheckpointWriter(config, run_dir=directory / name, config_yaml="{}", groups=groups, say=print)
        writer.save(engine, progress=progress)
        expected = tensors(engine)
        writer.close()
        saved = checkpoint.directory(directory / name, step=2)
        engine.close()
        parallel.destroy()

        engine, loader, groups = build(line)
        assert checkpoint.newest_good(directory / name, groups=groups) == saved
        assert checkpoint.load(engine, saved, groups=groups) == progress
        got = tensors(engine)
        different = torch.tensor(sum(not torch.equal(a, b) for a, b in zip(expected, got, strict=True)))
        torch.distributed.all_reduce(different)

        first = first or saved
        checkpoint.load(engine, first, groups=groups)
        batches = list(islice(loader, 3 * microbatches))[2 * microbatches :]
        third = train(engine, batches, steps=1, microbatches=microbatches)[0]
        found = {"different": int(different), "tensors": len(expected), "third": means(third), "average": averages(engine)}
        print_if_first({name: found})
        engine.close()
        parallel.destroy()
    print_if_first({"other storage": refusals(first, elsewhere=directory / "nowhere")})
    parallel.leave()


def refusals(saved: Path | None, *, elsewhere: Path) -> list[str]:
    """What is said where rank 1 does not see the storage of rank 0: of a checkpoint, of a run directory."""
    assert saved is not None
    groups = parallel.initialize(ParallelConfig())
    seen = {0: saved}.get(torch.distributed.get_rank(), elsewhere / "checkpoints" / saved.name)
    said = []
    for look in (checkpoint.problems, checkpoint.resolve, checkpoint.newest_good):
        try:
            look(seen.parents[1] if look is checkpoint.newest_good else seen, groups=groups)
        except ValueError as error:
            said.append(str(error))
    return said


def print_if_first(found: dict[str, Any]) -> None:
    """As a line of JSON."""
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
