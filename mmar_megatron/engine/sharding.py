"""Names of tensors in checkpoints: those that belong to a parameter stand under its name behind a prefix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

AVERAGE_PREFIX = "average."
OPTIMIZER_PREFIX = "optimizer."


def under_prefix(
    model_state: dict[str, Any], *, prefix: str, tensors: dict[nn.Parameter, Tensor] | None = None
) -> dict[str, Any]:
    """A chunk's sharded state dict with other names, and with these tensors in place of the parameters."""
    renamed = {}
    for name, value in model_state.items():
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            data = value.data if tensors is None else tensors[value.data]
            dtype = {} if isinstance(value, ShardedTensorFactory) else {"dtype": data.dtype}
            renamed[name] = replace(value, key=prefix + value.key, data=data, **dtype)
    return renamed
