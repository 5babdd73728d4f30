"""A tiny exported model with stirred weights, and rows for it.

Axes: M images, N tokens of an image, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmar_megatron.hf.configuration_mmar import MMARConfig
from mmar_megatron.hf.modeling_mmar import MMARForCausalLM

N, C = 9, 12
BOS, EOS, PAD, BEGIN, END, IMAGE = 1, 2, 3, 4, 5, 6
ONE_IMAGE = [BEGIN, *[IMAGE] * N, END]


def tiny_config(**changes: Any) -> MMARConfig:
    """Grouped queries with bias and norms, tied embeddings, images of 3 x 3 tokens."""
    settings: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "qkv_bias": True,
        "qk_norm": True,
        "embedding_vit": {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 3},
        "head": {"depth": 2, "width": 64, "timestep_multiplier": 2},
        "image": {"grid_height": 3, "grid_width": 3, "channels": C},
        "initializer_range": 0.1,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "begin_image_token_id": BEGIN,
        "end_image_token_id": END,
        "image_token_id": IMAGE,
        **changes,
    }
    return MMARConfig(**settings)


@torch.no_grad()
def tiny_model(**changes: Any) -> MMARForCausalLM:
    """With weights that no initial zero or one hides."""
    torch.manual_seed(0)
    model = MMARForCausalLM(tiny_config(**changes)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config.suppress_tokens = [PAD, BEGIN, END, IMAGE]
    return model


def latents(count: int, *, seed: int = 0) -> Tensor:
    """Of random images, [M, N, C]."""
    return torch.randn(count, N, C, generator=torch.Generator().manual_seed(seed))


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """input_ids and attention_mask, padded on the left."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
