"""Mixed attention, forward and backward, by all there is to compute it with; over the length of the sequence.

Suffixes: B sequences, S positions, H heads, G key-value groups, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmar_megatron import platform
from mmar_megatron.benchmarks.synthetic import sized, synthetic_batch
from mmar_megatron.benchmarks.timing import in_turn, median, ratio
from mmar_megatron.data.batch import Batch
from mmar_megatron.model.attention import MixedAttention, attention_bias, mixed_attention_allowed
from mmar_megatron.model.flex import mixed_block_mask

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [S, B, H, D], keys and values [S, B, G, D] -> [S, B, H * D]."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to attend."""

    prepare: Callable[[TransformerConfig, Batch], Attend]
    """Makes its mask, as is done once for all layers."""
    needs_gpu: str | None = None
    """Why it is left out on a CPU."""


def _dense(config: TransformerConfig, batch: Batch) -> Attend:
    allowed_BSS = mixed_attention_allowed(document_ids_BS=batch.document_ids_BS, span_ids_BS=batch.span_ids_BS)
    bias_B1SS = attention_bias(allowed_BSS, dtype=config.params_dtype)
    return partial(MixedAttention(config, layer_number=1).forward, attention_mask=bias_B1SS)


def _unfused(config: TransformerConfig, batch: Batch) -> Attend:
    dense = _dense(config, batch)

    def attend(query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return dense(query_SBHD, key_SBGD, value_SBGD)

    return attend


def _causal(config: TransformerConfig, batch: Batch) -> Attend:
    return partial(_attend, partial(F.scaled_dot_product_attention, is_causal=True))


def _flex(config: TransformerConfig, batch: Batch) -> Attend:
    mask = mixed_block_mask(document_ids_BS=batch.document_ids_BS, span_ids_BS=batch.span_ids_BS)
    return partial(MixedAttention(config, layer_number=1).forward, attention_mask=None, attention_bias=mask)


def _attend(kernel: Callable[..., Tensor], query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
    query, key, value = (rearrange(x, "s b h d -> b h s d") for x in (query_SBHD, key_SBGD, value_SBGD))
    return rearrange(kernel(query, key, value, enable_gqa=query.shape[1] != key.shape[1]), "b h s d -> s b (h d)")


MODEL = "dense"
IMPLEMENTATIONS = {
    MODEL: Implementation(prepare=_dense),
    "causal": Implementation(prepare=_causal),
    "unfused": Implementation(prepare=_unfused),
    "flex": Implementation(prepare=_flex, needs_gpu="torch's FlexAttention has no backward pass on a CPU"),
}
"""`dense` is the model's. `causal` has no mask but the order: what it takes less is what images and documents cost. `unfused`
writes all scores to memory; `flex` leaves out blocks that the mask leaves empty."""


def compare_attention(
    options: Sequence[str], *, lengths: Sequence[int], positions: int, text: int, image_tokens: int, rounds: int
) -> dict[str, Any]:
    """Seconds of one layer's attention, forward and backward, and of making its mask; ratios to the model's own.

    Args:
        options: of pretrain_mmar.py; `model.backbone` has heads, groups and their width.
        lengths: S, one after the other.
        positions: of all sequences together, as near as whole sequences come; at least one.
        text, image_tokens: of a document; as many documents as fit are packed into a sequence.
        rounds: of which medians are taken.

    Raises:
        ValueError: a length has no room for a document.
    """
    if short := [length for length in lengths if length < text + image_tokens]:
        raise ValueError(f"length {short[0]} has no room for a document of {text} + {image_tokens} positions: make it longer")
    config, _ = sized(options)
    usable = {name: i for name, i in IMPLEMENTATIONS.items() if platform.HAS_CUDA or i.needs_gpu is None}
    rows: list[dict[str, Any]] = []
    for length in lengths:
        batch = synthetic_batch(
            rows=max(1, positions // length),
            documents=length // (text + image_tokens),
            text=text,
            image_tokens=image_tokens,
            mask_ratio=config.data.mask_ratio,
            length=length,
            seed=config.seed,
        )
        rows += _of_length(batch, config=config.model.backbone, usable=usable, rounds=rounds)
    backbone = config.model.backbone
    sizes = {"heads": backbone.num_attention_heads, "groups": backbone.num_query_groups, "width": backbone.kv_channels}
    skipped = {name: i.needs_gpu for name, i in IMPLEMENTATIONS.items() if name not in usable}
    return {**sizes, "document": [text, image_tokens], "dtype": config.precision.dtype, "rows": rows, "skipped": skipped}


def _of_length(
    batch: Batch, *, config: TransformerConfig, usable: dict[str, Implementation], rounds: int
) -> list[dict[str, Any]]:
    sequences, length = batch.tokens_BS.shape
    heads, groups = config.num_attention_heads, config.num_query_groups
    inputs = [
        torch.randn(
            length, sequences, n, config.kv_channels, device=platform.device(), dtype=config.params_dtype, requires_grad=True
        )
        for n in (heads, groups, groups)
    ]
    gradient = torch.randn(length, sequences, heads * config.kv_channels, device=platform.device(), dtype=config.params_dtype)

    def forward_and_backward(attend: Attend) -> None:
        torch.autograd.grad(attend(*inputs), inputs, grad_outputs=gradient)

    prepared = [i.prepare(config, batch) for i in usable.values()]
    mask_s = in_turn([partial(i.prepare, config, batch) for i in usable.values()], rounds=rounds)
    seconds = dict(zip(usable, in_turn([partial(forward_and_backward, a) for a in prepared], rounds=rounds), strict=True))
    return [
        {
            "length": length,
            "sequences": sequences,
            "implementation": name,
            "seconds": median(of_name),
            **ratio(of_name, seconds[MODEL]),
            "mask_s": median(of_mask),
        }
        for (name, of_name), of_mask in zip(seconds.items(), mask_s, strict=True)
    ]
