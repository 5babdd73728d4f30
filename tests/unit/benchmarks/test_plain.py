"""Plain PyTorch computes what the engine does, so that their times may be compared; and the parts of a step make up the whole."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mmar_megatron.benchmarks.parts import PARTS, measure_parts
from mmar_megatron.benchmarks.plain import PlainModel, PlainTrainer, plain_name
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.parallel import ParallelGroups
from tests.unit.tiny import Documents, build_tiny, config_of, engine_of, weights


@pytest.fixture(scope="module")
def microbatches(coarse_tokenizer: Tokenizer) -> list[Batch]:
    """One of two rows, and one whose first row holds two documents and some padding, its second nothing."""
    documents = Documents(coarse_tokenizer)
    packed = [
        documents.image_to_text([100, 101], seed=3),
        documents.text_to_image([100, 101, 102], masked=(0, 3, 4, 15), seed=4),
    ]
    return [documents.mixed_batch(), documents.batch([packed, []], sequence_length=64)]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--model.tie_embeddings", "false", "--model.rotary_base", "500", "--model.diffusion.num_timesteps", "50"],
        ["--model.image_loss_weight", "3", "--model.text_loss_weight", "0.5", "--model.backbone.kv_channels", "12"],
        ["--model.rotary_scaling.scaling", "linear", "--model.rotary_scaling.factor", "4"],
    ],
    ids=["as it is", "untied", "weighted", "stretched"],
)
def test_plain_pytorch_is_the_model(options: Sequence[str], microbatches: list[Batch], groups: ParallelGroups) -> None:
    config, engine = config_of(*options), engine_of(groups, *options)
    assert engine.last_stage is not None
    trainer = PlainTrainer(PlainModel(config.model, engine.last_stage), config.optimizer, bf16=False)
    trainer.backward(microbatches)
    expected = engine.train_step(microbatches, learning_rate=0.0, judge=lambda loss, norm: "only looking")
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    found = {name: parameter.main_grad for name, parameter in engine.last_stage.named_parameters()}
    assert len(found) == len(gradients) > 40
    for name, gradient in found.items():
        torch.testing.assert_close(gradients[plain_name(name)], gradient, rtol=1e-5, atol=1e-5, msg=name)
    assert trainer.train_step(microbatches) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-5)


def test_plain_pytorch_learns_alike(microbatches: list[Batch], groups: ParallelGroups) -> None:
    """Three steps: clipping, weight decay and AdamW are the same."""
    # Biases of keys have gradients that are mere rounding errors. AdamW divides gradients by their size, but for eps.
    options = ["--optimizer.weight_decay", "0.5", "--optimizer.clip_grad", "0.1", "--optimizer.eps", "1e-4"]
    config, engine = config_of(*options), engine_of(groups, *options)
    assert engine.last_stage is not None
    before = weights(engine)
    trainer = PlainTrainer(PlainModel(config.model, engine.last_stage), config.optimizer, bf16=False)
    for _ in range(3):
        expected = engine.train_step(microbatches, learning_rate=config.optimizer.lr)
        assert trainer.train_step(microbatches) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-5)
    own = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    for name, weight in weights(engine).items():
        torch.testing.assert_close(own[plain_name(name)], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(before["decoder.final_layernorm.weight"], own["norm.weight"])


def test_what_plain_pytorch_lacks(groups: ParallelGroups) -> None:
    options = ["--model.backbone.add_qkv_bias", "true"]
    with pytest.raises(ValueError, match=r"plain PyTorch has no blocks\.0\.attention\.qkv\.bias: leave out the option"):
        PlainModel(config_of(*options).model, build_tiny(groups, *options))


def test_parts_make_up_the_step(microbatches: list[Batch], groups: ParallelGroups) -> None:
    watched, alone = engine_of(groups), engine_of(groups)
    texts = microbatches[0].changed(masked_MN=torch.zeros_like(microbatches[0].masked_MN))  # a part may have nothing to do
    batches = [*microbatches, texts]
    rows = measure_parts(watched, batches, learning_rate=1e-3, rounds=3)
    assert tuple(row["part"] for row in rows) == PARTS
    for row in rows[:4]:
        assert min(row["forward_s"], row["backward_s"]) > 0, row
    for row in rows[4:]:  # the last is what the others leave: below zero if time were counted twice
        assert row["forward_s"] > 0 == row["backward_s"], row
    for _ in range(6):
        alone.train_step(batches, learning_rate=1e-3)
    for name, weight in weights(alone).items():
        assert torch.equal(weights(watched)[name], weight), name
