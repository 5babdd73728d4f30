"""Initial weights as a function of (seed, name of the parameter), so that every layout starts from the same model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

_SCALED_BY_DEPTH = ("linear_proj.weight", "linear_fc2.weight")
"""What writes into the residual stream: its spread shrinks with the number of layers (GPT-2; megatron-core's scaled init)."""


def _mixed(seed: int, name: str) -> int:
    # torch's CPU generator heeds the low 32 bits of a seed alone, so seed and name must be mixed into those.
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Within, torch's generator of the CPU follows from (seed, name); afterwards it is where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_mixed(seed, name))
        yield


@torch.no_grad()
def initialize_backbone(model: MegatronModule, *, seed: int) -> None:
    """Draw the weights of megatron-core's modules: normal matrices, zero biases; norms keep their ones.

    The names and places come from the model's own sharded state dict, the canonical description that checkpoints use: each shard
    is cut out of the full tensor that (seed, name) gives.
    """
    state = model.sharded_state_dict(prefix="")
    tensors = {key: value for key, value in state.items() if isinstance(value, ShardedTensor | ShardedTensorFactory)}
    apply_factories(tensors)
    config = model.config
    for shard in nested_values(tensors):
        if not shard.key.startswith(("decoder.", "embedding.word_embeddings.", "output_layer.")):
            continue
        if shard.key.endswith(".bias"):
            shard.data.zero_()
        elif shard.data.ndim == 2:
            depth = 2 * config.num_layers if shard.key.endswith(_SCALED_BY_DEPTH) else 1
            shard.data.copy_(_slice_of_full(shard, seed=seed, std=config.init_method_std / math.sqrt(depth)))


def _slice_of_full(shard: ShardedTensor, *, seed: int, std: float) -> Tensor:
    """This shard of the tensor drawn for its key (and layer, where layers are stacked along a first axis of the key's tensor)."""
    stacked = shard.prepend_axis_num
    name = ".".join((shard.key, *map(str, shard.global_offset[:stacked])))
    generator = torch.Generator(shard.data.device).manual_seed(_mixed(seed, name))
    full = torch.randn(shard.global_shape[stacked:], generator=generator, device=shard.data.device) * std
    for axis, (offset, size) in enumerate(zip(shard.global_offset[stacked:], shard.data.shape, strict=True)):
        full = full.narrow(axis, offset, size)
    return full
