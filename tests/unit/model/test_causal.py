"""Batches of one text a row are attended to in causal order, without a mask: which these are, and that nothing else changes.

Axes: B rows, S positions, H heads, G key-value groups, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.model import attention, flex
from mmar_megatron.model.attention import MixedAttention, attention_bias, mixed_attention_allowed
from mmar_megatron.model.key_values import KeyValueCache
from mmar_megatron.model.losses import LossSums
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups
from tests.unit.model.stand_ins import Attention, fp8_autocast, use_stand_ins
from tests.unit.model.test_flex import FLEX, RECOMPUTE, WIDE
from tests.unit.tiny import Documents, build_tiny, config_of, hidden_states, stir

DROPOUT = ("--model.backbone.attention_dropout", "0.5")
TE = ("--model.backbone.transformer_impl", "transformer_engine")
BF16 = ("--precision.dtype", "bf16")


@pytest.fixture
def documents(coarse_tokenizer: Tokenizer) -> Documents:
    return Documents(coarse_tokenizer)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What each layer's attention was given, of both kinds of masks."""
    given: list[Any] = []
    forward = MixedAttention.forward

    def noting(self: MixedAttention, *tensors: Any, attention_bias: Any = None, **options: Any) -> Tensor:
        given.append((tensors[3], attention_bias))
        return forward(self, *tensors, attention_bias=attention_bias, **options)

    monkeypatch.setattr(MixedAttention, "forward", noting)
    yield given


def model_with(groups: ParallelGroups, *options: str) -> MMARModel:
    model = build_tiny(groups, *WIDE, *options)
    stir(model)
    return model


def losses_and_gradients(model: MMARModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    sums = model(batch)
    assert isinstance(sums, LossSums)
    (sums.text + sums.image).backward()
    return sums.flatten(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest norm of a difference over the norm, of those that are not zero."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0 or found[name].norm() == 0, name
    return max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items() if g.norm() > 0)


# --- that nothing changes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_losses_and_gradients_are_those_under_the_mask(
    recompute: str, groups: ParallelGroups, documents: Documents, masks: list[Any]
) -> None:
    batch = documents.text_batch()
    expected, expected_gradients = losses_and_gradients(model_with(groups), replace(batch, causal=False))
    assert len(masks) == 4
    assert all(mask is not None for mask, _ in masks)
    masks.clear()
    found, gradients = losses_and_gradients(model_with(groups, *RECOMPUTE[recompute]), batch)
    assert len(masks) == (4 if recompute == "none" else 8)
    assert set(masks) == {(None, None)}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert expected[0] > 0.1
    assert furthest(gradients, expected_gradients) < 1e-6
    assert gradients["decoder.layers.0.self_attention.linear_qkv.weight"].norm() > 0.1


def test_what_the_host_says_is_believed(groups: ParallelGroups, documents: Documents) -> None:
    """Nobody looks at the tensors again: with an image in it, a batch that is said to be causal has other losses."""
    batch = documents.mixed_batch()
    expected, _ = losses_and_gradients(model_with(groups), batch)
    found, _ = losses_and_gradients(model_with(groups), replace(batch, causal=True))
    assert not torch.allclose(found, expected, rtol=1e-3)


def test_dropout_is_drawn_from_the_ranks_own_numbers(groups: ParallelGroups, documents: Documents) -> None:
    """Twice the same after the same beginning, other losses afterwards, and none in evaluation."""
    model, batch = model_with(groups, *DROPOUT), documents.text_batch()
    tracker = attention.get_cuda_rng_tracker()
    states = tracker.get_states()

    def loss(of: MMARModel) -> float:
        with torch.no_grad():
            return float(of(batch).text)

    first, second = loss(model), loss(model)
    tracker.set_states(states)
    assert loss(model) == first != second
    assert loss(model.eval()) == loss(model_with(groups))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("groups_of_keys", [1, 2])
def test_keys_are_repeated_as_on_gpus(
    groups_of_keys: int, masked: bool, groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose fused kernels want as many keys as queries, but for flash attention, without a mask in 16 bits."""
    seen: list[tuple[int, bool]] = []
    kernel = F.scaled_dot_product_attention

    def noting(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool, **options: Any) -> Tensor:
        seen.append((key.shape[1], enable_gqa))
        return kernel(query, key, value, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    config = config_of(*WIDE, "--model.backbone.num_query_groups", str(groups_of_keys)).model.backbone
    ids_BS = torch.zeros((2, 10), dtype=torch.int64)
    allowed_BSS = mixed_attention_allowed(document_ids_BS=ids_BS, span_ids_BS=ids_BS - 1)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(10, 2, n, 16, generator=generator).requires_grad_() for n in (4, groups_of_keys, groups_of_keys)]

    def outcome(*, as_on_gpus: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        attend = MixedAttention(config, layer_number=1)
        attend.as_on_gpus = as_on_gpus
        output = attend(*(x.to(dtype) for x in inputs), attention_bias(allowed_BSS, dtype=dtype) if masked else None)
        return [output, *torch.autograd.grad((output * torch.arange(64.0)).sum(), inputs)]

    torch.testing.assert_close(outcome(as_on_gpus=True), outcome(as_on_gpus=False), rtol=1e-5, atol=1e-5)
    outcome(as_on_gpus=True, dtype=torch.bfloat16)
    repeated, grouped = (4, False), (groups_of_keys, True)
    assert seen == [repeated, grouped, repeated if masked else grouped]


def test_padding_is_learned_by_nothing(documents: Documents) -> None:
    """In causal order it sees the document before it, which it may not: so it must reach no loss."""
    batch = documents.text_batch()
    padding_BS = batch.document_ids_BS < 0
    assert padding_BS.any(dim=1).all()
    assert (batch.labels_BS[padding_BS] == IGNORE).all()
    assert not (batch.masked_MN | batch.visible_MN).any()


# --- which batches --------------------------------------------------------------------------------------------------------------


def batches(documents: Documents) -> dict[str, Batch]:
    text, told = documents.text([100, 101]), documents.image_to_text([100], seed=1)
    rows = {"packed": [[text, text]], "an image": [[text], [told]], "painted": [[documents.text_to_image([100], masked=(1, 2))]]}
    return {kind: documents.batch(of_kind, sequence_length=32) for kind, of_kind in rows.items()}


@pytest.mark.parametrize("kind", ["packed", "an image", "painted"])
def test_others_have_the_mask(kind: str, groups: ParallelGroups, documents: Documents, masks: list[Any]) -> None:
    hidden_states(model_with(groups), batches(documents)[kind])
    assert len(masks) == 4
    assert all(mask is not None for mask, _ in masks)


def test_flex_leaves_them_to_causal_order_too(
    groups: ParallelGroups, documents: Documents, masks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_kernel", lambda: pytest.fail("no kernel is wanted"))
    batch = documents.text_batch()
    found, dense = (losses_and_gradients(model_with(groups, *options), batch)[0] for options in (FLEX, ()))
    assert torch.equal(found, dense)
    assert set(masks) == {(None, None)}


@torch.no_grad()
def test_passes_with_a_cache_have_the_mask(groups: ParallelGroups, documents: Documents, masks: list[Any]) -> None:
    """What is kept stands before the queries."""
    batch = documents.text_batch()
    model = model_with(groups).eval()
    kept, plain = model(batch, return_hidden=True, cache=KeyValueCache()), model(batch, return_hidden=True)
    assert [mask is None for mask, _ in masks] == [False] * 4 + [True] * 4
    real_SB = (batch.document_ids_BS >= 0).t()
    torch.testing.assert_close(kept[real_SB], plain[real_SB])


# --- Transformer Engine's kernels, for which others stand in --------------------------------------------------------------------


def test_transformer_engine_attends_to_them_alone(
    groups: ParallelGroups, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_ins(monkeypatch)
    engine, local = (model_with(groups, *BF16, *options) for options in (TE, ()))
    for batch in batches(documents).values():
        hidden_states(engine, batch)
    assert Attention.calls == 0
    batch = documents.text_batch()
    found, _ = losses_and_gradients(engine, batch)
    assert Attention.calls == 4
    expected, _ = losses_and_gradients(local, batch)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("options", [(), (*BF16, "--model.backbone.kv_channels", "12")], ids=["fp32", "12 channels"])
def test_what_transformer_engine_would_not_fuse_is_torchs(
    options: tuple[str, ...], groups: ParallelGroups, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_ins(monkeypatch)
    losses_and_gradients(build_tiny(groups, *TE, *options), documents.text_batch())
    assert Attention.calls == 0


def test_transformer_engine_attends_outside_of_fp8(
    groups: ParallelGroups, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else ranks would exchange different numbers of largest values, since not all have such a batch in the same step."""
    use_stand_ins(monkeypatch)
    model = model_with(groups, *BF16, *TE)
    with fp8_autocast(enabled=True):
        model(documents.text_batch())
        assert Attention.in_fp8
    assert Attention.calls == 4
