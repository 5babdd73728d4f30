"""Configuration of an MMAR model in Hugging Face's form. Ships with the weights."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class MMARConfig(PretrainedConfig):
    """Sizes and settings of an `MMARForCausalLM`.

    Args:
        vocab_size: rows of the word embeddings, with those that only pad them.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim: of the backbone.
        rms_norm_eps: added to the mean square in its norms.
        qkv_bias: queries, keys and values have a bias (Qwen2).
        qk_norm: each head's queries and keys are normed (Qwen3).
        rotary: arguments of `inverse_frequencies`: base, scaling, and what that needs.
        embedding_vit: num_layers, hidden_size, num_attention_heads, mlp_ratio.
        head: depth and width of the diffusion head, and timestep_multiplier, its noise levels for each token in training.
        diffusion: schedule, parameterization, num_timesteps; and for painting, sampling_steps and sampler.
        image: grid_height, grid_width and channels of an image's tokens.
        mask_ratio: distribution, mean, std and minimum of the share of an image that is masked in training.
        text_loss_weight, image_loss_weight, alignment_loss_weight: of the three losses.
        alignment_features: width of the teacher's features; 0: there is no alignment projector.
        begin_image_token_id, end_image_token_id: around an image.
        image_token_id: at each of its tokens.
    """

    model_type = "mmar"
    keys_to_ignore_at_inference: ClassVar = [
        *("cache", "past_key_values", "last_hidden_state", "text_loss", "image_loss", "alignment_loss", "image_conditions")
    ]

    def __init__(
        self,
        *,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        rms_norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rotary: dict[str, Any] | None = None,
        embedding_vit: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        diffusion: dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        mask_ratio: dict[str, Any] | None = None,
        text_loss_weight: float = 1.0,
        image_loss_weight: float = 1.0,
        alignment_loss_weight: float = 0.0,
        alignment_features: int = 0,
        initializer_range: float = 0.02,
        begin_image_token_id: int | None = None,
        end_image_token_id: int | None = None,
        image_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.rms_norm_eps = rms_norm_eps
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.rotary: dict[str, Any] = {"base": 10000.0} | (rotary or {})
        self.embedding_vit: dict[str, Any] = {"num_layers": 4, "hidden_size": 384, "num_attention_heads": 6, "mlp_ratio": 4.0} | (
            embedding_vit or {}
        )
        self.head: dict[str, Any] = {"depth": 3, "width": 1024, "timestep_multiplier": 4} | (head or {})
        self.diffusion: dict[str, Any] = {
            "schedule": "cosine",
            "parameterization": "v",
            "num_timesteps": 1000,
            "sampling_steps": 25,
            "sampler": "dpm_solver++",
        } | (diffusion or {})
        self.image: dict[str, Any] = {"grid_height": 16, "grid_width": 16, "channels": 16} | (image or {})
        self.mask_ratio: dict[str, Any] = {"distribution": "truncated_normal", "mean": 1.0, "std": 0.25, "minimum": 0.7} | (
            mask_ratio or {}
        )
        self.text_loss_weight = text_loss_weight
        self.image_loss_weight = image_loss_weight
        self.alignment_loss_weight = alignment_loss_weight
        self.alignment_features = alignment_features
        self.initializer_range = initializer_range
        self.begin_image_token_id = begin_image_token_id
        self.end_image_token_id = end_image_token_id
        self.image_token_id = image_token_id
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            use_cache=use_cache,
            **others,
        )

    @property
    def num_image_tokens(self) -> int:
        """Positions of an image."""
        return int(self.image["grid_height"] * self.image["grid_width"])
