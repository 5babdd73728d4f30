"""The table of names: each parameter of either side is in it, once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from mmar_megatron.hf.exporting import heads_of, hugging_face_config, tensors_of
from mmar_megatron.hf.names import RULES, Heads, join, links, split
from mmar_megatron.model.layer_specs import layer_spec
from mmar_megatron.parallel import ParallelGroups
from tests.distributed.common import CODEC
from tests.unit.tiny import VOCAB_SIZE, config_of, model_of

VARIANTS = {
    "tied": [],
    "untied": ["--model.tie_embeddings", "false"],
    "QKV bias, QK norm": ["--model.backbone.add_qkv_bias", "true", "--model.backbone.qk_layernorm", "true"],
    "alignment": ["--model.alignment_loss_weight", "0.5", "--model.alignment_features", "7"],
    "wide heads, one group": ["--model.backbone.kv_channels", "12", "--model.backbone.num_query_groups", "1"],
}


class Vocabulary:
    """As much of a tokenizer as sizes need."""

    vocab_size = VOCAB_SIZE
    bos_id, eos_id, pad_id, begin_image_id, end_image_id, image_id = range(6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_parameter_of_either_side_is_used_once(variant: str, groups: ParallelGroups) -> None:
    config = config_of(*VARIANTS[variant])
    state = model_of(config, groups=groups).sharded_state_dict()
    stored = {value.key for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory)}
    hf_config = hugging_face_config(config, tokenizer=Vocabulary(), codec=CODEC)  # type: ignore[arg-type]
    theirs = tensors_of(hf_config)
    found = links(theirs)

    assert Counter(name for link in found for name in link.theirs) == Counter(list(theirs))
    ours = Counter((link.ours, link.layer) for link in found)
    assert set(ours.values()) == {1}
    assert {key for key, _ in ours} == stored
    layers = {key: sorted(layer for name, layer in ours if name == key and layer is not None) for key, _ in ours}
    assert {tuple(found) for found in layers.values()} == {(), tuple(range(config.model.backbone.num_layers))}

    sizes = {name: value.global_shape for name, value in state.items() if isinstance(value, ShardedTensor)}
    heads = heads_of(hf_config)
    for link in found:
        if link.layer is None and link.ours in sizes:
            assert tuple(join(link, theirs, heads=heads).shape) == sizes[link.ours]


def test_each_rule_is_needed(groups: ParallelGroups) -> None:
    used = set()
    for options in VARIANTS.values():
        hf_config = hugging_face_config(config_of(*options), tokenizer=Vocabulary(), codec=CODEC)  # type: ignore[arg-type]
        names = tensors_of(hf_config)
        used |= {link.ours for link in links(names)}
    for rule in RULES:
        assert any(name.startswith(rule.ours.rstrip("*")) for name in used), rule


def test_norms_have_the_names_of_transformer_engines_layers() -> None:
    """megatron-core's own local spec renames its norms to those names, so that its checkpoints load in either spec."""
    theirs = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    ours = layer_spec(config_of().model.backbone).submodules.sharded_state_dict_keys_map
    assert ours == theirs
    renamed = {f"decoder.layers.{name}weight" for name in theirs.values()}
    assert renamed <= {rule.ours for rule in RULES}


def test_joining_undoes_splitting() -> None:
    heads = Heads(num_query_groups=2, head_dim=3)
    for name, shape in (("weight", (2 * 5 * 3, 4)), ("bias", (2 * 5 * 3,))):
        (link,) = links(f"model.layers.7.self_attn.{letter}_proj.{name}" for letter in "qkv")
        tensor = torch.arange(torch.Size(shape).numel()).view(shape)
        parts = split(link, tensor, heads=heads)
        assert [len(part) for part in parts.values()] == [18, 6, 6]
        assert torch.equal(join(link, parts, heads=heads), tensor)
        query, key, value = parts.values()
        assert torch.equal(query[:9], tensor[:9])  # the first group's three heads
        assert torch.equal(key[3:], tensor[15 + 9 : 15 + 12])  # the second group's key
        assert torch.equal(value[:3], tensor[12:15])
    (link,) = links(["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"])
    assert link.ours == "decoder.layers.mlp.linear_fc1.weight"
    assert link.layer == 0


def test_unknown_and_missing_names() -> None:
    with pytest.raises(ValueError, match=r"the tensor model.layers.0.mlp.experts.weight has no place in an MMAR model"):
        links(["model.layers.0.mlp.experts.weight"])
    with pytest.raises(
        ValueError, match=r"there is model.layers.0.self_attn.q_proj.weight, but no model.layers.0.self_attn.k_proj"
    ):
        links(["model.layers.0.self_attn.q_proj.weight"])
