"""Initial weights are a function of the seed and the parameter's name, spread as configured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmar_megatron.model.initialization import seeded
from mmar_megatron.model.mmar_model import MMARModel, padded_vocab_size
from mmar_megatron.parallel import ParallelGroups
from tests.unit.tiny import VOCAB_SIZE, build_tiny, config_of

FEATURES = ["--model.tie_embeddings", "false", "--model.backbone.add_qkv_bias", "true", "--model.backbone.qk_layernorm", "true"]
LAYERS = 4


def weights(model: MMARModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def of_seed_1(groups: ParallelGroups) -> dict[str, Tensor]:
    return weights(build_tiny(groups, *FEATURES, seed=1))


def test_same_seed_same_weights(groups: ParallelGroups, of_seed_1: dict[str, Tensor]) -> None:
    torch.manual_seed(5)  # what torch's own generator holds must not matter
    again = weights(build_tiny(groups, *FEATURES, seed=1))
    assert again.keys() == of_seed_1.keys()
    assert all(torch.equal(again[name], of_seed_1[name]) for name in again)


def test_other_seed_other_weights(groups: ParallelGroups, of_seed_1: dict[str, Tensor]) -> None:
    other = weights(build_tiny(groups, *FEATURES, seed=2))
    constant = {name for name, weight in of_seed_1.items() if weight.unique().numel() == 1}
    positions = {name for name in of_seed_1 if ".position." in name}  # they begin as sinusoids
    assert {name for name in other if torch.equal(other[name], of_seed_1[name])} == constant | positions


def test_no_two_matrices_are_alike(of_seed_1: dict[str, Tensor]) -> None:
    """Every layer draws its own, not the same weights again."""
    drawn = {name: weight.flatten()[:100] for name, weight in of_seed_1.items() if weight.unique().numel() > 1}
    names = sorted(drawn)
    alike = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if drawn[a].shape == drawn[b].shape and torch.allclose(drawn[a] / drawn[a].std(), drawn[b] / drawn[b].std())
    ]
    assert not alike


@pytest.mark.parametrize("std", [0.02, 0.05])
def test_spread(groups: ParallelGroups, std: float) -> None:
    """What writes into the residual stream is smaller by the root of twice the number of layers."""
    found = weights(build_tiny(groups, *FEATURES, "--model.backbone.init_method_std", str(std)))
    expected = {
        "embedding.word_embeddings.weight": std,
        "output_layer.weight": std,
        "self_attention.linear_qkv.weight": std,
        "mlp.linear_fc1.weight": std,
        "self_attention.linear_proj.weight": std / math.sqrt(2 * LAYERS),
        "mlp.linear_fc2.weight": std / math.sqrt(2 * LAYERS),
    }
    for suffix, spread in expected.items():
        pooled = torch.cat([weight.flatten() for name, weight in found.items() if name.endswith(suffix)])
        assert float(pooled.std()) == pytest.approx(spread, rel=0.04), suffix
        assert abs(float(pooled.mean())) < 0.1 * spread, suffix


def test_norms_are_one_and_biases_zero(of_seed_1: dict[str, Tensor]) -> None:
    # `in_ln` is what MAR calls the norms of its head.
    norms = {name for name in of_seed_1 if name.endswith(".weight") and ("norm" in name or ".in_ln." in name)}
    biases = {name for name in of_seed_1 if name.endswith(".bias")}
    assert len([name for name in norms if name.startswith("decoder.")]) == 4 * LAYERS + 1
    assert len([name for name in biases if "linear_qkv" in name]) == LAYERS
    assert all((of_seed_1[name] == 1).all() for name in norms)
    assert all((of_seed_1[name] == 0).all() for name in biases)


def test_vocabulary_is_padded(of_seed_1: dict[str, Tensor]) -> None:
    config = config_of().model
    assert [padded_vocab_size(config, size) for size in (1, 128, 129, VOCAB_SIZE)] == [128, 128, 256, 512]
    assert of_seed_1["embedding.word_embeddings.weight"].shape == of_seed_1["output_layer.weight"].shape == (512, 32)


def test_tied_embeddings_are_one_tensor(groups: ParallelGroups) -> None:
    names = weights(build_tiny(groups))
    assert "output_layer.weight" not in names


def test_seeded_leaves_the_generator_where_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(1, "a"):
        inside = torch.rand(2)
    with seeded(1, "b"):
        other_name = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    assert not torch.equal(inside, other_name)
