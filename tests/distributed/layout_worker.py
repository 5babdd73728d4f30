"""One process of a group: trains a few steps in each of several layouts, paints and reads, and prints what came out.

Arguments: data directory, number of steps, JSON {name: [options]}.
"""

from __future__ import annotations

import json
import sys
from itertools import islice

import torch

from mmar_megatron import parallel
from mmar_megatron.inference.images import ImageSampling, paint
from mmar_megatron.inference.text import caption
from tests.distributed.common import build, command, means, train

CAPTIONS = [
    "a small red circle at the top left, on a white background",
    "a large blue cross at the top right, on a tan background",
]
SAMPLING = ImageSampling(rounds=4, steps=3, guidance_scale=2.0, sampler="ancestral")


def main() -> None:
    """Layout after layout in the same processes."""
    data, steps, layouts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    for name, options in layouts.items():
        line = command(*options, data=data)
        engine, loader, groups = build(line)
        batch = line.config.train
        microbatches = batch.global_batch_size // (batch.micro_batch_size * groups.data.size())
        figures = [means(result) for result in train(engine, loader, steps=steps, microbatches=microbatches)]
        with engine.evaluating():
            figures.append(means(engine.evaluate(list(islice(loader, microbatches)))))
            painted = paint(engine, CAPTIONS, source=loader.source, groups=groups, sampling=SAMPLING)
            read = caption(engine, list(painted), source=loader.source, groups=groups, max_tokens=6)
        if torch.distributed.get_rank() == 0:
            made = {"painted": painted.flatten().tolist(), "read": read}
            print(json.dumps({name: {"figures": figures, **made}}), flush=True)
        parallel.destroy()
    parallel.leave()


if __name__ == "__main__":
    main()
