"""What a `config.json` makes of our configuration, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmar_megatron.hf.configuration_mmar import MMARConfig
from mmar_megatron.hf.families import contradictions, model_section, pretrained_of, read_pretrained
from tests.unit.tiny import config_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 500,
    "rms_norm_eps": 1e-5,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = QWEN2 | {"model_type": "qwen3"}
MISTRAL = QWEN2 | {"model_type": "mistral"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
OUR_LLAMA3 = {
    "scaling": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position": 8192,
}


def backbone(config: dict[str, Any]) -> dict[str, Any]:
    return pretrained_of(config).model["backbone"]


def test_sizes() -> None:
    pretrained = pretrained_of(LLAMA)
    assert pretrained.model == {
        "backbone": {
            "num_layers": 3,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_query_groups": 8,
            "kv_channels": 8,
            "ffn_hidden_size": 96,
            "layernorm_epsilon": 1e-5,
            "add_qkv_bias": False,
            "qk_layernorm": False,
        },
        "tie_embeddings": False,
        "rotary_base": 10000.0,
        "rotary_scaling": {"scaling": "none"},
    }
    assert (pretrained.vocab_size, pretrained.sliding_window) == (500, None)


def test_families_differ() -> None:
    assert backbone(QWEN2) == backbone(LLAMA) | {"num_query_groups": 2, "add_qkv_bias": True}
    assert backbone(QWEN3) == backbone(LLAMA) | {"num_query_groups": 2, "qk_layernorm": True, "kv_channels": 128}
    assert backbone(MISTRAL) == backbone(LLAMA) | {"num_query_groups": 2}
    assert backbone(MISTRAL | {"head_dim": 16})["kv_channels"] == 16
    assert pretrained_of(QWEN2 | {"tie_word_embeddings": True}).model["tie_embeddings"] is True


@pytest.mark.parametrize(
    ("fields", "base", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, {"scaling": "none"}),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, {"scaling": "none"}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, {"scaling": "linear", "factor": 2.0}),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 5e5, OUR_LLAMA3),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, {"scaling": "none"}),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3}}, 1e6, OUR_LLAMA3),
    ],
)
def test_rotary_in_the_forms_of_both_versions(fields: dict[str, Any], base: float, scaling: dict[str, Any]) -> None:
    model = pretrained_of(LLAMA | fields).model
    assert (model["rotary_base"], model["rotary_scaling"]) == (base, scaling)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MISTRAL, 4096),
        (MISTRAL | {"sliding_window": None}, None),
        (MISTRAL | {"sliding_window": 100}, 100),
        (QWEN2 | {"sliding_window": 100}, None),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 2}, 100),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 3}, None),
        (QWEN3 | {"sliding_window": 100, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, None),
        (QWEN3 | {"sliding_window": 100, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 100),
    ],
)
def test_sliding_window(config: dict[str, Any], window: int | None) -> None:
    assert pretrained_of(config).sliding_window == window


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral"}, "model_type mixtral is none of llama, mistral, qwen2, qwen3, mmar"),
        ({}, "model_type None is none of"),
        (LLAMA | {"hidden_size": None}, "hidden_size is None, but must be a whole number"),
        (LLAMA | {"attention_bias": True}, "attention_bias is True, but the output of attention has a bias too"),
        (QWEN3 | {"attention_bias": True}, "attention_bias is True, but the output of attention has a bias too"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias is True, but the feed-forward layers have biases"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is gelu, but the feed-forward layers are gated by silu"),
        (LLAMA | {"num_experts": 8}, "num_experts is 8, but the backbone is dense"),
        (LLAMA | {"num_local_experts": 8}, "num_local_experts is 8, but the backbone is dense"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config says that the weights are quantized"),
        ({"model_type": "mmar", "quantization_config": {"bits": 4}}, "quantization_config says that the weights are quantized"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is dynamic, which is none of"),
        (QWEN2 | {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is yarn, which is none of"),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type is longrope, which is none of"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling is of the type linear, but has no factor"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "but has no low_freq_factor"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "has several rotary embeddings"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but all channels of a head turn"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        (LLAMA | {"is_causal": False}, "is_causal is False, but text is read from left to right"),
        (LLAMA | {"rms_norm_eps": None}, "rms_norm_eps is None, but must be a number"),
        (LLAMA | {"rope_theta": "10000"}, "rope_theta is 10000, but must be a number"),
        (LLAMA | {"rope_scaling": "linear"}, "rope_scaling is linear, but must be a table"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is 2, but must be a number"),
        (
            LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
            "rope_parameters and rope_scaling differ",
        ),
    ],
)
def test_other_networks_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"give another|give the") as raised:
        read_pretrained(tmp_path)
    assert str(raised.value).startswith(f"{file}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_config_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json: give the directory of a Hugging Face model"):
        read_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"is no JSON .*: copy it again"):
        read_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no configuration of a model: copy it again"):
        read_pretrained(tmp_path)


def test_contradictions_name_the_option() -> None:
    config = config_of("--model.backbone.hidden_size=64", "--model.rotary_scaling.scaling=linear")
    found = {option: (ours, theirs) for option, ours, theirs in contradictions(config.model, pretrained_of(LLAMA))}
    assert found == {
        "model.backbone.num_layers": (4, 3),
        "model.backbone.num_attention_heads": (4, 8),
        "model.backbone.num_query_groups": (2, 8),
        "model.backbone.kv_channels": (16, 8),
        "model.backbone.ffn_hidden_size": (64, 96),
        "model.backbone.layernorm_epsilon": (1e-6, 1e-5),
        "model.tie_embeddings": (True, False),
        "model.rotary_scaling.scaling": ("linear", "none"),
    }


def test_backbone_of_another_kind_is_a_contradiction() -> None:
    config = config_of("--model.backbone.add_bias_linear=true")
    assert ("model.backbone.add_bias_linear", True, False) in list(contradictions(config.model, pretrained_of(LLAMA)))


def test_our_own_export() -> None:
    config = MMARConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=384,
        rotary={"base": 500.0, "scaling": "llama3", "factor": 2.0},
        diffusion={"sampling_steps": 7},
        image={"grid_height": 4, "grid_width": 4, "channels": 192},
        image_token_id=6,
    ).to_dict()
    pretrained = pretrained_of(config)
    assert pretrained.family == "mmar"
    assert pretrained.model["rotary_base"] == 500.0
    assert pretrained.model["rotary_scaling"]["low_freq_factor"] == 1.0
    assert pretrained.image == {"grid_height": 4, "grid_width": 4, "channels": 192}
    assert pretrained.special_ids == {"image": 6}
    assert "sampling_steps" not in pretrained.model["diffusion"]  # of no weight: another run may have its own
    assert model_section(pretrained)["diffusion"]["sampling_steps"] == 7
    assert model_section(pretrained)["head"] == {"depth": 3, "width": 1024, "timestep_multiplier": 4}


@pytest.mark.parametrize("features", [0, 7])
def test_alignment_of_our_own_export(features: int) -> None:
    pretrained = pretrained_of(MMARConfig(alignment_features=features, alignment_loss_weight=0.5).to_dict())
    other = ["--model.alignment_features=7"] + ["--model.alignment_loss_weight=0.25"] * (features == 0)
    found = [
        contradiction for contradiction in contradictions(config_of(*other).model, pretrained) if "weight" in contradiction[0]
    ]
    assert found == [("model.alignment_loss_weight", 0.0, 0.5) if features else ("model.alignment_loss_weight", 0.25, 0.0)]
