"""What a layout takes on GPUs that need not be at hand: memory, what is sent, and the time of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from mmar_megatron.config import frees_sent_outputs
from mmar_megatron.scaling.flops import StepFlops
from mmar_megatron.scaling.footprint import Activations, Footprint
from mmar_megatron.scaling.gpus import Gpu
from mmar_megatron.scaling.layout import Layout
from mmar_megatron.scaling.pieces import EACH_LAYER, NO_LAYER, Footprints, Recomputation, in_flight, most_at_a_time
from mmar_megatron.scaling.plan import Memory
from mmar_megatron.scaling.timing import GOOD, POOR, Clock, Range, peaks_of
from mmar_megatron.scaling.traffic import sent_in_a_step

RESERVE = 4 * 2**30
"""Bytes set aside on each GPU for CUDA, NCCL, the workspaces of libraries, and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """Of one rank of a pipeline stage, with the fullest rows; bytes."""

    layers: tuple[int, ...]
    """In each of its chunks."""
    in_flight: int
    """Passes of chunks whose activations are there at a time."""
    model: Memory
    activations: Activations
    """As configured, when they are most."""
    without_recompute: Activations
    """If no layer were recomputed."""
    with_recompute: Activations
    """If each layer were."""
    batches: int
    """Of a step's microbatches, which wait on the device."""
    buffers: int
    """DeepSpeed's."""
    seconds: Range
    """Of its own work in one step."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.total_of(self.activations)

    def total_of(self, activations: Activations) -> int:
        """All of it, with these activations."""
        return self.model.total + activations.total + self.batches + self.buffers


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Of a layout."""

    layout: Layout
    gpu: Gpu
    stages: tuple[StageForecast, ...]
    traffic: Mapping[str, int]
    """Bytes that the busiest rank sends in a step, by kind."""
    bubble: Range
    """Share of the pipeline's time in which the average stage waits for others."""
    step: Range
    """Seconds."""
    mfu: Range

    @property
    def needed(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.total for stage in self.stages) + RESERVE

    @property
    def fits(self) -> bool:
        """Into the GPU's memory."""
        return self.needed <= self.gpu.memory


def forecast(layout: Layout, *, footprints: Footprints, flops: StepFlops, gpu: Gpu) -> Forecast:
    """Of one layout.

    Args:
        layout: what runs.
        footprints: at its tensor-parallel size, of one sequence with the fullest rows.
        flops: expected of a step, without recomputation.
        gpu: what it runs on.

    Raises:
        ValueError: no peak of the GPU is known in this precision, or DeepSpeed offloads, which is not forecast.
    """
    deepspeed = layout.config.deepspeed
    if layout.zero_stage is not None and (deepspeed.offload_optimizer or deepspeed.offload_parameters):
        raise ValueError(
            "The time of offloading is not forecast: leave out deepspeed.offload_*, or use --dry_run for the memory."
        )
    chunks = [_chunks(layout, stage, footprints=footprints) for stage in range(layout.stages)]
    sent = [sent_in_a_step(layout, stage, chunks=of_stage, tied=footprints.tied) for stage, of_stage in enumerate(chunks)]
    clocks = [Clock(layout, flops=flops, gpu=gpu, shares=shares) for shares in (GOOD, POOR)]
    stages = [
        _stage(layout, stage, footprints=footprints, seconds=Range(*(clock.stage_s(stage, sent=sent[stage]) for clock in clocks)))
        for stage in range(layout.stages)
    ]
    step, bubble = [], []
    for k, clock in enumerate(clocks):
        seconds = [stage.seconds[k] for stage in stages]
        optimizer = max(stage.model.optimizer for stage in stages)
        step.append(clock.step_s(seconds, sent=sent, optimizer=optimizer, overlapped=clock.shares is GOOD))
        bubble.append(1 - fmean(seconds) / clock.pipeline_s(seconds))
    return Forecast(
        layout=layout,
        gpu=gpu,
        stages=tuple(stages),
        traffic=max(sent, key=lambda of_stage: sum(of_stage.values())),
        bubble=Range(*bubble),
        step=Range(*step),
        mfu=Range(*(peaks_of(gpu, layout).seconds(flops) / (seconds * layout.world_size) for seconds in step)),
    )


def _chunks(layout: Layout, stage: int, *, footprints: Footprints, recompute: Recomputation | None = None) -> list[Footprint]:
    """Of a microbatch; recomputation is as configured, or another."""
    recompute = recompute or Recomputation.of(layout.config.model.backbone)
    sequences = layout.config.train.micro_batch_size
    found = [footprints.of(piece, recompute=recompute).times(sequences) for piece in layout.pieces(stage)]
    return found if frees_sent_outputs(layout.config.parallel) else [chunk.keeping_output() for chunk in found]


def _stage(layout: Layout, stage: int, *, footprints: Footprints, seconds: Range) -> StageForecast:
    schedule = {"stage": stage, "stages": layout.stages, "microbatches": layout.microbatches}
    configured, without, with_all = (
        _chunks(layout, stage, footprints=footprints, recompute=recompute) for recompute in (None, NO_LAYER, EACH_LAYER)
    )
    parameters = sum(chunk.parameters for chunk in configured)
    return StageForecast(
        layers=tuple(piece.layers for piece in layout.pieces(stage)),
        in_flight=in_flight(layout.chunks, **schedule),
        model=Memory.planned(layout.config, parameters, data_parallel_size=layout.data),
        activations=most_at_a_time(configured, **schedule),
        without_recompute=most_at_a_time(without, **schedule),
        with_recompute=most_at_a_time(with_all, **schedule),
        batches=configured[0].batch * layout.microbatches,
        buffers=_buffers(layout, parameters),
        seconds=seconds,
    )


def _buffers(layout: Layout, parameters: int) -> int:
    """DeepSpeed's: buckets of gradients as they are made and as they are reduced; of stage 3 the parameters that are gathered."""
    if not layout.zero_stage:
        return 0
    options = layout.config.deepspeed.zero_options
    bucket = min(parameters, int(options.get("reduce_bucket_size", 5e8)))
    live = min(parameters, int(options.get("stage3_max_live_parameters", 1e9))) if layout.zero_stage == 3 else 0
    return bucket * (layout.weight_bytes + 4) + live * layout.weight_bytes
