"""One process of a group: trains a few steps in each of several layouts, paints and reads, and prints what came out.

Arguments: data directory, directory for gradients, number of steps, JSON {name: [options]}. The gradients of each layout's first
step are in DIRECTORY/NAME.pt. A layout whose name begins with "unpacked" has each document of a packed row in a row of its own;
one that begins with "dense" has a mask for texts alone, too.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmar_megatron import parallel
from mmar_megatron.data.batch import Batch
from mmar_megatron.diffusion.painting import ImageSampling
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.inference.images import paint
from mmar_megatron.inference.text import caption
from tests.distributed.common import build, command, means, one_document_a_row, train
from tests.distributed.gradients import keeping_gradients, stir
from tests.distributed.head_flops import head_flops

CAPTIONS = [
    "a small red circle at the top left, on a white background",
    "a large blue cross at the top right, on a tan background",
]
SAMPLINGS = (
    ImageSampling(rounds=4, steps=3, guidance_scale=2.0, sampler="ancestral"),
    ImageSampling(rounds=6, steps=3, guidance_scale=2.0, order="confidence", refresh_every=4),
)


@contextmanager
def noting_outputs(engine: NativeEngine) -> Iterator[list[int]]:
    """Within, of each output that goes to another stage: bytes of it that are still there when its gradient comes."""
    kept: list[int] = []

    def note(module: Any, args: Any, out: Any) -> None:
        if isinstance(out, torch.Tensor) and out.requires_grad:
            storage = weakref.ref(out.untyped_storage())
            out.register_hook(lambda gradient: kept.append(0 if (left := storage()) is None else left.nbytes()))

    handles = [model.register_forward_hook(note) for model in engine.models]
    yield kept
    for handle in handles:
        handle.remove()


def main() -> None:
    """Layout after layout in the same processes."""
    data, directory, steps, layouts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    for name, options in layouts.items():
        engine = weakref.ref(run_layout(name, options, data=data, directory=directory, steps=steps))
        parallel.destroy()
        gc.collect()
        assert engine() is None, f"the engine of {name} stays"
        assert len(torch.distributed.distributed_c10d._world.pg_map) == 1, f"groups of {name} stay"
    parallel.leave()


def run_layout(name: str, options: list[str], *, data: str, directory: Path, steps: int) -> NativeEngine:
    """One of them, with an engine that is closed in the end."""
    noted: list[bool] = []

    def noting(batch: Batch) -> Batch:
        noted.append(batch.causal)
        return batch

    line = command(*options, data=data)
    engine, loader, groups = build(line)
    stir(engine)
    batch = line.config.train
    microbatches = batch.global_batch_size // (batch.micro_batch_size * groups.data.size())
    changes = {"unpacked": one_document_a_row, "dense": with_a_mask}
    batches: Iterator[Batch] = map(changes.get(name.split()[0], noting), loader)
    with keeping_gradients(engine, groups=groups) as gradients, noting_outputs(engine) as kept:
        results = train(engine, batches, steps=1, microbatches=microbatches)
    results += train(engine, batches, steps=steps - 1, microbatches=microbatches)
    figures = [means(result) for result in results]
    made: dict[str, Any] = {"rows": loader.state.row, "documents": loader.state.documents, "causal": noted}
    made["microbatches"] = microbatches
    with engine.evaluating():
        figures.append(means(engine.evaluate(list(islice(batches, microbatches)))))
        painted = [paint(engine, CAPTIONS, source=loader.source, groups=groups, sampling=sampling) for sampling in SAMPLINGS]
        made["read"] = caption(engine, list(painted[0]), source=loader.source, groups=groups, max_tokens=6)
        made["painted"] = np.concatenate(painted).flatten().tolist()
        if groups.pipeline.size() == 1 and engine.last_stage is not None:
            with torch.enable_grad():
                made["head_flops"] = head_flops(engine.last_stage, tokenizer=loader.source.tokenizer, groups=groups)
    kept_outputs: list[Any] = [None] * groups.world_size
    torch.distributed.all_gather_object(kept_outputs, kept)
    if torch.distributed.get_rank() == 0:
        torch.save(gradients, directory / f"{name}.pt")
        made["kept_outputs"] = kept_outputs
        made["parameters"] = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
        print(json.dumps({name: {"figures": figures, **made}}), flush=True)
    engine.close()
    return engine


def with_a_mask(batch: Batch) -> Batch:
    """The same batch, whose attention is under the dense mask."""
    return replace(batch, causal=False)


if __name__ == "__main__":
    main()
