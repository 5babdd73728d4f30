"""Transformer Engine's layers for a CPU: megatron-core's own under the same names of parameters, with the same extra state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from mmar_megatron.model.layer_specs import RMSNorm


class _WithScales(nn.Module):
    """Whether or not there are scales, Transformer Engine's modules have room for them in their state."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("no scales are kept in checkpoints")


class Norm(_WithScales, RMSNorm):
    pass


class NormAndColumnParallelLinear(_WithScales, ColumnParallelLinear):
    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        # In place of megatron-core's, which put an empty extra state wherever one is missing.
        self._load_state_dict_pre_hooks.clear()
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        normed = F.rms_norm(x, (x.shape[-1],), self.layer_norm_weight, self.eps)
        return super().forward(normed, *arguments, **options)


class RowLinear(_WithScales, RowParallelLinear):
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self._load_state_dict_pre_hooks.clear()


def use_stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Put them in the place of Transformer Engine's."""
    patch.setattr(transformer_engine, "HAVE_TE", True)
    patch.setattr(transformer_engine, "TENorm", Norm)
    patch.setattr(transformer_engine, "TELayerNormColumnParallelLinear", NormAndColumnParallelLinear)
    patch.setattr(transformer_engine, "TERowParallelLinear", RowLinear)
