"""Tiny pretrained models as transformers saves them, with a tokenizer of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from mmar_megatron.data import shapes

VOCAB_SIZE = 320
"""Rows of the embeddings: more than `tokenizer_json` has tokens."""
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
TOKENS = 304
"""Ids that `tokenizer_json` has."""
IMAGES = [
    *("--model.embedding_vit.num_layers", "1", "--model.embedding_vit.hidden_size", "16"),
    *("--model.embedding_vit.num_attention_heads", "2"),
    *("--model.head.depth", "2", "--model.head.width", "24", "--model.head.timestep_multiplier", "2"),
    *("--data.sequence_length", "64", "--data.codec.image_size", "32", "--data.codec.patch_size", "8"),
]
"""Options of a run with tiny image parts."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 64}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
}
"""Name -> transformers' class, and what its configuration has beside `SIZES`."""


def tokenizer_json(directory: Path) -> Path:
    """A byte-level BPE like Qwen's, with four of our six special tokens; returns the file."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([scene.caption for scene in shapes.draw_scenes(100, split="train", seed=0)], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    file = directory / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def save_pretrained(
    name: str, directory: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changes: Any
) -> Any:
    """One of `FAMILIES` with random weights, saved with its tokenizer; returns the model."""
    kind, own = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **changes})
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at 1 and biases at 0, which would hide what they do
            parameter.add_(torch.randn(parameter.shape).to(dtype) * 0.1)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer_json(directory)
    return model
