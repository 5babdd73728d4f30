"""Transformer Engine's layers against megatron-core's own: losses, gradients, checkpoints; and FP8 beside bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.parallel import ParallelGroups
from tests.gpu.runs import engine_on_gpu, furthest, gradients, named, packed_batches
from tests.gpu.test_flex import FLEX, RECOMPUTE
from tests.unit.tiny import Documents

TE = ("--model.backbone.transformer_impl", "transformer_engine")
BF16 = ("--precision.dtype", "bf16")
FEATURES = ("--model.backbone.add_qkv_bias", "true", "--model.backbone.qk_layernorm", "true")
RECIPES = ("delayed", "tensorwise", "blockwise")


@pytest.fixture(autouse=True)
def transformer_engine() -> None:
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine: requirements-gpu.txt")


@pytest.fixture
def batches(coarse_tokenizer: Tokenizer) -> list[Batch]:
    return packed_batches(Documents(coarse_tokenizer))


def fp8(recipe: str) -> tuple[str, ...]:
    return (*TE, *BF16, "--precision.fp8", recipe)


@pytest.mark.parametrize("options", [(), FEATURES, FLEX, RECOMPUTE["full"]], ids=["plain", "features", "flex", "recompute"])
def test_it_learns_the_same_in_fp32(options: tuple[str, ...], groups: ParallelGroups, batches: list[Batch]) -> None:
    """Up to TF32, in which Transformer Engine multiplies fp32: 10 bits of mantissa."""
    local = engine_on_gpu(groups, *options)
    other = engine_on_gpu(groups, *options, *TE, weights=named(local))
    assert furthest(gradients(other, batches), gradients(local, batches)) < (5e-3, "")


def test_in_bf16_it_errs_no_more_than_the_local_layers(groups: ParallelGroups, batches: list[Batch]) -> None:
    exact = engine_on_gpu(groups)
    expected = gradients(exact, batches)
    local, other = (
        furthest(gradients(engine_on_gpu(groups, *options, *BF16, weights=named(exact)), batches), expected)
        for options in ((), TE)
    )
    assert other[0] < 1.5 * local[0] + 1e-3, (local, other)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_close_to_bf16(recipe: str, recompute: str, groups: ParallelGroups, batches: list[Batch]) -> None:
    """e4m3 rounds to 1/16 and e5m2 to 1/8 at most: a gradient that is mostly noise would be off by 1."""
    plain = engine_on_gpu(groups, *TE, *BF16)
    expected = gradients(plain, batches)
    engine = engine_on_gpu(groups, *fp8(recipe), *RECOMPUTE[recompute], weights=named(plain))
    gradients(engine, batches)  # delayed scaling knows no largest values before
    found = gradients(engine, batches)
    assert all(tensor.isfinite().all() for tensor in found.values())
    distance, name = furthest(found, expected)
    assert 1e-3 < distance < 0.3, (distance, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_learns(recipe: str, groups: ParallelGroups, batches: list[Batch]) -> None:
    """The copies of weights in FP8 follow the weights: with stale ones the losses would part."""
    losses = {}
    for name, options in {"bf16": (*TE, *BF16), "fp8": fp8(recipe)}.items():
        engine = engine_on_gpu(groups, *options)
        losses[name] = [engine.train_step(batches, learning_rate=3e-3).loss for _ in range(20)]
    assert losses["fp8"][-1] < 0.9 * losses["fp8"][0]
    assert losses["fp8"][-1] == pytest.approx(losses["bf16"][-1], rel=0.05)


def test_layers_can_be_spared(groups: ParallelGroups, batches: list[Batch]) -> None:
    """With all of them in bf16 nothing is left of FP8."""
    plain = engine_on_gpu(groups, *TE, *BF16)
    spare_all = ("--model.backbone.first_last_layers_bf16", "true", "--model.backbone.num_layers_at_start_in_bf16", "4")
    spared = engine_on_gpu(groups, *fp8("tensorwise"), *spare_all, weights=named(plain))
    assert furthest(gradients(spared, batches), gradients(plain, batches)) < (1e-6, "")


def test_evaluation_is_in_bf16(groups: ParallelGroups, batches: list[Batch]) -> None:
    plain = engine_on_gpu(groups, *TE, *BF16)
    engine = engine_on_gpu(groups, *fp8("tensorwise"), weights=named(plain))
    found, expected = (evaluated(each, batches) for each in (engine, plain))
    assert found == pytest.approx(expected, rel=1e-6)


def evaluated(engine: NativeEngine, batches: list[Batch]) -> list[float]:
    with engine.evaluating():
        return engine.evaluate(batches).sums.flatten().tolist()


@pytest.mark.parametrize(("saving", "loading"), [(TE, ()), ((), TE), (fp8("delayed"), (*BF16,)), ((*BF16,), fp8("tensorwise"))])
def test_checkpoints_are_one(
    saving: tuple[str, ...], loading: tuple[str, ...], groups: ParallelGroups, batches: list[Batch], tmp_path: Path
) -> None:
    """Weights to the bit, with the optimizer's state, whichever layers wrote them."""
    first = engine_on_gpu(groups, *saving)
    first.train_step(batches, learning_rate=1e-3)
    dist_checkpointing.save(first.sharded_state_dict(), str(tmp_path))
    second = engine_on_gpu(groups, *loading)
    second.load_state_dict(dist_checkpointing.load(second.sharded_state_dict(is_loading=True), str(tmp_path)))
    for name, tensor in named(first).items():
        assert torch.equal(named(second)[name], tensor), name
    results = [engine.train_step(batches, learning_rate=1e-3) for engine in (first, second)]
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-4 if saving in (TE, ()) else 0.05)
