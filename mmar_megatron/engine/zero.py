"""What DeepSpeed is given: the layout in its words, and an optimizer that may be told not to step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmar_megatron.parallel import ParallelGroups


class Layout:
    """Which ranks share what, in the words that DeepSpeed asks Megatron's `mpu` in; there is no pipeline."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        """Of tensor parallelism."""
        return self._groups.tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        """Of tensor parallelism."""
        return self._groups.tensor.size()

    def get_model_parallel_group(self) -> Any:
        """Of tensor parallelism."""
        return self._groups.tensor

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Of data parallelism."""
        return self._groups.data.rank()

    def get_data_parallel_world_size(self) -> int:
        """Of data parallelism."""
        return self._groups.data.size()

    def get_data_parallel_group(self) -> Any:
        """Of data parallelism."""
        return self._groups.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Of data parallelism."""
        return torch.distributed.get_process_group_ranks(self._groups.data)


class VetoedAdamW(torch.optim.AdamW):
    """Takes a step only where it may; DeepSpeed calls it once for each of its groups."""

    may_step: Callable[[], bool]

    def step(self, closure: Any = None) -> Any:
        """See torch."""
        return super().step(closure) if self.may_step() else None


@dataclass(kw_only=True)
class Verdict:
    """On the step under way."""

    loss: float = math.nan
    grad_norm: float | None = None
    """Before clipping; none until it is known."""
    reason: str | None = None
    """Why the step is not taken."""
