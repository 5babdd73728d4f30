"""Mixed attention: causal between tokens, bidirectional inside an image, nothing across documents.

Suffixes: B sequences, S positions, H heads, G key-value groups, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from mmar_megatron.model.flex import flex_attend
from mmar_megatron.model.key_values import KeyValueCache
from mmar_megatron.model.rotary import inverse_frequencies


def mixed_attention_allowed(*, document_ids_BS: Tensor, span_ids_BS: Tensor) -> Tensor:
    """Which key each query may attend to, bool [B, S, S] (query, key).

    A query sees the keys of its own document that stand at or before it, and all of its own image. Padding (document -1) sees
    padding alone, which keeps every row of the softmax non-empty.
    """
    position_S = torch.arange(document_ids_BS.shape[1], device=document_ids_BS.device)
    causal_SS = position_S[:, None] >= position_S[None, :]
    same_span_BSS = (span_ids_BS[:, :, None] == span_ids_BS[:, None, :]) & (span_ids_BS[:, :, None] >= 0)
    same_document_BSS = document_ids_BS[:, :, None] == document_ids_BS[:, None, :]
    return same_document_BSS & (causal_SS | same_span_BSS)


def kept_allowed(valid_BT: Tensor, *, document_ids_BS: Tensor) -> Tensor:
    """Which of the keys kept from before each query may attend to, bool [B, S, T]: all that are not padding."""
    return valid_BT[:, None, :] & (document_ids_BS >= 0)[:, :, None]


def attention_bias(allowed_BSS: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Additive form [B, 1, S, S] of a mask: 0 where allowed, else -inf.

    Made once for all layers, where a bool mask is converted by each.
    """
    bias_BSS = torch.zeros(allowed_BSS.shape, dtype=dtype, device=allowed_BSS.device)
    return bias_BSS.masked_fill_(~allowed_BSS, float("-inf")).unsqueeze(1)


class MixedAttention(MegatronModule):
    """`core_attention` of a megatron-core layer spec: by torch's fused kernels, or FlexAttention where a block mask is given.

    Without any mask it is in causal order, which needs none; then by Transformer Engine's kernels, where the spec brings them.
    """

    cache: KeyValueCache | None = None
    """Keys and values before those of this pass; set for the time of it, since megatron-core hands nothing of the kind down."""

    as_on_gpus = False
    """Repeat keys and values where a GPU would want it, also where there is none: for who counts a GPU's memory."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        softmax_scale: float | None = None,
        causal: Callable[..., nn.Module] | None = None,
        **options: Any,
    ) -> None:
        # megatron-core passes every core attention attn_mask_type, attention_type and process groups as well.
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout
        self.causal = causal and causal(config, layer_number, softmax_scale=self.softmax_scale, **options)

    def forward(
        self,
        query_SBHD: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        *,
        attention_bias: BlockMask | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attend, under one of the two masks, or in causal order where both are None.

        Args:
            query_SBHD: queries of this rank's heads.
            key_SBGD, value_SBGD: keys and values; each group serves H / G heads.
            attention_mask: additive, [B, 1, S, S]; with a cache of T positions [B, 1, S, T + S], and then never None.
            attention_bias: a block mask. megatron-core hands its bias down to all layers, also when it recomputes them, and looks
                at neither mask nor bias itself.

        Returns:
            [S, B, H * D].
        """
        in_causal_order = attention_mask is None and attention_bias is None
        assert self.cache is None or not in_causal_order, (
            "what is kept stands before the queries, which causal order does not say"
        )
        if in_causal_order and self.causal is not None:
            return self.causal(query_SBHD, key_SBGD, value_SBGD)
        query, key, value = (rearrange(x, "s b h d -> b h s d") for x in (query_SBHD, key_SBGD, value_SBGD))
        if attention_bias is not None:
            output = flex_attend(query, key, value, block_mask=attention_bias, scale=self.softmax_scale)
            return rearrange(output, "b h s d -> s b (h d)")
        if self.cache is not None:
            key, value = self.cache.update(key, value, self.layer_number)
        elif not self._takes_groups(query, masked=not in_causal_order):
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        attend = partial(
            F.scaled_dot_product_attention,
            attn_mask=attention_mask,
            is_causal=in_causal_order,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        if self.training and self.dropout > 0:
            with get_cuda_rng_tracker().fork():  # heads are split over tensor-parallel ranks: each drops its own
                output = attend(query, key, value, dropout_p=self.dropout)
        else:
            output = attend(query, key, value)
        return rearrange(output, "b h s d -> s b (h d)")

    def _takes_groups(self, query: Tensor, *, masked: bool) -> bool:
        """Whether torch has a fused kernel for fewer keys than queries; otherwise it would hold all scores, and say nothing.

        On a GPU that is flash attention, which knows no mask but the order, and 16 bits alone; memory-efficient attention, which
        serves the rest, wants as many keys (`use_mem_efficient_attention` in ATen's sdp_utils.cpp).
        """
        on_gpu = query.is_cuda or self.as_on_gpus
        return not on_gpu or (not masked and query.dtype != torch.float32)


def rotary_angles(position_ids_BS: Tensor, *, head_dim: int, base: float, **scaling: Any) -> Tensor:
    """Angles of the rotary embedding, [S, B, 1, head_dim] in fp32. `scaling` as in `inverse_frequencies`.

    Each sequence has its own, because positions restart with every document.
    """
    frequencies_F = inverse_frequencies(head_dim, base=base, device=position_ids_BS.device, **scaling)
    angles_SBF = position_ids_BS.t().float()[:, :, None] * frequencies_F
    return torch.cat((angles_SBF, angles_SBF), dim=-1).unsqueeze(2)
