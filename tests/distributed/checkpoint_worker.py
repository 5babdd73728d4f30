"""One process of a group: saves in one layout after another, loads, and prints what differs and how training goes on.

Arguments: data directory, directory for checkpoints, JSON {name: [options]}. Each layout trains two steps, saves, loads what it
saved into a new engine and compares every tensor; then it loads what the *first* layout saved and takes the third step.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mmar_megatron import parallel
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.training import checkpoint
from tests.distributed.common import build, command, means, train


def tensors(engine: NativeEngine) -> list[Tensor]:
    """Copies of all parameters and of the optimizer's state."""
    found = [p.detach().clone() for chunk in engine.chunks for p in chunk.module.parameters()]
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for p in group["params"]:
                found += [p.detach().clone(), *(part.optimizer.state[p][k].clone() for k in ("step", "exp_avg", "exp_avg_sq"))]
    return found


def main() -> None:
    """Layout after layout in the same processes."""
    data, directory, layouts = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    first: Path | None = None
    for name, options in layouts.items():
        line = command(*options, data=data)
        engine, loader, groups = build(line)
        batch = line.config.train
        microbatches = batch.global_batch_size // (batch.micro_batch_size * groups.data.size())
        train(engine, loader, steps=2, microbatches=microbatches)
        progress = checkpoint.Progress(step=2, consumed_samples=2 * batch.global_batch_size)
        saved = checkpoint.save(engine, run_dir=directory / name, progress=progress, config_yaml="", groups=groups)
        expected = tensors(engine)
        parallel.destroy()

        engine, loader, groups = build(line)
        assert checkpoint.load(engine, saved, groups=groups) == progress
        got = tensors(engine)
        different = torch.tensor(sum(not torch.equal(a, b) for a, b in zip(expected, got, strict=True)))
        torch.distributed.all_reduce(different)

        first = first or saved
        checkpoint.load(engine, first, groups=groups)
        batches = list(islice(loader, 3 * microbatches))[2 * microbatches :]
        third = train(engine, batches, steps=1, microbatches=microbatches)[0]
        if torch.distributed.get_rank() == 0:
            print(json.dumps({name: {"different": int(different), "tensors": len(expected), "third": means(third)}}), flush=True)
        parallel.destroy()
    parallel.leave()


if __name__ == "__main__":
    main()
