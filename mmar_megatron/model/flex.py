"""Mixed attention by torch's FlexAttention (arXiv 2412.05496): blocks that the mask leaves empty are never computed.

What a query may attend to is that of `mixed_attention_allowed`. Kernels are compiled for GPUs: torch has none that go backward on
a CPU, nor any for dropout.

Suffixes: B sequences, S positions, H heads, G key-value groups, D width of a head; Q, K blocks of queries and of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK_SIZE = 128
"""Queries, and keys, of a block. Kernels skip whole ones."""


def mixed_block_mask(*, document_ids_BS: Tensor, span_ids_BS: Tensor) -> BlockMask:
    """The mixed mask of a batch, for all layers and heads.

    Documents and images are in one piece each. So the keys that a query sees are in one piece too: from the first of its document
    to the last of its image, or to itself. Neither end moves back from query to query, and the query itself is between them:
    of a block of queries, the first and the last say which blocks of keys are seen by any of them, and by all. No S x S is made.

    Args:
        document_ids_BS, span_ids_BS: as in `Batch`.
    """
    first_BS, last_BS = (ends.int() for ends in seen_keys(document_ids_BS=document_ids_BS, span_ids_BS=span_ids_BS))
    positions = document_ids_BS.shape[1]

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first_BS[b, query] <= key) & (key <= last_BS[b, query])

    begin_K = torch.arange(0, positions, BLOCK_SIZE, device=document_ids_BS.device)
    end_K = begin_K + BLOCK_SIZE - 1
    from_Q, to_Q = begin_K, end_K.clamp(max=positions - 1)
    any_BQK = (first_BS[:, from_Q, None] <= end_K) & (last_BS[:, to_Q, None] >= begin_K)
    all_BQK = (first_BS[:, to_Q, None] <= begin_K) & (last_BS[:, from_Q, None] >= end_K) & (end_K < positions)[:, None]
    return BlockMask.from_kv_blocks(
        *_in_order(any_BQK & ~all_BQK),
        *_in_order(all_BQK),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=allowed,
        seq_lengths=(positions, positions),
    )


def seen_keys(*, document_ids_BS: Tensor, span_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last key that each query sees, [B, S] each: it sees all between them."""
    positions = document_ids_BS.shape[1]
    position_S = torch.arange(positions, device=document_ids_BS.device)
    begins_BS = F.pad(document_ids_BS[:, 1:] != document_ids_BS[:, :-1], (1, 0), value=True)
    first_BS = torch.where(begins_BS, position_S, 0).cummax(dim=1).values
    ends_BS = F.pad(span_ids_BS[:, 1:] != span_ids_BS[:, :-1], (0, 1), value=True)
    end_BS = torch.where(ends_BS, position_S, positions).flip(1).cummin(dim=1).values.flip(1)
    return first_BS, torch.where(span_ids_BS >= 0, end_BS, position_S)


def _in_order(chosen_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, [B, 1, Q], and which, before all others, [B, 1, Q, K]."""
    order_BQK = chosen_BQK.int().argsort(dim=-1, descending=True, stable=True)
    return chosen_BQK.sum(dim=-1, dtype=torch.int32)[:, None], order_BQK.int()[:, None]


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
