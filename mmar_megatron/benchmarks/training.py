"""The training step with and without an option, or beside plain PyTorch; checkpoints in the foreground and in the background."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmar_megatron import parallel, platform
from mmar_megatron.benchmarks.parts import measure_parts
from mmar_megatron.benchmarks.plain import PlainModel, PlainTrainer
from mmar_megatron.benchmarks.timing import in_turn, median, ratio
from mmar_megatron.config import CheckpointConfig, Config, parse_command_line
from mmar_megatron.config_checks import validate_world
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.source import DataSource
from mmar_megatron.engine.base import Engine
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.scaling.split import split_pipeline
from mmar_megatron.training import checkpoint
from mmar_megatron.training.building import build_engine, build_loader, open_data
from mmar_megatron.training.checkpoint import Progress
from mmar_megatron.training.saving import CheckpointWriter


def compare_steps(options: Sequence[str], *, variant: Sequence[str], rounds: int) -> dict[str, Any]:
    """Seconds of a step as configured and with the options of the variant too, and their ratio."""
    config, other = (parse_command_line([*options, *more]).config for more in ((), variant))
    if other.parallel != config.parallel or other.data != config.data:
        raise ValueError("The variant changes layout or data: such runs are compared in two runs, by tools/plot_run.py.")
    config, source, groups = prepare(config)
    engines = [build_engine(c, source=source, groups=groups) for c in (config, split_pipeline(other, source))]
    microbatches = one_step_of_data(config, source=source, groups=groups)

    def step(engine: Engine) -> None:
        engine.train_step(microbatches, learning_rate=config.optimizer.lr)

    base_s, variant_s = in_turn([partial(step, engine) for engine in engines], rounds=rounds)
    return {"variant": shlex.join(variant), "step_s": median(base_s), "variant_step_s": median(variant_s)} | ratio(
        variant_s, base_s
    )


def compare_with_plain(options: Sequence[str], *, rounds: int) -> dict[str, Any]:
    """Seconds of a step, and of the same step of the same model in plain PyTorch; how far loss and gradient of the first differ;
    and what the step's parts take.

    Args:
        options: of pretrain_mmar.py. In bf16 plain PyTorch computes under autocast, as it has no fp32 weights beside others.
        rounds: of which medians are taken.

    Raises:
        ValueError: several processes, another engine, or a model that plain PyTorch lacks, so that the losses differ.
    """
    config = parse_command_line(options).config
    if config.engine != "native" or platform.world_size() > 1:
        raise ValueError("plain PyTorch is held against the engine native on one process: give --variant, or leave the rest out")
    config, source, groups = prepare(config)
    engine = build_engine(config, source=source, groups=groups)
    assert isinstance(engine, NativeEngine)
    assert engine.last_stage is not None
    bf16 = config.precision.dtype == "bf16"
    plain = PlainTrainer(PlainModel(config.model, engine.last_stage), config.optimizer, bf16=bf16)
    microbatches = one_step_of_data(config, source=source, groups=groups)

    def step() -> tuple[float, float]:
        result = engine.train_step(microbatches, learning_rate=config.optimizer.lr)
        return result.loss, result.grad_norm

    def plain_step() -> tuple[float, float]:
        return plain.train_step(microbatches)

    loss_apart, norm_apart = (abs(a / b - 1) for a, b in zip(step(), plain_step(), strict=True))
    if (apart := max(loss_apart, norm_apart)) > (0.02 if bf16 else 1e-4):
        raise ValueError(f"loss and gradient are {apart:.2g} off those of plain PyTorch, which lacks an option: leave that out")
    engine_s, plain_s = in_turn([step, plain_step], rounds=rounds)
    sizes = {"parameters": sum(p.numel() for p in plain.model.parameters()), "dtype": config.precision.dtype}
    seconds = {"engine_step_s": median(engine_s), "plain_step_s": median(plain_s), **ratio(engine_s, plain_s)}
    differences = {"relative_loss_difference": loss_apart, "relative_grad_norm_difference": norm_apart}
    parts = measure_parts(engine, microbatches, learning_rate=config.optimizer.lr, rounds=rounds)
    return {**sizes, **seconds, **differences, "rows": parts}


def compare_saves(options: Sequence[str], *, directory: Path | None, rounds: int) -> dict[str, Any]:
    """Seconds for which `save` holds up training in both modes, the bytes of a checkpoint, and seconds to verify one."""
    config, source, groups = prepare(parse_command_line(options).config)
    engine = build_engine(config, source=source, groups=groups)
    engine.train_step(one_step_of_data(config, source=source, groups=groups), learning_rate=config.optimizer.lr)
    shared = [tempfile.mkdtemp(prefix="benchmark-", dir=directory) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(shared, group=groups.control)
    run_dir = Path(str(shared[0]))
    writers = [
        CheckpointWriter(
            CheckpointConfig(async_save=background, on_failure="stop"),
            run_dir=run_dir,
            config_yaml="{}",
            groups=groups,
            say=print,
        )
        for background in (False, True)
    ]

    def save(writer: CheckpointWriter) -> None:
        writer.save(engine, progress=Progress(step=1))

    try:
        foreground_s, background_s = in_turn([partial(save, writer) for writer in writers], rounds=rounds, after=writers[1].flush)
        path = checkpoint.directory(run_dir, step=1)
        (verify_s,) = in_turn([partial(checkpoint.problems, path, groups=groups)], rounds=rounds)
        size = sum(file.stat().st_size for file in path.iterdir())
    finally:
        torch.distributed.barrier(group=groups.control)
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(run_dir)
    seconds = {"foreground_s": median(foreground_s), "background_s": median(background_s), "verify_s": median(verify_s)}
    return {"bytes": size, **seconds, **ratio(background_s, foreground_s)}


def prepare(config: Config) -> tuple[Config, DataSource, ParallelGroups]:
    """Groups and data of a configuration, and it with its pipeline split."""
    validate_world(config, world_size=platform.world_size())
    groups = parallel.initialize(config.parallel)
    platform.seed_everything(config.seed, tensor_rank=groups.tensor.rank())
    source = open_data(config, groups=groups)
    return split_pipeline(config, source), source, groups


def one_step_of_data(config: Config, *, source: DataSource, groups: ParallelGroups) -> list[Batch]:
    """This rank's microbatches of the first step."""
    train = config.train
    loader = build_loader(config, source=source, groups=groups)
    with closing(iter(loader)) as batches:
        return list(islice(batches, train.global_batch_size // (train.micro_batch_size * groups.data.size())))
