"""Mixed attention by torch's FlexAttention (arXiv 2412.05496): blocks that the mask leaves empty are never computed.

What a query may attend to is that of `mixed_attention_allowed`. Kernels are compiled for GPUs: torch has none that go backward on
a CPU, nor any for dropout.

Suffixes: B sequences, S positions, H heads, G key-value groups, D width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK_SIZE = 128
"""Queries, and keys, of a block. Kernels skip whole ones."""


def mixed_block_mask(*, document_ids_BS: Tensor, span_ids_BS: Tensor) -> BlockMask:
    """The mixed mask of a batch, for all layers and heads. For a moment B x S x S bytes are in use.

    Args:
        document_ids_BS, span_ids_BS: as in `Batch`.
    """
    sequences, positions = document_ids_BS.shape
    document, span = document_ids_BS.int(), span_ids_BS.int()

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_span = (span[b, query] == span[b, key]) & (span[b, query] >= 0)
        return (document[b, query] == document[b, key]) & ((query >= key) | same_span)

    return create_block_mask(allowed, sequences, None, positions, positions, device=document_ids_BS.device, BLOCK_SIZE=BLOCK_SIZE)


def flex_attend(query_BHSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, *, block_mask: BlockMask, scale: float) -> Tensor:
    """Attention under a block mask, [B, H, S, D]; each of the G keys and values serves H / G heads."""
    grouped = query_BHSD.shape[1] != key_BGSD.shape[1]
    return _kernel()(query_BHSD, key_BGSD, value_BGSD, block_mask=block_mask, scale=scale, enable_gqa=grouped)


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    """Compiled at the first call, and again for each other shape: training and validation have one each.

    Without `fullgraph`, torch would fall back to an implementation that holds all scores, and say nothing.
    """
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
