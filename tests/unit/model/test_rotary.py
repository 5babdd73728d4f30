"""Rotary frequencies against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mmar_megatron.model.rotary import inverse_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("base", "theirs", "ours"),
    [
        (10000.0, {"rope_type": "default"}, {}),
        (1e6, {"rope_type": "default"}, {}),
        (10000.0, {"rope_type": "linear", "factor": 4.0}, {"scaling": "linear", "factor": 4.0}),
        (
            500000.0,
            {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192},
            {"scaling": "llama3", **LLAMA3, "original_max_position": 8192},
        ),
        (
            500000.0,
            {"rope_type": "llama3", **LLAMA3, "factor": 32.0, "original_max_position_embeddings": 512},
            {"scaling": "llama3", **LLAMA3, "factor": 32.0, "original_max_position": 512},
        ),
    ],
)
def test_frequencies_are_those_of_transformers(base: float, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=65536, rope_parameters={"rope_theta": base, **theirs}
    )
    expected = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(inverse_frequencies(128, base=base, **ours), expected, rtol=1e-6, atol=0)
