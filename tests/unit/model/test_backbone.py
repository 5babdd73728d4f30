"""The backbone on text alone against a Llama-style decoder written out here in plain PyTorch.

Axes: S positions, D width, H heads, G key-value groups, P heads of a group, E width of a head.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from einops import einsum, rearrange
from torch import Tensor

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups
from tests.unit.tiny import Documents, build_tiny, hidden_states, stir

LENGTH = 12
VARIANTS = {
    "grouped queries": [],
    "as many groups as heads": ["--model.backbone.num_query_groups", "4"],
    "one group": ["--model.backbone.num_query_groups", "1"],
    "QKV bias": ["--model.backbone.add_qkv_bias", "true"],
    "QK norm": ["--model.backbone.qk_layernorm", "true"],
    "QKV bias, QK norm": ["--model.backbone.add_qkv_bias", "true", "--model.backbone.qk_layernorm", "true"],
    "rotary base, width of a head": ["--model.rotary_base", "500", "--model.backbone.kv_channels", "12"],
    "epsilon": ["--model.backbone.layernorm_epsilon", "0.1"],
}


def text_batch(tokenizer: Tokenizer) -> Batch:
    """Two rows of text and no image: the slots stay empty."""
    empty = Documents(tokenizer).batch([[], []], sequence_length=LENGTH)
    generator = torch.Generator().manual_seed(2)
    return replace(
        empty,
        tokens_BS=torch.randint(400, (2, LENGTH), generator=generator),
        position_ids_BS=torch.arange(LENGTH).expand(2, -1),
        document_ids_BS=torch.zeros(2, LENGTH, dtype=torch.int64),
    )


class Reference:
    """The decoder, for one sequence, from the model's weights in float64."""

    def __init__(self, model: MMARModel) -> None:
        self.weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        self.config = model.config
        self.base = model.settings.rotary_base

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self.config.layernorm_epsilon).sqrt() * self.weights[f"{name}.weight"]

    def rotate(self, x_SHE: Tensor) -> Tensor:
        """Halves: dimension i turns with dimension i + E / 2, by position / base ** (2 i / E)."""
        length, _, width = x_SHE.shape
        frequency = torch.tensor([self.base ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
        angle_S1F = (torch.arange(length)[:, None] * frequency)[:, None]
        a, b = x_SHE.chunk(2, dim=-1)
        return torch.cat([a * angle_S1F.cos() - b * angle_S1F.sin(), b * angle_S1F.cos() + a * angle_S1F.sin()], dim=-1)

    def attention(self, layer: str, x_SD: Tensor) -> Tensor:
        name, config = f"{layer}.self_attention", self.config
        heads, groups = config.num_attention_heads, config.num_query_groups
        qkv = x_SD @ self.weights[f"{name}.linear_qkv.weight"].T
        if config.add_qkv_bias:
            qkv = qkv + self.weights[f"{name}.linear_qkv.bias"]
        # The output is one group after the other, and in each its queries, its key, its value.
        qkv_SGPE = rearrange(qkv, "s (g p e) -> s g p e", g=groups, p=heads // groups + 2)
        q_SHE = rearrange(qkv_SGPE[:, :, :-2], "s g p e -> s (g p) e")
        k_SGE, v_SGE = qkv_SGPE[:, :, -2], qkv_SGPE[:, :, -1]
        if config.qk_layernorm:
            q_SHE, k_SGE = self.norm(f"{name}.q_layernorm", q_SHE), self.norm(f"{name}.k_layernorm", k_SGE)
        q_SHE = self.rotate(q_SHE)
        k_SHE = self.rotate(k_SGE).repeat_interleave(heads // groups, dim=1)
        v_SHE = v_SGE.repeat_interleave(heads // groups, dim=1)
        scores = einsum(q_SHE, k_SHE, "q h e, k h e -> h q k") / math.sqrt(q_SHE.shape[-1])
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
        attended = einsum(scores.softmax(dim=-1), v_SHE, "h q k, k h e -> q h e")
        return rearrange(attended, "s h e -> s (h e)") @ self.weights[f"{name}.linear_proj.weight"].T

    def mlp(self, layer: str, x_SD: Tensor) -> Tensor:
        gate, up = (x_SD @ self.weights[f"{layer}.mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
        return (gate * torch.sigmoid(gate) * up) @ self.weights[f"{layer}.mlp.linear_fc2.weight"].T

    def __call__(self, tokens_S: Tensor) -> Tensor:
        h_SD = self.weights["embedding.word_embeddings.weight"][tokens_S]
        for number in range(self.config.num_layers):
            layer = f"decoder.layers.{number}"
            h_SD = h_SD + self.attention(layer, self.norm(f"{layer}.input_layernorm", h_SD))
            h_SD = h_SD + self.mlp(layer, self.norm(f"{layer}.pre_mlp_layernorm", h_SD))
        return self.norm("decoder.final_layernorm", h_SD)


@pytest.fixture(scope="module")
def batch(coarse_tokenizer: Tokenizer) -> Batch:
    return text_batch(coarse_tokenizer)


@pytest.fixture(scope="module")
def models(groups: ParallelGroups) -> dict[str, MMARModel]:
    found = {variant: build_tiny(groups, *options).eval() for variant, options in VARIANTS.items()}
    for model in found.values():
        stir(model)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_backbone_is_the_reference(variant: str, models: dict[str, MMARModel], batch: Batch) -> None:
    h_BSD = hidden_states(models[variant], batch)
    expected_BSD = torch.stack([Reference(models[variant])(tokens_S) for tokens_S in batch.tokens_BS])
    torch.testing.assert_close(h_BSD.double(), expected_BSD, rtol=1e-5, atol=1e-5)


def test_variants_differ(models: dict[str, MMARModel], batch: Batch) -> None:
    """Each option does something, so that the comparison above is not of one model eight times."""
    found = [hidden_states(model, batch) for model in models.values()]
    assert not [(i, j) for i in range(len(found)) for j in range(i) if torch.allclose(found[i], found[j], atol=1e-3)]
