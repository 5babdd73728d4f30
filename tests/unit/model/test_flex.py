"""FlexAttention against attention under a dense mask: outputs, gradients, and which blocks are left out. On a CPU by torch's
implementation without kernels; tests/gpu has the kernels.

Axes: B rows, S positions, H heads, G key-value groups, D width of a head, Q, K blocks of queries and of keys.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.model import flex
from mmar_megatron.model.attention import attention_bias, mixed_attention_allowed
from mmar_megatron.model.flex import BLOCK_SIZE, flex_attend, mixed_block_mask
from mmar_megatron.model.key_values import KeyValueCache
from mmar_megatron.model.losses import LossSums
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups
from tests.distributed.launch import ROOT
from tests.unit.model.rows import MIXED, Rows, rows
from tests.unit.model.unfused import use_unfused_flex
from tests.unit.tiny import Documents, build_tiny, hidden_states, stir

FLEX = ("--model.attention", "flex")
WIDE = ("--model.backbone.kv_channels", "16")
RECOMPUTE = {
    "none": (),
    "full": (
        *("--model.backbone.recompute_granularity", "full", "--model.backbone.recompute_method", "uniform"),
        *("--model.backbone.recompute_num_layers", "1"),
    ),
    "selective": ("--model.backbone.recompute_granularity", "selective"),
}


@pytest.fixture
def unfused() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_unfused_flex(patch)
        yield


def allowed(ids: Rows) -> Tensor:
    return mixed_attention_allowed(document_ids_BS=ids.document_ids_BS, span_ids_BS=ids.span_ids_BS)


# --- attention alone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", MIXED)
def test_outputs_and_gradients_are_those_under_a_dense_mask(kind: str, groups: int, unfused: None) -> None:
    ids = MIXED[kind]
    sequences, length = ids.document_ids_BS.shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sequences, heads, length, 16, generator=generator).requires_grad_() for heads in (4, groups, groups)
    )
    weight = torch.randn(query.shape, generator=generator)
    mask = mixed_block_mask(document_ids_BS=ids.document_ids_BS, span_ids_BS=ids.span_ids_BS)
    bias = attention_bias(allowed(ids), dtype=torch.float32)
    found = flex_attend(query, key, value, block_mask=mask, scale=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3, enable_gqa=groups < 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((output * weight).sum(), (query, key, value)) for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MIXED)
def test_blocks_are_those_of_the_dense_mask(kind: str) -> None:
    """Counted there: blocks with something to see in them, and of these the ones without a gap, whose mask is not looked at."""
    ids = MIXED[kind]
    mask = mixed_block_mask(document_ids_BS=ids.document_ids_BS, span_ids_BS=ids.span_ids_BS)
    length = ids.document_ids_BS.shape[1]
    blocks = -(-length // BLOCK_SIZE)
    padding = blocks * BLOCK_SIZE - length
    dense = F.pad(allowed(ids), (0, padding, 0, padding))
    seen_BQK = dense.unflatten(1, (blocks, BLOCK_SIZE)).unflatten(3, (blocks, BLOCK_SIZE)).sum(dim=(2, 4))
    full_BQ = (seen_BQK == BLOCK_SIZE**2).sum(dim=-1)
    assert mask.full_kv_num_blocks is not None
    assert torch.equal(mask.full_kv_num_blocks[:, 0].long(), full_BQ)
    assert torch.equal(mask.kv_num_blocks[:, 0].long(), (seen_BQK > 0).sum(dim=-1) - full_BQ)


@pytest.mark.parametrize("kind", MIXED)
def test_the_block_mask_is_the_one_that_torch_would_make(kind: str) -> None:
    """Of all pairs of positions, of which this one makes none; also in what the kernels going backward read."""
    ids = MIXED[kind]
    document_ids, span_ids = ids.document_ids_BS, ids.span_ids_BS
    sequences, length = document_ids.shape

    def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_span = (span_ids[b, query] == span_ids[b, key]) & (span_ids[b, query] >= 0)
        return (document_ids[b, query] == document_ids[b, key]) & ((query >= key) | same_span)

    found = mixed_block_mask(document_ids_BS=document_ids, span_ids_BS=span_ids)
    expected = create_block_mask(rule, sequences, None, length, length, device="cpu", BLOCK_SIZE=BLOCK_SIZE)
    assert (found.seq_lengths, found.BLOCK_SIZE) == (expected.seq_lengths, expected.BLOCK_SIZE)
    kinds = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
    for name in (*kinds, *(f"full_{name}" for name in kinds)):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == torch.int32
        assert getattr(found, name).is_contiguous()
    for mask in (found, expected):
        dense_B1SS = create_mask(mask.mask_mod, sequences, 1, length, length, device="cpu")
        assert torch.equal(dense_B1SS[:, 0], allowed(ids))


def test_packing_leaves_blocks_out() -> None:
    """The reason for all this. Of a row's 16 blocks text needs the causal 10; an image over a border adds what lies across it;
    documents that end at a border take away all that lies between them."""
    ids = rows(512, ["t512"], ["t120 i16 t376"], ["t256", "t256"], ["i512"])
    mask = mixed_block_mask(document_ids_BS=ids.document_ids_BS, span_ids_BS=ids.span_ids_BS)
    assert mask.full_kv_num_blocks is not None
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).sum(dim=(1, 2)).tolist() == [10, 11, 6, 16]


def test_compiled_once_for_all_batches_of_a_shape() -> None:
    """On a CPU there is a forward pass alone to compile; of GPUs see tests/gpu."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.model.compiled_flex"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1", "1", "1"]


# --- the whole model ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(coarse_tokenizer: Tokenizer) -> Batch:
    """Two packed documents beside a row of padding; images that are painted and that are read."""
    documents = Documents(coarse_tokenizer)
    painted = documents.text_to_image([100, 101], masked=(1, 2, 5, 7), seed=1)
    return documents.batch([[painted, documents.image_to_text([100, 101, 102], seed=2)], []], sequence_length=50)


def model_with(groups: ParallelGroups, *options: str) -> MMARModel:
    model = build_tiny(groups, *WIDE, *options)
    stir(model)
    return model


def losses_and_gradients(model: MMARModel, batch: Batch) -> tuple[list[float], dict[str, Tensor | None]]:
    sums = model(batch)
    assert isinstance(sums, LossSums)
    (sums.image + sums.text).backward()
    return sums.flatten().tolist(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_model_learns_the_same(recompute: str, groups: ParallelGroups, batch: Batch, unfused: None) -> None:
    dense = losses_and_gradients(model_with(groups), batch)
    found = losses_and_gradients(model_with(groups, *FLEX, *RECOMPUTE[recompute]), batch)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


def test_the_mask_is_made_once_for_all_layers(
    groups: ParallelGroups, batch: Batch, unfused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    attend: Callable[..., Tensor] = flex.flex_attention

    def noting(*tensors: Tensor, block_mask: Any, **options: Any) -> Tensor:
        masks.append(block_mask)
        return attend(*tensors, block_mask=block_mask, **options)

    monkeypatch.setattr(flex, "_kernel", lambda: noting)
    hidden_states(model_with(groups, *FLEX), batch)
    assert len(masks) == 4
    assert len(set(map(id, masks))) == 1


def test_passes_with_a_cache_are_dense(groups: ParallelGroups, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of ever other lengths, and what is kept stands outside the mask."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(flex, "_kernel", lambda: refuse)
    with torch.no_grad():
        found, dense = (model_with(groups, *options)(batch, return_hidden=True, cache=KeyValueCache()) for options in (FLEX, ()))
    assert isinstance(found, Tensor) and torch.equal(found, dense)
