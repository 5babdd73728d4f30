"""FlexAttention's compiled kernels against attention under a dense mask.

Axes: B rows, S positions, H heads, G key-value groups, D width of a head.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from mmar_megatron import platform
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.model.attention import attention_bias, mixed_attention_allowed
from mmar_megatron.model.flex import flex_attend, mixed_block_mask
from mmar_megatron.parallel import ParallelGroups
from tests.gpu.runs import engine_on_gpu, furthest, gradients, packed_batches, relative_error
from tests.unit.model.rows import MIXED, Rows
from tests.unit.tiny import Documents

FLEX = ("--model.attention", "flex")
RECOMPUTE = {
    "none": (),
    "full": (
        *("--model.backbone.recompute_granularity", "full", "--model.backbone.recompute_method", "uniform"),
        *("--model.backbone.recompute_num_layers", "1"),
    ),
    "selective": ("--model.backbone.recompute_granularity", "selective"),
}


def tensors(ids: Rows, *, groups: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values as megatron-core lays them out, [S, B, ., D], seen as [B, ., S, D]; and the output's gradient."""
    sequences, length = ids.document_ids_BS.shape
    generator = torch.Generator(platform.device()).manual_seed(0)
    inputs = [
        torch.randn(length, sequences, heads, width, generator=generator, device=platform.device(), dtype=dtype).requires_grad_()
        for heads in (4, groups, groups)
    ]
    return inputs, torch.randn(sequences, 4, length, width, generator=generator, device=platform.device(), dtype=dtype)


def outputs(inputs: list[Tensor], ids: Rows, *, flex: bool, dtype: torch.dtype, weight: Tensor) -> list[Tensor]:
    """Output and gradients."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    query, key, value = (x.permute(1, 2, 0, 3) for x in inputs)
    document_ids, span_ids = (t.to(platform.device()) for t in (ids.document_ids_BS, ids.span_ids_BS))
    if flex:
        mask = mixed_block_mask(document_ids_BS=document_ids, span_ids_BS=span_ids)
        output = flex_attend(query, key, value, block_mask=mask, scale=0.2)
    else:
        bias = attention_bias(mixed_attention_allowed(document_ids_BS=document_ids, span_ids_BS=span_ids), dtype=dtype)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=0.2, enable_gqa=query.shape[1] != key.shape[1]
        )
    return [output.detach(), *torch.autograd.grad((output * weight.to(dtype)).sum(), inputs)]


@pytest.mark.parametrize(
    ("kind", "groups", "width"),
    [
        *((kind, groups, 64) for kind in MIXED for groups in (1, 2, 4)),
        *(("images over the borders of blocks", 2, width) for width in (16, 80, 128)),
    ],
)
def test_kernels_in_fp32(kind: str, groups: int, width: int) -> None:
    torch._dynamo.reset()
    inputs, weight = tensors(MIXED[kind], groups=groups, width=width, dtype=torch.float32)
    expected = outputs(inputs, MIXED[kind], flex=False, dtype=torch.float64, weight=weight)
    found = outputs(inputs, MIXED[kind], flex=True, dtype=torch.float32, weight=weight)
    assert max(map(relative_error, found, expected)) < 1e-5


@pytest.mark.parametrize("kind", MIXED)
def test_kernels_in_bf16_err_no_more_than_the_dense_ones(kind: str) -> None:
    torch._dynamo.reset()
    inputs, weight = tensors(MIXED[kind], groups=2, width=64, dtype=torch.bfloat16)
    exact = outputs(inputs, MIXED[kind], flex=False, dtype=torch.float64, weight=weight)
    dense, flex = (outputs(inputs, MIXED[kind], flex=flex, dtype=torch.bfloat16, weight=weight) for flex in (False, True))
    for a, b, truth in zip(flex, dense, exact, strict=True):
        assert relative_error(a, truth) < 1.5 * relative_error(b, truth) + 1e-4


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_model_learns_the_same(recompute: str, groups: ParallelGroups, coarse_tokenizer: Tokenizer) -> None:
    torch._dynamo.reset()
    batches = packed_batches(Documents(coarse_tokenizer))
    dense = gradients(engine_on_gpu(groups), batches)
    found = gradients(engine_on_gpu(groups, *FLEX, *RECOMPUTE[recompute]), batches)
    assert furthest(found, dense) < (1e-4, "")


def test_another_batch_compiles_nothing(groups: ParallelGroups, coarse_tokenizer: Tokenizer) -> None:
    torch._dynamo.reset()
    first, second = packed_batches(Documents(coarse_tokenizer))
    engine = engine_on_gpu(groups, *FLEX)
    engine.train_step([first], learning_rate=1e-3)
    counters.clear()
    engine.train_step([second], learning_rate=1e-3)
    assert counters["stats"]["unique_graphs"] == 0
