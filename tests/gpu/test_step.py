"""A step on the GPU: nothing waits for it on the way, a compiled head learns what the head does, and AdamW's kernel is fused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mmar_megatron import platform
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.engine.losses import global_counts
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.parallel import ParallelGroups
from tests.gpu.runs import engine_on_gpu, furthest, gradients, named, packed_batches
from tests.gpu.test_flex import FLEX
from tests.unit.tiny import Documents

BF16 = ("--precision.dtype", "bf16")
FEW = ("--model.head.row_multiple", "8")
HEADS = {
    "any number of rows": ("--model.head.compile", "kernels"),
    "few numbers": ("--model.head.compile", "kernels", *FEW),
    "graphs": ("--model.head.compile", "graphs", *FEW),
}


@pytest.fixture
def batches(coarse_tokenizer: Tokenizer) -> list[Batch]:
    return packed_batches(Documents(coarse_tokenizer))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [(), FLEX, BF16, HEADS["graphs"]], ids=["dense", "flex", "bf16", "graphs"])
def test_forward_and_backward_do_not_wait(options: tuple[str, ...], groups: ParallelGroups, batches: list[Batch]) -> None:
    engine = engine_on_gpu(groups, *options)
    for _ in range(3):  # what is compiled and captured is then so
        engine.train_step(batches, learning_rate=0.0)
    there = [batch.pin_memory().to(platform.device()) for batch in batches]
    torch.cuda.synchronize()
    with no_waiting():
        engine._run(there, counts=global_counts(there, groups=groups))
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        there[0].masked_MN.nonzero()


@pytest.mark.parametrize("head", HEADS)
def test_a_compiled_head_learns_the_same(head: str, groups: ParallelGroups, batches: list[Batch]) -> None:
    """In several steps, of which the first compile and capture; and other numbers of rows later."""
    plain = engine_on_gpu(groups)
    compiled = engine_on_gpu(groups, *HEADS[head], weights=named(plain))
    orders = [batches, batches[::-1], [batches[0]] * 2, batches]
    for order in orders:
        assert furthest(gradients(compiled, order), gradients(plain, order)) < (1e-4, "")
        losses = [engine.train_step(order, learning_rate=1e-3).loss for engine in (plain, compiled)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_fused_cross_entropy_is_close(groups: ParallelGroups, batches: list[Batch]) -> None:
    """It hands on gradients in bf16."""
    plain = engine_on_gpu(groups, *BF16)
    fused = engine_on_gpu(groups, *BF16, "--model.backbone.cross_entropy_loss_fusion", "true", weights=named(plain))
    assert furthest(gradients(fused, batches), gradients(plain, batches)) < (2e-2, "")


def test_adamw_is_fused(groups: ParallelGroups) -> None:
    """By Transformer Engine or apex, whose class is fused, or by torch."""

    def is_fused(engine: NativeEngine) -> bool:
        parts = [part.optimizer for part in engine.optimizer.chained_optimizers]
        return all(not isinstance(part, torch.optim.AdamW) or part.param_groups[0]["fused"] for part in parts)

    assert is_fused(engine_on_gpu(groups))
