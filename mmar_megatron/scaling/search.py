"""Layouts of one model on a number of GPUs: those that fit, fastest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mmar_megatron.config import Config
from mmar_megatron.config_checks import fp8_misfit
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.scaling.flops import StepFlops
from mmar_megatron.scaling.footprint import Microbatch
from mmar_megatron.scaling.forecast import Forecast, forecast
from mmar_megatron.scaling.gpus import Gpu
from mmar_megatron.scaling.layout import Layout
from mmar_megatron.scaling.pieces import EACH_LAYER, NO_LAYER, Footprints, Recomputation

MICRO_BATCH_SIZES = (1, 2, 4, 8)
CHUNKS = (None, 2, 4)
ZERO_STAGES = (2, 3)
"""In bf16 the only ones; where all of the optimizer's state fits on each GPU, the native engine does without its copies."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    layouts: int
    """Looked at."""
    fitting: tuple[Forecast, ...]
    """Fastest first, by the middle of what is forecast."""
    smallest: Forecast
    """Of all, the one that needs least memory."""


def search(
    config: Config,
    *,
    world_size: int,
    gpu: Gpu,
    flops: StepFlops,
    row: Microbatch,
    geometry: ImageGeometry,
    vocab_size: int,
    say: Callable[[str], None],
) -> Found:
    """Look at all layouts that the model and the batch allow; tensor parallelism stays within a machine.

    Args:
        config: whose layout, micro-batch size, recomputation and engine are varied. All else stays, the global batch too.
        world_size: GPUs.
        gpu: which.
        flops: expected of a step.
        row: the fullest sequence there is.
        geometry: grid and channels of the image codec.
        vocab_size: of the tokenizer.
        say: where progress goes.

    Raises:
        ValueError: no layout divides the model and the batch over so many GPUs, or an option contradicts what is varied.
    """
    if config.model.backbone.distribute_saved_activations:
        raise ValueError("A search varies recomputation: leave out model.backbone.distribute_saved_activations.")
    forecasts = []
    for tensor in (size for size in (1, 2, 4, 8) if size <= gpu.per_node):
        found = [
            variant
            for recompute in (NO_LAYER, EACH_LAYER)
            for variant in variants(config, tensor=tensor, recompute=recompute, world_size=world_size)
        ]
        if not found:
            continue
        say(f"{len(found)} layouts with tensor parallelism {tensor}")
        footprints = Footprints(found[0], microbatch=row, geometry=geometry, vocab_size=vocab_size)
        for variant in found:
            layout = Layout.of(variant, world_size=world_size, flops=flops)
            forecasts.append(forecast(layout, footprints=footprints, flops=flops, gpu=gpu))
    if not forecasts:
        raise ValueError(
            f"No layout divides the model and train.global_batch_size {config.train.global_batch_size} over {world_size} GPUs: "
            "change one of them."
        )
    fitting = sorted((one for one in forecasts if one.fits), key=lambda one: sum(one.step))
    return Found(layouts=len(forecasts), fitting=tuple(fitting), smallest=min(forecasts, key=lambda one: one.needed))


def variants(config: Config, *, tensor: int, recompute: Recomputation, world_size: int) -> Iterator[Config]:
    """All that a tensor-parallel size allows with this recomputation."""
    backbone, batch = config.model.backbone, config.train.global_batch_size
    divided = (backbone.num_attention_heads, backbone.num_query_groups, config.model.make_vocab_size_divisible_by)
    if any(number % tensor for number in (world_size, config.data.sequence_length, *divided)):
        return
    for stages, chunks, sequences in product(_divisors(world_size // tensor), CHUNKS, MICRO_BATCH_SIZES):
        replicas = world_size // (tensor * stages)
        if stages * (chunks or 1) > backbone.num_layers or batch % (replicas * sequences):
            continue
        microbatches = batch // (replicas * sequences)
        if chunks is not None and (stages == 1 or microbatches % stages):
            continue
        native_alone = stages > 1 or config.optimizer.ema_decay > 0 or backbone.transformer_impl != "local"
        for zero_stage in [None] if native_alone else [None, *ZERO_STAGES]:
            variant = _variant(
                config,
                tensor=tensor,
                stages=stages,
                chunks=chunks,
                sequences=sequences,
                zero_stage=zero_stage,
                recompute=recompute,
            )
            if config.precision.fp8 == "off" or fp8_misfit(variant) is None:
                yield variant


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _variant(
    config: Config, *, tensor: int, stages: int, chunks: int | None, sequences: int, zero_stage: Any, recompute: Recomputation
) -> Config:
    backbone = recompute.applied(config.model.backbone)
    backbone.tensor_model_parallel_size = tensor
    backbone.sequence_parallel = tensor > 1
    layout = replace(
        config.parallel,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        pipeline_split="auto" if stages > 1 else "even",
        overlap_p2p_comm=config.parallel.overlap_p2p_comm or chunks is not None,
        overlap_grad_reduce=zero_stage is None,
        overlap_param_gather=zero_stage is None,
    )
    return replace(
        config,
        model=replace(config.model, backbone=backbone),
        parallel=layout,
        train=replace(config.train, micro_batch_size=sequences),
        engine="native" if zero_stage is None else "deepspeed",
        deepspeed=config.deepspeed if zero_stage is None else replace(config.deepspeed, zero_stage=zero_stage),
    )


def options_of(layout: Layout) -> list[str]:
    """Of pretrain_mmar.py, that lead to a layout of a search."""
    config = layout.config
    parallel, train = config.parallel, config.train
    options = {
        "engine": config.engine,
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "parallel.sequence_parallel": str(parallel.sequence_parallel).lower(),
        "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "parallel.virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size or "null",
        "parallel.pipeline_split": parallel.pipeline_split,
        "parallel.overlap_p2p_comm": str(parallel.overlap_p2p_comm).lower(),
        "parallel.overlap_grad_reduce": str(parallel.overlap_grad_reduce).lower(),
        "parallel.overlap_param_gather": str(parallel.overlap_param_gather).lower(),
        "train.micro_batch_size": train.micro_batch_size,
        "model.backbone.recompute_granularity": config.model.backbone.recompute_granularity or "null",
        "model.backbone.recompute_method": config.model.backbone.recompute_method or "null",
        "model.backbone.recompute_num_layers": config.model.backbone.recompute_num_layers or "null",
    }
    if layout.zero_stage is not None:
        options["deepspeed.zero_stage"] = layout.zero_stage
    return [f"--{name} {value}" for name, value in options.items()]
