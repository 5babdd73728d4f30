"""Any layout gives the same training as one process, losses and gradient norm, step after step; and paints and reads alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.common import make_data
from tests.distributed.launch import run_group

WORKER = Path(__file__).with_name("layout_worker.py")
STEPS = 6

TP2 = ["--parallel.tensor_model_parallel_size", "2"]
PP2 = ["--parallel.pipeline_model_parallel_size", "2"]
SP = ["--parallel.sequence_parallel", "true"]
INTERLEAVED = [*PP2, "--parallel.virtual_pipeline_model_parallel_size", "2"]
OVERLAP = ["--parallel.overlap_grad_reduce", "true", "--parallel.overlap_param_gather", "true"]
RECOMPUTE = [
    *("--model.backbone.recompute_granularity", "full", "--model.backbone.recompute_method", "uniform"),
    *("--model.backbone.recompute_num_layers", "1"),
]
SELECTIVE = ["--model.backbone.recompute_granularity", "selective"]
FEATURES = [
    *("--model.tie_embeddings", "false", "--model.backbone.add_qkv_bias", "true", "--model.backbone.qk_layernorm", "true"),
]

ON_ONE = {
    "one": [],
    "larger microbatch": ["--train.micro_batch_size", "8"],
    "recompute": RECOMPUTE,
    "features": FEATURES,
    "bf16": ["--precision.dtype", "bf16"],
}
ON_TWO = {
    "TP2": TP2,
    "TP2 SP": [*TP2, *SP],
    "PP2": PP2,
    "PP2 interleaved": INTERLEAVED,
    "DP2": [],
    "DP2 overlap": OVERLAP,
    "TP2 SP recompute": [*TP2, *SP, *RECOMPUTE],
    "TP2 selective": [*TP2, *SELECTIVE],
    "TP2 SP features": [*TP2, *SP, *FEATURES],
    "PP2 features": [*PP2, *FEATURES],
    "TP2 SP bf16": [*TP2, *SP, "--precision.dtype", "bf16"],
}
ON_FOUR = {
    "TP2 PP2": [*TP2, *PP2],
    "TP2 PP2 SP": [*TP2, *PP2, *SP],
    "TP2 DP2 SP overlap": [*TP2, *SP, *OVERLAP],
    "PP2 DP2": PP2,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every layout's figures, from three launches: of some training steps, then of one evaluation."""
    data = make_data(tmp_path_factory.mktemp("data") / "shapes")
    found: dict[str, dict[str, Any]] = {}
    for nproc, layouts in ((1, ON_ONE), (2, ON_TWO), (4, ON_FOUR)):
        output = run_group(WORKER, str(data), str(STEPS), json.dumps(layouts), nproc=nproc, timeout=240)
        for line in output.splitlines():
            if line.startswith("{"):
                found |= json.loads(line)
    return found


def reference_of(name: str) -> tuple[str, float]:
    """Which run on one process a layout is held against, and how closely."""
    if name.endswith("bf16"):
        return "bf16", 2e-2
    return ("features" if name.endswith("features") else "one"), 1e-5


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["larger microbatch", "recompute", *ON_TWO, *ON_FOUR])
def test_layout_equals_one_process(name: str, runs: dict[str, dict[str, Any]]) -> None:
    reference, tolerance = reference_of(name)
    for step, (expected, got) in enumerate(zip(runs[reference]["figures"], runs[name]["figures"], strict=True)):
        for figure in got:
            assert got[figure] == pytest.approx(expected[figure], rel=tolerance), f"{figure} of row {step}"


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in (*ON_TWO, *ON_FOUR) if not name.endswith("bf16")])
def test_layout_paints_and_reads_like_one_process(name: str, runs: dict[str, dict[str, Any]]) -> None:
    expected, got = runs[reference_of(name)[0]], runs[name]
    assert np.abs(np.subtract(expected["painted"], got["painted"])).max() <= 1  # rounding to a byte
    assert got["read"] == expected["read"]


def test_comparisons_are_not_empty(runs: dict[str, dict[str, Any]]) -> None:
    """They would be if nothing were learned, or painted."""
    figures = runs["one"]["figures"]
    text = [row["text"] for row in figures[:STEPS]]
    assert text[-1] < 0.9 * text[0]
    assert figures[0]["grad_norm"] > 1.0, "clipping must be at work"
    assert np.std(runs["one"]["painted"]) > 10
