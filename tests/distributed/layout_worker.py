"""One process of a group: trains a few steps in each of several layouts and prints what came out.

Arguments: data directory, number of steps, JSON {name: [options]}.
"""

from __future__ import annotations

import json
import sys
from itertools import islice

import torch

from mmar_megatron import parallel
from tests.distributed.common import build, command, means, train


def main() -> None:
    """Layout after layout in the same processes."""
    data, steps, layouts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    for name, options in layouts.items():
        line = command(*options, data=data)
        engine, loader, groups = build(line)
        batch = line.config.train
        microbatches = batch.global_batch_size // (batch.micro_batch_size * groups.data.size())
        results = train(engine, loader, steps=steps, microbatches=microbatches)
        with engine.evaluating():
            results.append(engine.evaluate(list(islice(loader, microbatches))))
        if torch.distributed.get_rank() == 0:
            print(json.dumps({name: [means(result) for result in results]}), flush=True)
        parallel.destroy()
    parallel.leave()


if __name__ == "__main__":
    main()
