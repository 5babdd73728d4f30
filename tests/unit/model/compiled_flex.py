"""A process of its own, in which torch compiles: on a CPU only what goes forward. Prints how many graphs each batch leaves.

Axes: B rows, S positions, H heads, G key-value groups, D width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from mmar_megatron.model.flex import flex_attend, mixed_block_mask
from tests.unit.model.rows import Rows, rows


@torch.no_grad()
def compare(ids: Rows) -> None:
    """Compiled and plain attention, of tensors laid out as megatron-core's."""
    document_ids, span_ids = ids.document_ids_BS, ids.span_ids_BS
    sequences, length = document_ids.shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(length, sequences, heads, 16, generator=generator).permute(1, 2, 0, 3) for heads in (4, 2, 2)
    )
    mask = mixed_block_mask(document_ids_BS=document_ids, span_ids_BS=span_ids)
    found = flex_attend(query, key, value, block_mask=mask, scale=0.25)
    position = torch.arange(length)
    same_span = (span_ids[:, :, None] == span_ids[:, None]) & (span_ids[:, :, None] >= 0)
    allowed = (document_ids[:, :, None] == document_ids[:, None]) & ((position[:, None] >= position) | same_span)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None], scale=0.25, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    for ids in (
        rows(200, ["t120 i16 t10 i40 t9"], ["t3 i64", "i64 t20", "t40"]),
        rows(200, ["i150 t9"], []),
        rows(200, ["t10", "t20 i16"], ["t200"]),
    ):
        compare(ids)
        print(counters["stats"]["unique_graphs"])
