"""Losses over a whole step: plain sums and counts over microbatches and ranks, divided once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.config import ModelConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.engine.base import Counts
from mmar_megatron.model.losses import LossSums
from mmar_megatron.parallel import ParallelGroups


def global_counts(batches: Sequence[Batch], *, groups: ParallelGroups) -> Counts:
    """The denominators of a step, over its microbatches and data-parallel ranks. They depend on the data alone.

    So they are known before the forward pass: each microbatch's loss is divided by them, and plain sums of gradients are then
    those of the global mean.
    """
    stacked = Counts.of(batches).to_tensor()
    torch.distributed.all_reduce(stacked, group=groups.data)
    return Counts.from_tensor(stacked)


def weighted(sums: LossSums, counts: Counts, *, settings: ModelConfig) -> Tensor:
    """What is minimised: the mean of each loss over its own tokens, weighted."""
    return (
        settings.text_loss_weight * sums.text / counts.text.clamp(min=1)
        + settings.image_loss_weight * sums.image / counts.image.clamp(min=1)
        + settings.alignment_loss_weight * sums.alignment / counts.alignment.clamp(min=1)
    )


def reduced(flattened: Sequence[Tensor], *, groups: ParallelGroups) -> LossSums:
    """Over microbatches, tensor- and data-parallel ranks; then from one rank of each replica to all others of it.

    The last bit counts, for ranks that judge a step differently part for ever. The sums are the same to the bit within one
    data-parallel group, but other groups may add in another order.

    Args:
        flattened: of each microbatch, on the last pipeline stage; else none.
        groups: process groups.
    """
    if flattened:
        total = torch.stack(list(flattened)).sum(dim=0)
        total[0] /= groups.tensor.size()  # the text loss is whole on each tensor-parallel rank, all else is a share
        torch.distributed.all_reduce(total, group=groups.tensor)
        torch.distributed.all_reduce(total, group=groups.data)
    else:
        total = torch.zeros(LossSums.size(), device=platform.device())
    if groups.model.size() > 1:
        torch.distributed.broadcast(total, group=groups.model, group_src=groups.model.size() - 1)
    return LossSums.unflatten(total)
