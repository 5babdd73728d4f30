"""The models of examples/configs on 8 to 1,024 GPUs: parameters, layout, memory, and the pretrained models they begin with."""

from __future__ import annotations

from typing import Any

import pytest

from mmar_megatron.config import Config, parse_command_line
from mmar_megatron.hf.families import contradictions, pretrained_of
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.scaling.expected import RowMeans
from mmar_megatron.scaling.plan import plan
from tests.unit.command_line import share_parser
from tests.unit.examples.clusters import ROOT

QWEN2: dict[str, Any] = {
    **{"model_type": "qwen2", "hidden_act": "silu", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "use_sliding_window": False},
}
SMALL = {
    **{"num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2},
    **{"intermediate_size": 4864, "tie_word_embeddings": True, "vocab_size": 151936},
}
MEDIUM = {
    **{"num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4},
    **{"intermediate_size": 18944, "tie_word_embeddings": False, "vocab_size": 152064},
}
LLAMA2: dict[str, Any] = {
    **{"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 32000},
    **{"num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 40},
    **{"intermediate_size": 13824, "max_position_embeddings": 4096},
}
"""What the config.json of Qwen2-0.5B, Qwen2-7B and Llama-2-13b has."""
MODELS = {"mmar_0.5b": QWEN2 | SMALL, "mmar_7b": QWEN2 | MEDIUM, "mmar_13b": LLAMA2}


def config_of(model: str, *options: str, stage: int = 1) -> Config:
    names = (model, f"data_stage{stage}", f"stage{stage}")
    files = [word for name in names for word in ("--config", str(ROOT / "examples" / "configs" / f"{name}.yaml"))]
    return parse_command_line([*files, *options]).config


@pytest.fixture(autouse=True)
def parser(monkeypatch: pytest.MonkeyPatch) -> None:
    share_parser(monkeypatch)


@pytest.mark.parametrize("model", MODELS)
def test_the_shape_is_the_pretrained_models(model: str) -> None:
    assert list(contradictions(config_of(model).model, pretrained_of(MODELS[model]))) == []


def test_stages_differ_in_what_they_should() -> None:
    first, second = config_of("mmar_7b"), config_of("mmar_7b", stage=2)
    assert (first.data.mask_ratio.minimum, second.data.mask_ratio.minimum) == (0.7, 0.0)
    assert set(first.data.sources) == {"capfusion", "text"} and set(second.data.sources) == {"cc12m", "laion_aesthetics", "text"}
    assert second.optimizer.lr < first.optimizer.lr and min(second.validation.mask_ratios) < min(first.validation.mask_ratios)
    assert first.parallel == second.parallel and first.model.head == second.model.head and first.train.steps > second.train.steps


@pytest.mark.parametrize(
    ("model", "gpus", "layout", "language", "image"),
    [
        *(("mmar_13b", gpus, f"TP 4 x PP 1 x DP {gpus // 4}", 13_015_864_320, 0.35e9) for gpus in (8, 64, 1024)),
        *(("mmar_7b", gpus, f"TP 2 x PP 1 x DP {gpus // 2}", 7_615_616_512, 0.27e9) for gpus in (8, 1024)),
        *(("mmar_0.5b", gpus, f"TP 1 x PP 1 x DP {gpus}", 494_032_768, 0.05e9) for gpus in (8, 256)),
    ],
)
def test_plan(model: str, gpus: int, layout: str, language: int, image: float) -> None:
    """In the vocabulary of the pretrained model, on pictures of 16 x 16 tokens of 16 channels."""
    planned = plan(
        config_of(model),
        geometry=ImageGeometry(grid_height=16, grid_width=16, channels=16),
        vocab_size=MODELS[model]["vocab_size"],
        rows=RowMeans(images=12, labels=500, painted=6, filled=4000),
        world_size=gpus,
    )
    assert planned.layout == layout and planned.world_size == gpus and planned.dtype == "bf16"
    parts = dict(planned.parameters)
    assert parts.pop("backbone") + parts.pop("words") == language, "as the pretrained model has"
    assert sum(parts.values()) == pytest.approx(image, rel=0.3)
    # Of 80 GB a third is left for activations and communication.
    assert all(stage.memory.total < 53e9 for stage in planned.stages), planned.table()
