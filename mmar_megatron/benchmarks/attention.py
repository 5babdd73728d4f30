"""Mixed attention, forward and backward, by all there is to compute it with; over the length of the sequence.

Suffixes: B sequences, S positions, H heads, G key-value groups, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmar_megatron import platform
from mmar_megatron.benchmarks.synthetic import sized, synthetic_batch
from mmar_megatron.benchmarks.timing import in_turn, median, ratio
from mmar_megatron.data.batch import Batch
from mmar_megatron.model.attention import MixedAttention, attention_bias, mixed_attention_allowed
from mmar_megatron.model.flex import mixed_block_mask
from mmar_megatron.model.layer_specs import EngineAttention, engine_takes, has_engine

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [S, B, H, D], keys and values [S, B, G, D] -> [S, B, H * D]."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to attend."""

    prepare: Callable[[TransformerConfig, Batch], Attend]
    """Makes its mask, as is done once for all layers."""
    lacks: Callable[[TransformerConfig], str | None] = lambda _: None
    """Why it is left out; None where it is not."""


def _dense(config: TransformerConfig, batch: Batch) -> Attend:
    return partial(MixedAttention(config, layer_number=1).forward, attention_mask=_bias(config, batch))


def _bias(config: TransformerConfig, batch: Batch) -> Tensor:
    return attention_bias(_allowed(batch), dtype=config.params_dtype)


def _allowed(batch: Batch) -> Tensor:
    return mixed_attention_allowed(document_ids_BS=batch.document_ids_BS, span_ids_BS=batch.span_ids_BS)


def _unfused(config: TransformerConfig, batch: Batch) -> Attend:
    return partial(_by, SDPBackend.MATH, _dense(config, batch))


def _cudnn(config: TransformerConfig, batch: Batch) -> Attend:
    attend = partial(_torch, partial(F.scaled_dot_product_attention, attn_mask=_bias(config, batch)))
    return partial(_by, SDPBackend.CUDNN_ATTENTION, attend)


def _causal(config: TransformerConfig, batch: Batch) -> Attend:
    return partial(MixedAttention(config, layer_number=1).forward, attention_mask=None)


def _flex(config: TransformerConfig, batch: Batch) -> Attend:
    mask = mixed_block_mask(document_ids_BS=batch.document_ids_BS, span_ids_BS=batch.span_ids_BS)
    return partial(MixedAttention(config, layer_number=1).forward, attention_mask=None, attention_bias=mask)


def _engine_unfused(config: TransformerConfig, batch: Batch) -> Attend:
    attention = EngineAttention(config, layer_number=1, mask_type=AttnMaskType.arbitrary)
    return partial(attention.forward, hidden_B1SS=~_allowed(batch)[:, None])


def _engine_causal(config: TransformerConfig, batch: Batch) -> Attend:
    return EngineAttention(config, layer_number=1, mask_type=AttnMaskType.causal).forward


def _by(backend: SDPBackend, attend: Attend, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return attend(query_SBHD, key_SBGD, value_SBGD)


def _torch(kernel: Callable[..., Tensor], query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
    query, key, value = (rearrange(x, "s b h d -> b h s d") for x in (query_SBHD, key_SBGD, value_SBGD))
    return rearrange(kernel(query, key, value, enable_gqa=query.shape[1] != key.shape[1]), "b h s d -> s b (h d)")


def _flex_lacks(config: TransformerConfig) -> str | None:
    return None if platform.HAS_CUDA else "torch's FlexAttention has no backward pass on a CPU"


def _cudnn_lacks(config: TransformerConfig) -> str | None:
    if not platform.HAS_CUDA:
        return "cuDNN computes on GPUs alone"
    return "cuDNN's attention takes 16 bits alone: set precision.dtype bf16" if config.params_dtype == torch.float32 else None


def _engine_lacks(config: TransformerConfig) -> str | None:
    if not platform.HAS_CUDA:
        return "Transformer Engine computes on GPUs alone"
    return None if has_engine() else "Transformer Engine cannot be imported: install requirements-gpu.txt"


def _engine_causal_lacks(config: TransformerConfig) -> str | None:
    limits = "Transformer Engine's fused attention takes 16 bits, and heads of a multiple of 8 channels, at most 128"
    return _engine_lacks(config) or (None if engine_takes(config) else limits)


MODEL = "dense"
IMPLEMENTATIONS = {
    MODEL: Implementation(prepare=_dense),
    "causal": Implementation(prepare=_causal),
    "unfused": Implementation(prepare=_unfused),
    "flex": Implementation(prepare=_flex, lacks=_flex_lacks),
    "cudnn": Implementation(prepare=_cudnn, lacks=_cudnn_lacks),
    "te unfused": Implementation(prepare=_engine_unfused, lacks=_engine_lacks),
    "te causal": Implementation(prepare=_engine_causal, lacks=_engine_causal_lacks),
}
"""`dense` is the model's, and so is `causal` for batches that need no mask: what it takes less is what images and documents cost.
`unfused` writes all scores to memory; `flex` leaves out blocks that the mask leaves empty; `cudnn` takes the mask of `dense`.
`te unfused` is Transformer Engine's under any mask, for which it has no fused kernel, and `te causal` its fused one."""
CAUSAL = ("causal", "te causal")


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
    backbone = config.model.backbone
    skipped = {name: reason for name, i in IMPLEMENTATIONS.items() if (reason := i.lacks(backbone))}
    usable = {name: i for name, i in IMPLEMENTATIONS.items() if name not in skipped}
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
        of_length = _of_length(batch, config=backbone, usable=usable, rounds=rounds)
        rows += of_length
        for name in usable.keys() - {row["implementation"] for row in of_length}:
            skipped[f"{name} at length {length}"] = "it wants more memory than there is"
    sizes = {"heads": backbone.num_attention_heads, "groups": backbone.num_query_groups, "width": backbone.kv_channels}
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

    prepared: dict[str, Attend] = {}
    for name, i in usable.items():
        attend = i.prepare(config, batch)
        with suppress(torch.OutOfMemoryError):
            forward_and_backward(attend)
            prepared[name] = attend
    mask_s = in_turn([partial(usable[name].prepare, config, batch) for name in prepared], rounds=rounds)
    times = in_turn([partial(forward_and_backward, attend) for attend in prepared.values()], rounds=rounds)
    seconds = dict(zip(prepared, times, strict=True))
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
