"""The same checkpoints whatever modules the layers are of. Transformer Engine itself runs on GPUs alone (tests/gpu): here others
stand in for its layers, by which names, extra state and strict loading are held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.model.layer_specs import layer_spec
from mmar_megatron.parallel import ParallelGroups
from tests.unit.model.stand_ins import use_stand_ins
from tests.unit.tiny import Documents, build_tiny, config_of, engine_of

FEATURES = ("--model.backbone.add_qkv_bias", "true", "--model.backbone.qk_layernorm", "true")
TE = ("--model.backbone.transformer_impl", "transformer_engine")
BF16 = ("--precision.dtype", "bf16")
OTHERS = {"local": TE, "transformer_engine": ()}


def test_without_transformer_engine_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be imported here: install it by pip .*, or set local") as refused:
        layer_spec(config_of(*TE).model.backbone)
    assert "\n" not in str(refused.value)


def test_names_in_checkpoints(groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights alone: no extra state, which is pickled, and differs between the two."""
    use_stand_ins(monkeypatch)
    keys = []
    for options in ((), TE, (*TE, *BF16)):  # in bf16 with Transformer Engine's attention
        state = build_tiny(groups, *FEATURES, *options).sharded_state_dict(prefix="")
        assert not [name for name, value in state.items() if isinstance(value, ShardedObject)]
        keys.append(sorted(value.key for value in state.values()))
    assert keys[0] == keys[1] == keys[2]
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys[0]


def written(engine: NativeEngine, path: Path) -> Path:
    path.mkdir()
    dist_checkpointing.save(engine.sharded_state_dict(), str(path))
    return path


@pytest.mark.parametrize("implementation", OTHERS)
def test_each_continues_the_others_checkpoint(
    implementation: str,
    groups: ParallelGroups,
    coarse_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights and the optimizer's state, strictly: the steps that follow are the same."""
    use_stand_ins(monkeypatch)
    batch = Documents(coarse_tokenizer).mixed_batch()
    own = ("--model.backbone.transformer_impl", implementation, *FEATURES)
    first = engine_of(groups, *own)
    first.train_step([batch], learning_rate=1e-2)
    path = written(first, tmp_path / "checkpoint")

    second = engine_of(groups, *OTHERS[implementation], *FEATURES)
    second.load_state_dict(dist_checkpointing.load(second.sharded_state_dict(is_loading=True), str(path)))
    for _ in range(2):
        expected, found = (engine.train_step([batch], learning_rate=1e-2) for engine in (first, second))
        assert (found.loss, found.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-6)


@pytest.mark.parametrize("dtype", [(), BF16])
def test_other_weights_must_be_there(dtype: tuple[str, ...], groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_ins(monkeypatch)
    model = build_tiny(groups, *TE, *dtype)
    kept = "decoder.layers.0.self_attention.core_attention.causal.attention._extra_state"
    assert (kept in model.state_dict()) == bool(dtype)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    model.load_state_dict(state)
    del state["decoder.final_layernorm.weight"]
    with pytest.raises(RuntimeError, match="final_layernorm"):
        model.load_state_dict(state)


@torch.no_grad()
def test_fp8_is_for_training_alone(groups: ParallelGroups, coarse_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_ins(monkeypatch)
    model = build_tiny(groups, *TE, "--precision.dtype", "bf16", "--precision.fp8", "tensorwise")
    batch = Documents(coarse_tokenizer).mixed_batch()
    seen: list[str | None] = []
    model.decoder.layers[0].register_forward_hook(lambda layer, arguments, output: seen.append(layer.config.fp8))
    for training in (True, False, True):
        model.train(training)(batch)
    assert seen == ["hybrid", None, "hybrid"]
    assert (model.config.fp8, model.config.fp8_recipe) == ("hybrid", "tensorwise")
