"""A run of any layout is evaluated in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit.command_line import INTERLEAVED, PP2, TP2, parse
from tools.evaluate import _one_process, _picture


@pytest.mark.parametrize(
    "options",
    [
        [*TP2, *INTERLEAVED, "--parallel.sequence_parallel=true", "--parallel.pipeline_split=[2,1,1,0]"],
        [*PP2, "--parallel.pipeline_split=auto"],
        [*PP2, "--model.backbone.num_layers_in_first_pipeline_stage=1"],
        [*PP2, "--model.backbone.pipeline_model_parallel_layout=Ettt|tL"],
    ],
)
def test_layout_is_undone(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(parse(*options).yaml)
    config = _one_process(tmp_path / "config.yaml")
    layout, backbone = config.parallel, config.model.backbone
    assert (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.pipeline_split) == (1, 1, "even")
    assert (backbone.pipeline_model_parallel_layout, backbone.num_layers_in_first_pipeline_stage) == (None, None)
    assert (backbone.pipeline_model_parallel_size, backbone.virtual_pipeline_model_parallel_size) == (1, None)


def test_a_picture_of_which_latents_alone_are_stored() -> None:
    moments_I2NC = np.arange(12, dtype=np.float16).reshape(1, 2, 2, 3)
    sample: Any = SimpleNamespace(num_pictures=0, moments_I2NC=moments_I2NC)
    source: Any = SimpleNamespace(codec=SimpleNamespace(decode=lambda tokens_NC: tokens_NC))
    np.testing.assert_array_equal(_picture(sample, source), moments_I2NC[0, 0])
