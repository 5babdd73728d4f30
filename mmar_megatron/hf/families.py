"""What `config.json` of a Hugging Face model makes of our configuration: Llama, Mistral, Qwen2 and Qwen3, and our own exports.

What would make another network of the same weights is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from mmar_megatron.config import ModelConfig, RotaryScalingConfig
from mmar_megatron.data.tokenizer import SPECIAL_TOKENS

MMAR = "mmar"
_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
_DEFAULT_ROTARY_BASE = 10000.0
_SCALED_BY = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    },
}
"""How rotary embeddings may be scaled: our names of the arguments -> Hugging Face's."""
_FIXED = {"gated_linear_unit": True, "add_bias_linear": False, "activation_func": F.silu}
"""Fields of the backbone that no `config.json` decides: of all these models they are so."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What a Hugging Face model is."""

    family: str
    """Its `model_type`."""
    model: dict[str, Any]
    """Our section `model`: what must be so for its weights to mean what they do."""
    also: dict[str, Any] = field(default_factory=dict)
    """More of that section, which another run may have otherwise: settings of training and painting."""
    vocab_size: int
    """Rows of its embeddings."""
    sliding_window: int | None = None
    """Positions that its attention reaches back in some layers; None: all."""
    image: dict[str, int] = field(default_factory=dict)
    """Of our own exports: grid_height, grid_width and channels of an image's tokens."""
    special_ids: dict[str, int] = field(default_factory=dict)
    """Of our own exports: ids of the special tokens, by role."""


def read_pretrained(hf: Path) -> Pretrained:
    """Reads `config.json` in a directory of Hugging Face.

    Raises:
        ValueError: there is none; or the model is none that we can build: the message names the field.
    """
    file = hf / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{hf} has no config.json: give the directory of a Hugging Face model") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): copy it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no configuration of a model: copy it again")
    try:
        return pretrained_of(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def pretrained_of(config: Mapping[str, Any]) -> Pretrained:
    """What the content of a `config.json` says. Raises as `read_pretrained` does."""
    family = config.get("model_type")
    if family == MMAR:
        return model_settings_of(config)
    if family not in _LANGUAGE_MODELS:
        raise ValueError(f"model_type {family} is none of {', '.join((*_LANGUAGE_MODELS, MMAR))}: give another model")
    _refuse_other_networks(config)
    return Pretrained(
        family=family,
        model={
            "backbone": _backbone(config, family=family),
            "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
            **_rotary(config),
        },
        vocab_size=_required(config, "vocab_size"),
        sliding_window=_sliding_window(config, family=family),
    )


def model_settings_of(config: Mapping[str, Any]) -> Pretrained:
    """What the content of the `config.json` of our own export says.

    Raises:
        ValueError: it is quantized.
    """
    from mmar_megatron.hf.configuration_mmar import MMARConfig  # here, since transformers takes seconds

    _refuse_quantized(config)
    own = MMARConfig(**config)
    diffusion = dict(own.diffusion)
    rotary = dict(own.rotary)
    aligned = own.alignment_features > 0
    return Pretrained(
        family=MMAR,
        model={
            "backbone": {
                "num_layers": own.num_hidden_layers,
                "hidden_size": own.hidden_size,
                "num_attention_heads": own.num_attention_heads,
                "num_query_groups": own.num_key_value_heads,
                "kv_channels": own.head_dim,
                "ffn_hidden_size": own.intermediate_size,
                "layernorm_epsilon": own.rms_norm_eps,
                "add_qkv_bias": own.qkv_bias,
                "qk_layernorm": own.qk_norm,
            },
            "embedding_vit": dict(own.embedding_vit),
            "head": {name: own.head[name] for name in ("depth", "width")},
            "diffusion": {name: diffusion[name] for name in ("schedule", "parameterization", "num_timesteps")},
            "tie_embeddings": own.tie_word_embeddings,
            "rotary_base": rotary.pop("base"),
            "rotary_scaling": _relevant(rotary),
            "alignment_features": own.alignment_features,
        },
        also={
            "head": {"timestep_multiplier": own.head["timestep_multiplier"]},
            "diffusion": {name: diffusion[name] for name in ("sampling_steps", "sampler")},
            "text_loss_weight": own.text_loss_weight,
            "image_loss_weight": own.image_loss_weight,
            **({"alignment_loss_weight": own.alignment_loss_weight} if aligned else {}),
        },
        vocab_size=own.vocab_size,
        image=dict(own.image),
        special_ids={role: token_id for role in SPECIAL_TOKENS if (token_id := getattr(own, f"{role}_token_id")) is not None},
    )


def model_section(pretrained: Pretrained) -> dict[str, Any]:
    """The whole section `model` that a configuration should have for these weights."""
    merged = dict(pretrained.model)
    for name, value in pretrained.also.items():
        merged[name] = {**merged[name], **value} if isinstance(value, dict) else value
    return merged


def contradictions(config: ModelConfig, pretrained: Pretrained) -> Iterator[tuple[str, Any, Any]]:
    """Where a configuration is of another network: (option, what it says, what the pretrained model makes it)."""
    for name, value in _FIXED.items():
        if (ours := getattr(config.backbone, name)) != value:
            yield f"model.backbone.{name}", ours, value
    yield from _differences("model", config, pretrained.model)
    if pretrained.family == MMAR and (config.alignment_loss_weight > 0) != (pretrained.model["alignment_features"] > 0):
        yield "model.alignment_loss_weight", config.alignment_loss_weight, pretrained.also.get("alignment_loss_weight", 0.0)


def _differences(prefix: str, ours: Any, theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name, value in theirs.items():
        own = getattr(ours, name)
        if isinstance(value, Mapping):
            yield from _differences(f"{prefix}.{name}", own, value)
        elif own != value:
            yield f"{prefix}.{name}", own, value


# --- language models ------------------------------------------------------------------------------------------------------------


def _backbone(config: Mapping[str, Any], *, family: str) -> dict[str, Any]:
    heads, hidden_size = _required(config, "num_attention_heads"), _required(config, "hidden_size")
    # None and absent mean the same to transformers, but for Qwen3's width of a head.
    head_dim = config.get("head_dim") or (128 if family == "qwen3" and "head_dim" not in config else hidden_size // heads)
    return {
        "num_layers": _required(config, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": head_dim,
        "ffn_hidden_size": _required(config, "intermediate_size"),
        "layernorm_epsilon": _number(config, "rms_norm_eps", 1e-6),
        "add_qkv_bias": family == "qwen2",
        "qk_layernorm": family == "qwen3",
    }


def _required(config: Mapping[str, Any], name: str) -> int:
    if not isinstance(value := config.get(name), int):
        raise ValueError(f"{name} is {value}, but must be a whole number: give the config.json that came with the weights")
    return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    if not isinstance(value := config.get(name, default), int | float):
        raise ValueError(f"{name} is {value}, but must be a number: give the config.json that came with the weights")
    return float(value)


def _refuse_other_networks(config: Mapping[str, Any]) -> None:
    _refuse_quantized(config)
    refused: dict[str, tuple[Callable[[Any], bool], str]] = {
        "attention_bias": (bool, "the output of attention has a bias too, and ours has none"),
        "mlp_bias": (bool, "the feed-forward layers have biases, and ours have none"),
        "hidden_act": (lambda act: act not in (None, "silu", "swish"), "the feed-forward layers are gated by silu"),
        "num_experts": (bool, "the backbone is dense"),
        "num_local_experts": (bool, "the backbone is dense"),
        "is_causal": (lambda causal: causal is False, "text is read from left to right"),
    }
    for name, (is_other, reason) in refused.items():
        if is_other(config.get(name)):
            raise ValueError(f"{name} is {config[name]}, but {reason}: give another model")


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        raise ValueError("quantization_config says that the weights are quantized: give the model before quantization")


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rotary_base` and `rotary_scaling`, from the forms of transformers 4 (`rope_theta`, `rope_scaling`) and 5."""
    in_fives, in_fours = config.get("rope_parameters"), config.get("rope_scaling")
    if in_fives and in_fours and in_fives != in_fours:  # versions of transformers disagree on which one it is
        raise ValueError("rope_parameters and rope_scaling differ: give the config.json that came with the weights")
    where, given = ("rope_parameters", in_fives) if in_fives else ("rope_scaling", in_fours or {})
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is {given}, but must be a table: give the config.json that came with the weights")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{where} has several rotary embeddings, and all our layers have the same one: give another model")
    if (share := given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor is {share}, but all channels of a head turn: give another model")
    base = _number(given if "rope_theta" in given else config, "rope_theta", _DEFAULT_ROTARY_BASE)
    if kind == "default":
        return {"rotary_base": base, "rotary_scaling": {"scaling": "none"}}
    if kind not in _SCALED_BY:
        raise ValueError(f"{where}.rope_type is {kind}, which is none of default, {', '.join(_SCALED_BY)}: give another model")
    for name in _SCALED_BY[kind].values():
        if given.get(name) is None:
            raise ValueError(f"{where} is of the type {kind}, but has no {name}: give the config.json that came with the weights")
    arguments: dict[str, float] = {ours: _number(given, theirs, 0.0) for ours, theirs in _SCALED_BY[kind].items()}
    if "original_max_position" in arguments:
        arguments["original_max_position"] = int(arguments["original_max_position"])
    return {"rotary_base": base, "rotary_scaling": {"scaling": kind, **arguments}}


def _relevant(rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Of our own arguments those that matter."""
    given = asdict(RotaryScalingConfig(**rotary))
    return {name: given[name] for name in ("scaling", *_SCALED_BY.get(given["scaling"], ()))}


def _sliding_window(config: Mapping[str, Any], *, family: str) -> int | None:
    if family == "mistral":
        return config.get("sliding_window", 4096)  # so transformers reads a file without it
    if family == "llama" or not config.get("use_sliding_window", False):
        return None
    kinds = config.get("layer_types")
    first = config.get("max_window_layers", 28)
    if "sliding_attention" not in kinds if kinds else first >= _required(config, "num_hidden_layers"):
        return None
    return config.get("sliding_window", 4096)
