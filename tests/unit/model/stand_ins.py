"""Transformer Engine's layers for a CPU: megatron-core's own under the same names of parameters, with the same extra state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
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


class Attention(_WithScales):
    """With all scores. Axes: S queries, T keys, B sequences, H heads, G groups of them, D width of a head."""

    calls = 0
    in_fp8 = False

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        assert attention_type == "self"
        self.mask_type = attn_mask_type.name
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.heads = config.num_attention_heads // config.num_query_groups

    def forward(
        self,
        query_SBHD: Tensor,
        key_TBGD: Tensor,
        value_TBGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
    ) -> Tensor:
        assert attn_mask_type.name == self.mask_type
        assert not Attention.in_fp8
        Attention.calls += 1
        key_TBHD, value_TBHD = (repeat(x, "t b g d -> t b (g n) d", n=self.heads) for x in (key_TBGD, value_TBGD))
        scores_BHST = torch.einsum("sbhd,tbhd->bhst", query_SBHD.float(), key_TBHD.float()) * self.scale
        if self.mask_type == "causal":
            assert attention_mask is None
            attention_mask = torch.ones(scores_BHST.shape[2:]).triu(1).bool()
        assert attention_mask is not None and attention_mask.dtype == torch.bool
        weights_BHST = scores_BHST.masked_fill(attention_mask, -10000.0).softmax(dim=-1).to(value_TBHD.dtype)
        return rearrange(torch.einsum("bhst,tbhd->sbhd", weights_BHST, value_TBHD), "s b h d -> s b (h d)")

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}


@contextmanager
def fp8_autocast(enabled: bool) -> Iterator[None]:
    before, Attention.in_fp8 = Attention.in_fp8, enabled
    yield
    Attention.in_fp8 = before


def use_stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Put them in the place of Transformer Engine's."""
    patch.setattr(transformer_engine, "HAVE_TE", True)
    patch.setattr(transformer_engine, "TENorm", Norm)
    patch.setattr(transformer_engine, "TELayerNormColumnParallelLinear", NormAndColumnParallelLinear)
    patch.setattr(transformer_engine, "TERowParallelLinear", RowLinear)
    patch.setattr(transformer_engine, "TEDotProductAttention", Attention)
    patch.setattr(transformer_engine, "fp8_autocast", fp8_autocast, raising=False)
    patch.setattr(Attention, "calls", 0)
