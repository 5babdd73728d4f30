"""Engines on the GPU with a small model, and how far one training is from another."""

from __future__ import annotations

import torch
from torch import Tensor

from mmar_megatron.data.batch import Batch
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.parallel import ParallelGroups
from tests.unit.tiny import Documents, config_of, model_of

SMALL = (
    *(
        "--model.backbone.hidden_size",
        "128",
        "--model.backbone.num_attention_heads",
        "4",
        "--model.backbone.num_query_groups",
        "2",
    ),
    *("--model.backbone.kv_channels", "32", "--model.backbone.ffn_hidden_size", "256", "--data.sequence_length", "64"),
    *("--optimizer.clip_grad", "0"),
)
"""Whole tiles for the matrix products of FP8, and heads wide enough for FlexAttention."""


def engine_on_gpu(groups: ParallelGroups, *options: str, weights: dict[str, Tensor] | None = None) -> NativeEngine:
    """With these weights, by their names in checkpoints' state, or its initial ones."""
    config = config_of(*SMALL, *options)
    engine = NativeEngine(config, chunks=[model_of(config, groups=groups)], groups=groups)
    if weights is not None:
        with torch.no_grad():
            for name, tensor in named(engine).items():
                tensor.copy_(weights[name])
        engine.optimizer.reload_model_params()
    return engine


def named(engine: NativeEngine) -> dict[str, Tensor]:
    """The model's parameters, by their names in checkpoints with the number of the layer, whatever modules hold them."""
    return {_in_checkpoints(name): parameter for name, parameter in engine.chunks[0].module.named_parameters()}


def gradients(engine: NativeEngine, batches: list[Batch]) -> dict[str, Tensor]:
    """Of one step whose learning rate is 0."""
    result = engine.train_step(batches, learning_rate=0.0)
    assert result.skipped is None
    found = {}
    for name, _, gradient in engine.parameters_and_gradients():
        assert gradient is not None
        found[_in_checkpoints(name.removeprefix("model0."))] = gradient.clone()
    return found


def packed_batches(documents: Documents) -> list[Batch]:
    """Two microbatches of packed rows that are divided differently."""
    painted = documents.text_to_image([100, 101], masked=(1, 2, 5, 7, 8), seed=1)
    told = documents.image_to_text([100, 101, 102], seed=2)
    other = documents.text_to_image([100], masked=range(16), seed=3)
    return [documents.batch(rows, sequence_length=64) for rows in ([[painted, told], [other]], [[other, other], [told, painted]])]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error, and whose it is."""
    assert found.keys() == expected.keys()
    return max((relative_error(found[name], expected[name]), name) for name in expected)


def _in_checkpoints(name: str) -> str:
    """The local modules' norms by the names that Transformer Engine has for them."""
    return name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
        "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
    )
