"""One process of a group: trains with one engine after another, and prints the figures of each step.

Arguments: data directory, directory for checkpoints, JSON {name: {"options": [...], "steps": n, "after": name, "paints": bool}}.
The first of a "start" trains from weights that are stirred; the others take the weights it began with, or go on "after" the last
checkpoint of another. Each saves a checkpoint at its end. With "paints" it paints and reads then too; with "trouble" its steps
are those of `train_in_trouble`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmar_megatron import parallel
from mmar_megatron.config import CheckpointConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.engine.base import Engine, StepResult, finite
from mmar_megatron.engine.deepspeed import DeepSpeedEngine
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.inference.images import paint
from mmar_megatron.inference.text import caption
from mmar_megatron.training import checkpoint
from mmar_megatron.training.building import build_loader
from mmar_megatron.training.checkpoint import Progress
from mmar_megatron.training.saving import CheckpointWriter
from tests.distributed.common import build_any, command, means, train
from tests.distributed.gradients import stir
from tests.distributed.layout_worker import CAPTIONS, SAMPLINGS

START = "start"


def save(engine: Engine, progress: Progress, *, run_dir: Path, groups: parallel.ParallelGroups) -> None:
    writer = CheckpointWriter(CheckpointConfig(), run_dir=run_dir, config_yaml="{}", groups=groups, say=print)
    writer.save(engine, progress=progress)
    writer.close()


def train_in_trouble(engine: Engine, batches: Iterator[Batch], *, microbatches: int) -> list[StepResult]:
    """Five steps, of which the second is judged bad, and the fourth is not finite in one microbatch of the first rank."""
    results = []
    for step in range(1, 6):
        step_batches = list(islice(batches, microbatches))
        if step == 4 and torch.distributed.get_rank() == 0:
            step_batches[0].latents_MNC.fill_(math.nan)
        verdict = (lambda _loss, _norm: "by decree") if step == 2 else finite
        results.append(engine.train_step(step_batches, learning_rate=3e-3, judge=verdict))
    return results


def bytes_on_rank(engine: DeepSpeedEngine) -> dict[str, int]:
    """What this rank keeps of weights and of the optimizer's state between steps."""
    weights = list(engine.model.parameters())
    if engine.stage == 3:
        weights = [parameter.ds_tensor for parameter in weights]
    masters = [] if engine.stage == 0 else engine._flat
    moments = [engine.optimizer.state[part][name] for part in engine._flat for name in ("exp_avg", "exp_avg_sq")]
    size = {"weights": weights, "optimizer": [*masters, *moments]}
    return {name: sum(tensor.numel() * tensor.element_size() for tensor in tensors) for name, tensors in size.items()}


def apart(engine: DeepSpeedEngine, *, groups: parallel.ParallelGroups) -> float:
    """The largest difference between tensor-parallel ranks in what each of them holds whole."""
    largest = 0.0
    for parameter in engine.model.parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            own = engine._weights(parameter)
            most, least = own.clone(), own.clone()
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=groups.tensor)
            torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=groups.tensor)
            largest = max(largest, float((most - least).max()))
    return largest


def main() -> None:
    """Engine after engine in the same processes."""
    data, directory, runs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    linear = F.linear
    for name, run in runs.items():
        progress = Progress()
        line = command(*run["options"], data=data)
        engine, loader, groups = build_any(line)
        if after := run.get("after"):
            progress = checkpoint.load(engine, checkpoint.resolve(directory / after), groups=groups)
            loader = build_loader(line.config, source=loader.source, groups=groups, state=progress.stream)
        elif (start := directory / run.get("start", START)).exists():
            checkpoint.load_weights(engine, checkpoint.directory(start, step=0))
        else:
            assert isinstance(engine, NativeEngine)
            stir(engine)
            save(engine, progress, run_dir=start, groups=groups)
        batch = line.config.train
        microbatches = batch.global_batch_size // (batch.micro_batch_size * groups.data.size())
        batches = iter(loader)
        if run.get("trouble"):
            results = train_in_trouble(engine, batches, microbatches=microbatches)
        else:
            results = train(engine, batches, steps=run["steps"], microbatches=microbatches, lr=run.get("lr", 3e-3))
        made: dict[str, Any] = {"figures": [means(result) for result in results]}
        made["skipped"] = [result.skipped is not None for result in results]
        save(
            engine,
            Progress(step=progress.step + run["steps"], stream=loader.state),
            run_dir=directory / name,
            groups=groups,
        )
        with engine.evaluating():
            made["figures"].append(means(engine.evaluate(list(islice(batches, microbatches)))))
            if run.get("paints"):
                painted = paint(engine, CAPTIONS, source=loader.source, groups=groups, sampling=SAMPLINGS[0])
                made["read"] = caption(engine, list(painted), source=loader.source, groups=groups, max_tokens=6)
                made["painted"] = painted.flatten().tolist()
        if isinstance(engine, DeepSpeedEngine):
            made["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
            made["bytes"] = bytes_on_rank(engine)
            made["apart"] = apart(engine, groups=groups)
        if torch.distributed.get_rank() == 0:
            print(json.dumps({name: made}), flush=True)
        engine.close()
        assert F.linear is linear, f"{name} leaves another linear function behind"
        parallel.destroy()
    parallel.leave()


if __name__ == "__main__":
    main()
