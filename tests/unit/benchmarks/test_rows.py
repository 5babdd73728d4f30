"""Computing only what has a loss changes neither loss nor gradient; and the ways of attention attend to the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.benchmarks import attention, rows
from mmar_megatron.benchmarks.attention import CAUSAL, IMPLEMENTATIONS, MODEL, Implementation, compare_attention
from mmar_megatron.benchmarks.synthetic import stirred_model, synthetic_batch
from mmar_megatron.config import MaskRatioConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups
from tests.unit.model.stand_ins import use_stand_ins
from tests.unit.model.traced import traced
from tests.unit.model.unfused import use_unfused_flex
from tests.unit.tiny import config_of

HEADS = ("masked", "masked, compiled", "filled up, compiled", "filled up, graphs")
UNIFORM = MaskRatioConfig(distribution="uniform", minimum=0.0)


@pytest.fixture(scope="module")
def model(groups: ParallelGroups) -> MMARModel:
    return stirred_model(config_of(), groups=groups, channels=3, vocab_size=200)


def batch_of(*, documents: int = 1, length: int | None = None) -> Batch:
    return synthetic_batch(
        rows=2,
        documents=documents,
        text=5,
        image_tokens=8,
        channels=3,
        levels=2,
        mask_ratio=UNIFORM,
        length=length,
        seed=1,
    )


def learned(learn: Callable[[Tensor], Tensor], model: MMARModel, *, positions: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, and gradients of hidden states and weights."""
    h_TD = torch.randn(positions, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = learn(h_TD)
    assert h_TD.grad is not None
    return loss, h_TD.grad, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("part", ["head", "logits"])
def test_what_is_left_out_has_no_loss(part: str, model: MMARModel) -> None:
    batch = batch_of()
    labels_T = batch.labels_BS.flatten()
    if part == "head":
        everywhere = partial(rows._head_everywhere, model, batch=batch)
        chosen = partial(rows._head_on_masked, model, batch=batch)
        counted_T = batch.masked_MN.flatten()
    else:
        everywhere = partial(rows._logits_everywhere, model, labels_T=labels_T)
        chosen = partial(rows._logits_at_labels, model, labels_T=labels_T)
        counted_T = labels_T >= 0
    assert 0 < counted_T.sum() < len(counted_T)
    loss, of_hidden_TD, of_weights = learned(everywhere, model, positions=len(counted_T))
    again, of_hidden_again_TD, of_weights_again = learned(chosen, model, positions=len(counted_T))
    assert loss > 0.1
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(of_hidden_again_TD, of_hidden_TD)
    torch.testing.assert_close(of_weights_again, of_weights)
    assert torch.equal(of_hidden_TD.ne(0).any(dim=1), counted_T)
    assert min(float(gradient.abs().max()) for gradient in of_weights.values()) > 0
    assert any(name.startswith("diffusion_head.") for name in of_weights) == (part == "head")


def test_all_heads_have_the_same_loss(groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are compiled on GPUs: here they are traced alone."""
    monkeypatch.setattr(rows, "sized", lambda options: (config_of(*options), groups))
    with traced():
        found = rows.compare_head([], images=4, image_tokens=16, channels=8, rounds=2, compiled=True)["rows"]
    assert {(row["case"], row["rows"]) for row in found} == {(stage, way) for stage in rows.STAGES for way in HEADS}
    assert max(row["relative_loss_difference"] for row in found) < 1e-5


def test_stages_mask_what_they_say() -> None:
    def share(mask_ratio: MaskRatioConfig) -> float:
        batch = synthetic_batch(rows=200, text=1, image_tokens=64, mask_ratio=mask_ratio, seed=1)
        return float(batch.num_masked) / batch.masked_MN.numel()

    # The normal distribution of mean 1 and deviation 1/4, cut to [0.7, 1], has mean 1 - (phi(0) - phi(1.2)) / 4 (Phi(1.2) - 1/2).
    # Rounding up to whole tokens adds 1/128.
    assert share(rows.STAGES["stage 1"]) == pytest.approx(0.867 + 1 / 128, abs=0.01)
    assert share(rows.STAGES["uniform"]) == pytest.approx(0.5 + 1 / 128, abs=0.05)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is for GPUs alone: here FlexAttention runs uncompiled, others stand in for Transformer Engine, and torch for cuDNN."""
    use_unfused_flex(monkeypatch)
    use_stand_ins(monkeypatch)
    monkeypatch.setattr(attention, "_by", lambda backend, attend, *tensors: attend(*tensors))


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name not in (MODEL, *CAUSAL)])
def test_all_attend_alike(name: str, model: MMARModel, elsewhere: None) -> None:
    batch = batch_of(documents=2, length=32)
    assert (batch.document_ids_BS < 0).any()
    _compare(name, model, batch=batch, real_BS=batch.document_ids_BS >= 0)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_attention_is_that_of_text(name: str, model: MMARModel, elsewhere: None) -> None:
    batch = batch_of()
    _compare(name, model, batch=batch, real_BS=batch.span_ids_BS < 0)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        _compare(name, model, batch=batch, real_BS=batch.document_ids_BS >= 0)


def _compare(name: str, model: MMARModel, *, batch: Batch, real_BS: Tensor) -> None:
    """Outputs at some positions, and the gradients of a loss on these."""
    config = model.settings.backbone
    generator = torch.Generator().manual_seed(0)
    shape = (batch.tokens_BS.shape[1], 2)
    inputs = [torch.randn(*shape, n, 8, generator=generator).requires_grad_() for n in (4, 2, 2)]
    weight_SBD = torch.randn(*shape, 32, generator=generator) * real_BS.t()[:, :, None]
    outputs = [IMPLEMENTATIONS[which].prepare(config, batch)(*inputs) for which in (MODEL, name)]
    gradients = [torch.autograd.grad((output_SBD * weight_SBD).sum(), inputs) for output_SBD in outputs]
    expected_SBD, found_SBD = (output_SBD.transpose(0, 1)[real_BS] for output_SBD in outputs)
    assert outputs[1].shape == (*shape, 32)
    torch.testing.assert_close(found_SBD, expected_SBD)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.fixture
def measured(groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    monkeypatch.setattr(attention, "sized", lambda options: (config_of(), groups))
    return partial(compare_attention, (), lengths=[16], positions=16, text=4, image_tokens=4, rounds=2)


def test_what_cannot_run_here_is_left_out_with_the_reason(measured: Callable[[], dict[str, Any]]) -> None:
    found = measured()
    assert [row["implementation"] for row in found["rows"]] == ["dense", "causal", "unfused"]
    assert sorted(found["skipped"]) == ["cudnn", "flex", "te causal", "te unfused"]
    assert found["skipped"]["cudnn"] == "cuDNN computes on GPUs alone"


def test_reasons_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(name: str, *options: str) -> str | None:
        return IMPLEMENTATIONS[name].lacks(config_of(*options).model.backbone)

    bf16 = ("--precision.dtype", "bf16")
    monkeypatch.setattr(platform, "HAS_CUDA", True)
    for name in IMPLEMENTATIONS:
        assert (lacks(name, *bf16) or "").startswith("Transformer Engine cannot be imported" if "te " in name else "")
    assert lacks("cudnn") == "cuDNN's attention takes 16 bits alone: set precision.dtype bf16"
    use_stand_ins(monkeypatch)
    assert [name for name in IMPLEMENTATIONS if lacks(name, *bf16)] == []
    assert [name for name in IMPLEMENTATIONS if lacks(name)] == ["cudnn", "te causal"]


def test_what_wants_too_much_memory_is_left_out_at_that_length(
    measured: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(IMPLEMENTATIONS, "unfused", Implementation(prepare=lambda config, batch: refuse))
    found = measured()
    assert [row["implementation"] for row in found["rows"]] == ["dense", "causal"]
    assert found["skipped"]["unfused at length 16"] == "it wants more memory than there is"
