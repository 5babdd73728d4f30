"""What a run needs, before it runs: the parameters and memory of each pipeline stage, the operations of a step.

Nothing is estimated that can be built. Each stage of the configured layout is made by the very code that trains, on torch's meta
device, where tensors have shapes and no storage, and within process groups that are only pretended. So a job of a thousand
processes is planned in one, in about a second. Activations and communication buffers are not counted.

N tokens of an image.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

from mmar_megatron import parallel
from mmar_megatron.config import Config, DeepSpeedConfig, TransformerConfig
from mmar_megatron.config_checks import validate_world
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import MMARModel, build_model
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.scaling.expected import RowMeans, expected_counts, expected_flops
from mmar_megatron.scaling.flops import StepCounts, StepFlops
from mmar_megatron.scaling.split import PipelineCosts, max_repeated_layers
from mmar_megatron.scaling.tables import columns, size

_BYTES = {"fp32": (4, 4, 8), "bf16": (2, 4, 12)}
"""Bytes for each parameter: weight, gradient (summed in fp32), optimizer (two moments, and beside bf16 the fp32 weight)."""
_AVERAGE_BYTES = 4
"""For each parameter, in the optimizer's shards, where a moving average of the weights is kept."""

_PARTS = {
    "decoder.": "backbone",
    "embedding.word_embeddings.": "words",
    "output_layer.": "words",
    "embedding.embedding_vit.": "EmbeddingViT",
    "embedding.": "projectors",  # with the mask embedding and the image positions
    "post_projector.": "projectors",
    "alignment_projector.": "projectors",
    "diffusion_head.": "diffusion head",
}
"""What a parameter belongs to, by how its name in checkpoints begins; the first that fits counts."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each rank of a stage."""

    weights: int
    gradients: int
    optimizer: int
    """This rank's shard: the distributed optimizer and ZeRO divide its state over the data-parallel ranks."""

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer

    @classmethod
    def planned(cls, config: Config, parameters: int, *, data_parallel_size: int) -> Memory:
        """Of the configured engine."""
        dtype = config.precision.dtype
        if config.engine == "deepspeed":
            return cls.of_zero(parameters, config=config.deepspeed, dtype=dtype, data_parallel_size=data_parallel_size)
        average = config.optimizer.ema_decay > 0
        return cls.of(parameters, dtype=dtype, average=average, data_parallel_size=data_parallel_size)

    @classmethod
    def of(cls, parameters: int, *, dtype: str, average: bool, data_parallel_size: int) -> Memory:
        """Of the native engine, but for the few bytes by which it pads its buffers."""
        weight, gradient, optimizer = _BYTES[dtype]
        optimizer += _AVERAGE_BYTES * average
        return cls(
            weights=weight * parameters,
            gradients=gradient * parameters,
            optimizer=math.ceil(optimizer * parameters / data_parallel_size),
        )

    @classmethod
    def of_zero(cls, parameters: int, *, config: DeepSpeedConfig, dtype: str, data_parallel_size: int) -> Memory:
        """Of the DeepSpeed engine on the device; but for padding, buckets, and what stage 3 gathers for a while."""
        weight, gradient, _ = _BYTES[dtype]
        stage, share = config.zero_stage, math.ceil(parameters / data_parallel_size)
        # From stage 1 on there are fp32 copies even of fp32 weights.
        optimizer = 8 * parameters if stage == 0 else 12 * share
        return cls(
            weights=0 if config.offload_parameters else weight * (share if stage == 3 else parameters),
            gradients=gradient * (share if stage >= 2 else parameters),
            optimizer=0 if config.offload_optimizer else optimizer,
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage, as each of its tensor-parallel ranks holds it."""

    layers: tuple[tuple[int, ...], ...]
    """Numbers of the layers, from 1, in each of its model chunks."""
    parameters: int
    memory: Memory
    flops: int
    """Expected operations of one step: forward, backward and recomputation."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs."""

    layout: str
    """In words."""
    world_size: int
    dtype: str
    """In words."""
    parameters: dict[str, int]
    """Of the whole model by part, each counted once, however many ranks hold it."""
    stages: tuple[Stage, ...]
    rows: RowMeans
    """What an average sequence holds."""
    counts: StepCounts
    """Expected rows of one step."""
    flops: StepFlops
    """Expected operations of one step, over all devices."""
    microbatches: int
    """In one step, on each data-parallel rank."""
    steps: int

    @property
    def imbalance(self) -> float:
        """Operations of the stage that has most of them, over the mean: the others wait for it."""
        flops = [stage.flops for stage in self.stages]
        return max(flops) / fmean(flops)

    @property
    def tokens(self) -> int:
        """Positions in one step that hold a document, as `consumed_tokens` counts them."""
        return round(self.counts.sequences * self.rows.filled)

    @property
    def documents(self) -> int:
        """In one step, as `consumed_samples` counts them."""
        return round(self.counts.sequences * self.rows.documents)

    def table(self) -> str:
        """All of it, to be read by a person."""
        blocks = (self._layout(), self._parameters(), self._stages(), self._step(), self._flops(), self._run())
        return "\n\n".join("\n".join(block) for block in blocks)

    def _layout(self) -> list[str]:
        return [f"{self.layout} = {self.world_size:,} {'process' if self.world_size == 1 else 'processes'}, {self.dtype}"]

    def _parameters(self) -> list[str]:
        total = sum(self.parameters.values())
        rows = [("parameters", f"{total:,}", "")]
        rows += [(f"  {part}", f"{number:,}", f"{number / total:.1%}") for part, number in self.parameters.items()]
        return columns(rows)

    def _stages(self) -> list[str]:
        heading = ("on each rank", "layers", "parameters", "weights", "gradients", "optimizer", "together", "FLOPs of a step", "")
        rows: list[tuple[str, ...]] = [heading]
        all_flops = sum(stage.flops for stage in self.stages)
        for number, stage in enumerate(self.stages):
            memory = stage.memory
            sizes = (memory.weights, memory.gradients, memory.optimizer, memory.total)
            flops = (f"{stage.flops:.3e}", f"{stage.flops / all_flops:.1%}")
            rows.append((f"  stage {number}", _ranges(stage.layers), f"{stage.parameters:,}", *map(size, sizes), *flops))
        lines = [*columns(rows), "  activations and communication buffers come on top"]
        return lines + ([f"  the largest stage computes {self.imbalance:.3f} x the mean"] if len(self.stages) > 1 else [])

    def _step(self) -> list[str]:
        counts = self.counts
        return [
            f"one step: {counts.sequences:,} sequences of {counts.sequence_length:,} positions, "
            f"{self.rows.filled / counts.sequence_length:.1%} filled: {self.documents:,} samples, {self.tokens:,} tokens",
            f"  {self.microbatches:,} {'microbatch' if self.microbatches == 1 else 'microbatches'} on each data-parallel rank",
            f"  expected to be learned: {counts.masked:,} masked image tokens, {counts.labels:,} text tokens",
        ]

    def _flops(self) -> list[str]:
        flops = self.flops
        parts = {
            "backbone": flops.backbone.total,
            "logits": flops.logits.total,
            "EmbeddingViT": flops.embedding_vit.total,
            "projectors": flops.projectors.total,
            "diffusion head": flops.head.total,
        }
        rows = [("FLOPs of a step", f"{flops.model:.3e}", "")]
        rows += [(f"  {part}", f"{number:.3e}", f"{number / flops.model:.1%}") for part, number in parts.items()]
        if flops.recompute:
            rows.append(("and recomputation", f"{flops.recompute:.3e}", f"+{flops.recompute / flops.model:.1%}"))
        return columns(rows)

    def _run(self) -> list[str]:
        samples, tokens, flops = (self.steps * each for each in (self.documents, self.tokens, self.flops.executed))
        lines = [f"the run: {self.steps:,} steps, {samples:,} samples, {tokens:,} tokens, {flops:.3e} FLOPs"]
        if self.rows.cut:
            lines.append(f"  {self.rows.cut:.1%} of the documents are longer than data.sequence_length and lose their end")
        sequences = self.steps * self.counts.sequences
        return lines + [f"  {sequences * epochs:,.2f} epochs of {name}" for name, epochs in self.rows.epochs.items()]


def plan(config: Config, *, geometry: ImageGeometry, vocab_size: int, rows: RowMeans, world_size: int | None = None) -> Plan:
    """Plan a run, in one process and without a launcher. No process group may exist yet; none is left.

    Args:
        config: the whole configuration, validated, and through `split_pipeline`.
        geometry: grid and channels of the image codec.
        vocab_size: of the tokenizer.
        rows: what the data hold.
        world_size: processes of the job; none: one replica of the model.

    Raises:
        ValueError: the number of processes does not fit the layout and the batch.
    """
    layout, train = config.parallel, config.train
    assert layout.pipeline_split == "even" or config.model.backbone.pipeline_model_parallel_layout is not None
    replica = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    world_size = replica if world_size is None else world_size
    validate_world(config, world_size=world_size)
    data_parallel_size = world_size // replica

    tokens_per_image = geometry.grid_height * geometry.grid_width
    counts = expected_counts(config, tokens_per_image=tokens_per_image, rows=rows)
    flops = expected_flops(config, counts, geometry=geometry, vocab_size=vocab_size)
    costs = PipelineCosts.of(config, flops)

    stages: list[Stage] = []
    whole_sizes: dict[str, int] = {}
    for number in range(costs.stages):
        with stage_on_meta(config, number, geometry=geometry, vocab_size=vocab_size, world_size=world_size) as (groups, chunks):
            in_words = groups.describe() + (f", ZeRO {config.deepspeed.zero_stage}" if config.engine == "deepspeed" else "")
            parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
            layers = tuple(tuple(layer.layer_number for layer in chunk.decoder.layers) for chunk in chunks)
            of_pieces = (
                costs.of_piece(number + chunk * costs.stages, layers=len(of_chunk)) for chunk, of_chunk in enumerate(layers)
            )
            stages.append(
                Stage(
                    layers=layers,
                    parameters=parameters,
                    memory=Memory.planned(config, parameters, data_parallel_size=data_parallel_size),
                    flops=sum(of_pieces) // (world_size // costs.stages),
                )
            )
            for chunk in chunks:
                whole_sizes |= _whole_sizes(chunk)

    return Plan(
        layout=in_words,
        world_size=world_size,
        dtype=config.precision.dtype if config.precision.fp8 == "off" else f"{config.precision.dtype} and FP8",
        parameters=_by_part(whole_sizes),
        stages=tuple(stages),
        rows=rows,
        counts=counts,
        flops=_with_recomputation(flops, backbone=config.model.backbone, stages=stages),
        microbatches=train.global_batch_size // (train.micro_batch_size * data_parallel_size),
        steps=train.steps,
    )


@contextmanager
def stage_on_meta(
    config: Config, number: int, *, geometry: ImageGeometry, vocab_size: int, world_size: int
) -> Iterator[tuple[ParallelGroups, list[MMARModel]]]:
    """The model chunks of pipeline stage `number`, as its first rank builds them, with shapes and no storage.

    Args:
        world_size: processes of the job; the groups, which pretend to be that many, end with the block.
    """
    # megatron-core's own initial draw, which ours replaces in training, and its `device=cuda` would both ask for real storage.
    backbone = copy.copy(config.model.backbone)
    backbone.perform_initialization = False
    backbone.use_cpu_initialization = True
    # Transformer Engine's layers have the same parameters, but are not everywhere, and want a device.
    backbone.transformer_impl = "local"
    # The pipeline is outermost, so the first rank of each stage is a multiple of the ranks of one.
    rank = number * (world_size // config.parallel.pipeline_model_parallel_size)
    groups = parallel.initialize_fake(config.parallel, rank=rank, world_size=world_size)
    try:
        with torch.device("meta"):
            yield (
                groups,
                build_model(
                    replace(config.model, backbone=backbone),
                    geometry=geometry,
                    vocab_size=vocab_size,
                    groups=groups,
                    seed=config.seed,
                    draw_weights=False,
                ),
            )
    finally:
        parallel.leave()


def _whole_sizes(chunk: MMARModel) -> dict[str, int]:
    """Elements of each tensor that this chunk holds a shard of, by its name in checkpoints.

    These names are one for all shards, for all layers (a tensor then has them stacked), and for both copies of tied embeddings.
    """
    state = chunk.sharded_state_dict(prefix="")
    tensors = {name: value for name, value in state.items() if isinstance(value, ShardedTensor | ShardedTensorFactory)}
    apply_factories(tensors)
    return {shard.key: math.prod(shard.global_shape) for shard in nested_values(tensors)}


def _by_part(sizes: dict[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter(dict.fromkeys(_PARTS.values(), 0))
    for name, elements in sizes.items():
        total[next(part for beginning, part in _PARTS.items() if name.startswith(beginning))] += elements
    return dict(total)


def _with_recomputation(flops: StepFlops, *, backbone: TransformerConfig, stages: Sequence[Stage]) -> StepFlops:
    """With the forward passes that full recomputation repeats."""
    layers = [len(chunk) for stage in stages for chunk in stage.layers]
    repeated = [min(n, max_repeated_layers(backbone)) for n in layers]
    return replace(flops, recompute=flops.backbone.forward * sum(repeated) // sum(layers))


def _ranges(chunks: Sequence[Sequence[int]]) -> str:
    """((1, 2, 3), (9, 10, 11)) -> 1-3, 9-11."""
    return ", ".join("-".join(map(str, sorted({chunk[0], chunk[-1]}))) for chunk in chunks if chunk) or "none"
