"""Whole gradients under the names of checkpoints, out of what each rank of any layout holds of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.parallel import ParallelGroups

Gradients = dict[str, Tensor]
Part = tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]
"""Name and shape of the whole tensor, place in it, values."""


@torch.no_grad()
def stir(engine: NativeEngine, *, std: float = 0.05) -> None:
    """Add noise to every parameter, a function of its name and place alone, so that it is the same in any layout.

    The head's output starts at zero, and nothing before it would have a gradient of the image loss in the first step.
    """
    for chunk in engine.chunks:
        for shard in _shards(chunk.module):
            name, shape, place = _location(shard)
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std
            shard.data.add_(noise[place])
    engine.optimizer.reload_model_params()


@contextmanager
def keeping_gradients(engine: NativeEngine, *, groups: ParallelGroups) -> Iterator[Gradients]:
    """Within, the gradients of a step, reduced and not yet clipped, come into the dictionary; on rank 0 alone."""
    kept: Gradients = {}
    finalize = engine.backbone.finalize_model_grads_func

    def finalize_and_keep(*args: Any, **options: Any) -> None:
        finalize(*args, **options)
        kept.update(_gather(engine, groups=groups))

    engine.backbone.finalize_model_grads_func = finalize_and_keep
    yield kept
    engine.backbone.finalize_model_grads_func = finalize


def _gather(engine: NativeEngine, *, groups: ParallelGroups) -> Gradients:
    _complete_buffers(engine, groups=groups)
    parts = [shard for chunk in engine.chunks for shard in _shards(chunk.module, of_gradients=True)]
    own: list[Part] = [(*_location(part), part.data) for part in parts]
    gathered: list[Any] = [None] * groups.world_size
    torch.distributed.all_gather_object(gathered, own)
    return _assemble([part for parts in gathered for part in parts]) if torch.distributed.get_rank() == 0 else {}


def _complete_buffers(engine: NativeEngine, *, groups: ParallelGroups) -> None:
    """Give each data-parallel rank all of the summed gradients: beside its own shard of each bucket, the others'."""
    for chunk in engine.chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                own = bucket.grad_data.chunk(groups.data.size())[groups.data.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=groups.data)


def _shards(model: MegatronModule, *, of_gradients: bool = False) -> list[ShardedTensor]:
    """This rank's parts of the parameters, or of their gradients."""
    state = model.sharded_state_dict(prefix="")
    tensors = {name: value for name, value in state.items() if isinstance(value, ShardedTensor | ShardedTensorFactory)}
    if of_gradients:
        for value in tensors.values():
            value.data = value.data.main_grad
    apply_factories(tensors)  # cuts up what is stored in pieces, such as the two halves of a gated feed-forward's first matrix
    return list(nested_values(tensors))


def _location(shard: ShardedTensor) -> tuple[str, tuple[int, ...], tuple[slice, ...]]:
    """Name and shape of the whole, and where in it this part is. Checkpoints stack all layers; here each has its own name."""
    stacked = shard.prepend_axis_num
    name = ".".join((shard.key, *map(str, shard.global_offset[:stacked])))
    starts = zip(shard.global_offset[stacked:], shard.data.shape, strict=True)
    return name, shard.global_shape[stacked:], tuple(slice(start, start + size) for start, size in starts)


def _assemble(parts: list[Part]) -> Gradients:
    """Whole tensors. Copies, on several ranks or (tied embeddings) on two stages, must agree to the last bit."""
    whole: Gradients = {}
    for name, shape, place, values in parts:
        of_whole = whole.setdefault(name, torch.full(shape, math.nan))[place]
        assert of_whole.isnan().all() or torch.equal(of_whole, values), f"copies of the gradient of {name} differ"
        of_whole[...] = values
    incomplete = [name for name, tensor in whole.items() if tensor.isnan().any()]
    assert not incomplete, f"the ranks together do not have all of the gradient of {incomplete}"
    return whole
