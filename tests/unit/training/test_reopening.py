"""A run of any layout, and of any machine, is evaluated in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmar_megatron.config_checks import validate_machine
from mmar_megatron.training.reopening import one_process
from tests.unit.command_line import FP8, INTERLEAVED, PP2, TP2, parse


@pytest.mark.parametrize(
    "options",
    [
        [*TP2, *INTERLEAVED, "--parallel.sequence_parallel=true", "--parallel.pipeline_split=[2,1,1,0]"],
        [*PP2, "--parallel.pipeline_split=auto"],
        [*PP2, "--model.backbone.num_layers_in_first_pipeline_stage=1"],
        [*PP2, "--model.backbone.pipeline_model_parallel_layout=Ettt|tL"],
        ["--model.attention=flex", "--model.backbone.kv_channels=16"],
        [*FP8, "--precision.fp8=tensorwise", "--model.backbone.first_last_layers_bf16=true"],
    ],
)
def test_layout_is_undone(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(parse(*options).yaml)
    config = one_process(tmp_path / "config.yaml")
    layout, backbone = config.parallel, config.model.backbone
    assert (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.pipeline_split) == (1, 1, "even")
    assert (backbone.pipeline_model_parallel_layout, backbone.num_layers_in_first_pipeline_stage) == (None, None)
    assert (backbone.pipeline_model_parallel_size, backbone.virtual_pipeline_model_parallel_size) == (1, None)
    validate_machine(config, compute_capability=None)
