"""The learning rate of each step, what decays, clipping, and that a step with a gradient that is not finite leaves no trace."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from mmar_megatron.config import OptimizerConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.engine.optimizer import learning_rate
from mmar_megatron.model.losses import LossSums
from mmar_megatron.parallel import ParallelGroups
from tests.unit.tiny import Documents, config_of, engine_of, model_of, stir, weights

FEATURES = ["--model.tie_embeddings=false", "--model.backbone.add_qkv_bias=true", "--model.backbone.qk_layernorm=true"]


@pytest.fixture
def batch(coarse_tokenizer: Tokenizer) -> Batch:
    return Documents(coarse_tokenizer).mixed_batch()


def moments(engine: NativeEngine) -> dict[str, list[Tensor]]:
    """Copies of Adam's state, by the name of its entries, and of the average of the weights where there is one."""
    states = [state for part in engine.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    average = [] if engine.average is None else [tensor.clone() for tensor in engine.average._averages]
    return {name: [state[name].clone() for state in states] for name in ("step", "exp_avg", "exp_avg_sq")} | {"average": average}


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


# --- learning rate --------------------------------------------------------------------------------------------------------------


def rates(*, steps: int, **options: object) -> list[float]:
    config = replace(OptimizerConfig(lr=1.0, warmup_steps=4), **options)  # type: ignore[arg-type]
    return [learning_rate(step, config=config, total_steps=steps) for step in range(steps)]


def test_cosine_from_the_warm_up_to_the_last_step() -> None:
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(6)]
    assert rates(steps=10, min_lr=0.1) == pytest.approx([0.25, 0.5, 0.75, 1.0, *cosine])
    assert rates(steps=10, min_lr=0.1)[-1] == pytest.approx(0.1)


def test_constant_after_the_warm_up() -> None:
    assert rates(steps=8, schedule="constant", min_lr=0.1) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert rates(steps=3, warmup_steps=0) == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_a_run_no_longer_than_the_warm_up(steps: int) -> None:
    assert rates(steps=steps) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0][:steps])


def test_later_steps_than_planned_stay_at_the_end() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=0, min_lr=0.25)
    assert [learning_rate(step, config=config, total_steps=5) for step in (4, 5, 50)] == pytest.approx([0.25] * 3)


# --- AdamW ----------------------------------------------------------------------------------------------------------------------


def test_it_is_fused_also_after_a_checkpoint_of_one_that_was_not(groups: ParallelGroups, batch: Batch, tmp_path: Path) -> None:
    first, second = engine_of(groups), engine_of(groups)
    for group in first.optimizer.param_groups:
        assert group["fused"]
        group["fused"] = None
    first.train_step([batch], learning_rate=1e-3)
    dist_checkpointing.save(first.sharded_state_dict(), str(tmp_path))
    second.load_state_dict(dist_checkpointing.load(second.sharded_state_dict(is_loading=True), str(tmp_path)))
    assert all(group["fused"] for group in second.optimizer.param_groups)
    results = [engine.train_step([batch], learning_rate=1e-3) for engine in (first, second, first, second)]
    assert results[3].loss == pytest.approx(results[2].loss, rel=1e-6)  # one kernel or several, the weights are the same


# --- weight decay ---------------------------------------------------------------------------------------------------------------


def test_what_decays(groups: ParallelGroups, batch: Batch) -> None:
    """Where nothing is to be learned, AdamW only decays: weights shrink by learning rate x decay, or stay as they are."""
    engine = engine_of(groups, *FEATURES, "--optimizer.weight_decay=0.2")
    before = weights(engine)
    result = engine.train_step([batch.without_losses()], learning_rate=0.5)
    after = weights(engine)
    assert (result.grad_norm, result.skipped) == (0.0, None)

    kept = {name for name in after if torch.equal(after[name], before[name])}
    for name in after.keys() - kept:
        torch.testing.assert_close(after[name], before[name] * (1 - 0.5 * 0.2))
    matrices = {name for name, weight in before.items() if weight.ndim > 1}
    assert {name for name in kept if name in matrices and not name.startswith("diffusion_head.")} == {
        "embedding.embedding_vit.position.row",
        "embedding.embedding_vit.position.column",
        "embedding.position.row",
        "embedding.position.column",
    }
    assert {name for name in before if name.startswith("diffusion_head.")} <= kept
    assert before.keys() - matrices <= kept  # norms, biases, the mask embedding
    assert {"embedding.word_embeddings.weight", "output_layer.weight", "post_projector.0.weight"} <= after.keys() - kept
    assert "decoder.layers.0.mlp.linear_fc1.weight" in after.keys() - kept


# --- a step ---------------------------------------------------------------------------------------------------------------------


def test_a_first_step_is_adamw(groups: ParallelGroups, batch: Batch) -> None:
    """p <- p - lr g / (|g| + eps), for the corrections of both moments cancel at the first step."""
    engine = engine_of(groups, "--optimizer.weight_decay=0", "--optimizer.clip_grad=0", "--optimizer.betas=[0.8, 0.9]")
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    parameter = dict(engine.chunks[0].module.named_parameters())[name]
    before = parameter.detach().clone()
    engine.train_step([batch], learning_rate=1e-2)
    gradient = parameter.main_grad  # of megatron-core, still there after the step
    assert gradient.any()
    torch.testing.assert_close(parameter.detach(), before - 1e-2 * gradient / (gradient.abs() + 1e-8), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_long_gradient_is_clipped(share: float, groups: ParallelGroups, batch: Batch) -> None:
    free = engine_of(groups, "--optimizer.clip_grad=0")
    whole = free.train_step([batch], learning_rate=1e-3).grad_norm
    unclipped = moments(free)["exp_avg"]
    assert norm(unclipped) == pytest.approx(0.1 * whole, rel=1e-4)  # beta 0.9: a tenth of the gradient is new

    limit = share * whole
    engine = engine_of(groups, f"--optimizer.clip_grad={limit}")
    assert engine.train_step([batch], learning_rate=1e-3).grad_norm == pytest.approx(whole)  # as it was before
    assert norm(moments(engine)["exp_avg"]) == pytest.approx(0.1 * limit, rel=1e-4)
    for clipped, as_it_was in zip(moments(engine)["exp_avg"], unclipped, strict=True):
        torch.testing.assert_close(clipped, share * as_it_was, rtol=1e-4, atol=1e-8)


def test_a_short_gradient_is_left_alone(groups: ParallelGroups, batch: Batch) -> None:
    engines = [engine_of(groups, f"--optimizer.clip_grad={limit}") for limit in (0, 1e6)]
    for engine in engines:
        engine.train_step([batch], learning_rate=1e-3)
    first, second = map(weights, engines)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_leaves_no_trace(poison: float, dtype: str, groups: ParallelGroups, batch: Batch) -> None:
    options = [f"--precision.dtype={dtype}", "--optimizer.ema_decay=0.9"]
    engine = engine_of(groups, *options)
    engine.train_step([batch], learning_rate=1e-3)
    before, state = weights(engine), moments(engine)
    assert len(state["average"]) == len(before)

    latents_MNC = batch.latents_MNC.clone()
    latents_MNC[1, 3, 0] = poison
    result = engine.train_step([batch, replace(batch, latents_MNC=latents_MNC)], learning_rate=1e-3)
    assert result.skipped
    assert not math.isfinite(result.grad_norm)
    after, state_after = weights(engine), moments(engine)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name in state:
        assert all(torch.equal(a, b) for a, b in zip(state_after[name], state[name], strict=True)), name

    assert engine.train_step([batch], learning_rate=1e-3).skipped is None
    untroubled = engine_of(groups, *options)
    for _ in range(2):
        untroubled.train_step([batch], learning_rate=1e-3)
    expected, found = weights(untroubled), weights(engine)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name, tensors in moments(untroubled).items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, moments(engine)[name], strict=True)), name


def test_a_step_that_is_judged_bad_leaves_no_trace(groups: ParallelGroups, batch: Batch) -> None:
    engine = engine_of(groups, "--model.text_loss_weight=0.5", "--model.image_loss_weight=3")
    before, state, seen = weights(engine), moments(engine), []

    def judge(loss: float, grad_norm: float) -> str:
        seen.append((loss, grad_norm))
        return "odd"

    result = engine.train_step([batch], learning_rate=1e-3, judge=judge)
    assert (result.skipped, [(result.loss, result.grad_norm)]) == ("odd", seen)
    assert result.loss == pytest.approx(float(0.5 * result.sums.text / 4 + 3 * result.sums.image / 6))
    after, state_after = weights(engine), moments(engine)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name in state:
        assert all(torch.equal(a, b) for a, b in zip(state_after[name], state[name], strict=True)), name


def test_all_that_can_learn_moves(groups: ParallelGroups, batch: Batch) -> None:
    engine = engine_of(groups, *FEATURES, "--optimizer.weight_decay=0")
    before = weights(engine)
    engine.train_step([batch], learning_rate=1e-2)
    after = weights(engine)
    assert [name for name in before if torch.equal(after[name], before[name])] == []


def test_gradient_is_that_of_the_mean_losses(groups: ParallelGroups, batch: Batch) -> None:
    """Text and image loss each divided by the number of its own tokens in the step, weighted, and added."""
    options = ["--model.text_loss_weight=0.5", "--model.image_loss_weight=3"]
    engine = engine_of(groups, *options, "--optimizer.clip_grad=0")
    model = model_of(config_of(*options), groups=groups)
    stir(model)
    sums = model(batch)
    assert isinstance(sums, LossSums)
    (0.5 * sums.text / 4 + 3 * sums.image / 6).backward()

    result = engine.train_step([batch], learning_rate=0.0)
    assert result.counts.to_tensor().tolist() == [4, 6, 0]
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in engine.chunks[0].module.named_parameters():
        torch.testing.assert_close(parameter.main_grad, expected.get(name, torch.zeros_like(parameter)), rtol=1e-4, atol=1e-6)
    assert result.grad_norm == pytest.approx(norm(list(expected.values())), rel=1e-5)


def test_microbatches_are_one_batch(groups: ParallelGroups, batch: Batch, coarse_tokenizer: Tokenizer) -> None:
    """Losses are divided by the counts of the whole step, however unevenly these fall on the microbatches."""
    documents = Documents(coarse_tokenizer)
    rows = [
        [documents.text_to_image([100], masked=[3], seed=1)],
        [documents.text_to_image([100, 101], masked=range(1, 16), seed=2)],
        [documents.image_to_text([100, 101, 102], seed=3)],
        [documents.image_to_text([103], seed=4)],
    ]
    whole = documents.batch(rows, sequence_length=32)
    parts = [documents.batch([row], sequence_length=32) for row in rows]
    engines = [engine_of(groups), engine_of(groups)]
    results = [engine.train_step(batches, learning_rate=1e-2) for engine, batches in zip(engines, ([whole], parts), strict=True)]
    assert results[0].counts.to_tensor().tolist() == results[1].counts.to_tensor().tolist() == [6, 16, 0]
    torch.testing.assert_close(results[0].sums.flatten(), results[1].sums.flatten(), rtol=1e-5, atol=1e-6)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
