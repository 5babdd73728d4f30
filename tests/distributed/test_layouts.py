"""Any layout gives the same training as one process: the first step's gradient of every parameter, then losses and gradient norm
step after step; and it paints and reads alike. The head's work is divided evenly over tensor-parallel ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.common import make_data, mix
from tests.distributed.gradients import Gradients
from tests.distributed.launch import run_group

# The first test waits for three launches.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3 * 240)]

WORKER = Path(__file__).with_name("layout_worker.py")
STEPS = 6

TP2 = ["--parallel.tensor_model_parallel_size", "2"]
PP2 = ["--parallel.pipeline_model_parallel_size", "2"]
PP4 = ["--parallel.pipeline_model_parallel_size", "4"]
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

AUTO = ["--parallel.pipeline_split", "auto"]
GROUPS_4 = ["--model.backbone.num_query_groups", "4"]
BF16 = ["--precision.dtype", "bf16"]

MIX = ["--config", "MIX"]
"""Pictures, texts and conversations with several pictures, packed; the file takes the place of the word."""

SINGLE = [*MIX, "--data.packing", "false", "--train.micro_batch_size", "1"]
"""Their documents one by one: microbatches of a text alone, which have no mask, between others."""

ON_ONE = {
    "one": [],
    "larger microbatch": ["--train.micro_batch_size", "8"],
    "recompute": RECOMPUTE,
    "features": FEATURES,
    "4 groups": GROUPS_4,
    "bf16": BF16,
    "mix": MIX,
    "unpacked mix": MIX,
    "dense single": SINGLE,
    "single": SINGLE,
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
    "PP2 split 3 1": [*PP2, "--parallel.pipeline_split", "[3, 1]"],
    "PP2 split 0 4": [*PP2, "--parallel.pipeline_split", "[0, 4]"],
    "PP2 interleaved split 0 2 2 0 recompute": [*INTERLEAVED, *RECOMPUTE, "--parallel.pipeline_split", "[0, 2, 2, 0]"],
    "PP2 auto": [*PP2, *AUTO],
    "TP2 SP bf16": [*TP2, *SP, *BF16],
    "PP2 interleaved bf16": [*INTERLEAVED, *BF16],
    "DP2 overlap bf16": [*OVERLAP, *BF16],
    "TP2 SP mix": [*TP2, *SP, *MIX],
    "PP2 interleaved mix": [*INTERLEAVED, *MIX],
    "DP2 overlap mix": [*OVERLAP, *MIX],
    "TP2 SP single": [*TP2, *SP, *SINGLE],
    "PP2 interleaved single": [*INTERLEAVED, *SINGLE],
}
ON_FOUR = {
    "TP2 PP2": [*TP2, *PP2],
    "TP2 DP2 SP overlap": [*TP2, *SP, *OVERLAP],
    "TP2 PP2 interleaved SP recompute": [*TP2, *INTERLEAVED, *SP, *RECOMPUTE],
    "PP2 DP2": PP2,
    "PP2 interleaved DP2 overlap": [*INTERLEAVED, *OVERLAP],
    "PP4": PP4,
    "DP4, microbatches of 1": ["--train.micro_batch_size", "1"],
    "PP2 interleaved auto DP2 overlap": [*INTERLEAVED, *AUTO, *OVERLAP],
    "PP4 split 0 2 1 1": [*PP4, "--parallel.pipeline_split", "[0, 2, 1, 1]"],
    "TP4 SP, 4 groups": ["--parallel.tensor_model_parallel_size", "4", *SP, *GROUPS_4],
    "TP2 PP2 SP features": [*TP2, *PP2, *SP, *FEATURES],
    "TP2 PP2 interleaved SP bf16": [*TP2, *INTERLEAVED, *SP, *BF16],
    "TP2 DP2 mix": [*TP2, *MIX],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the data, and a file of gradients for each layout."""
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Every layout's figures, from three launches: of some training steps, then of one evaluation."""
    data = make_data(folder / "shapes")
    mixed = str(mix(data))
    found: dict[str, dict[str, Any]] = {}
    for nproc, of_nproc in ((1, ON_ONE), (2, ON_TWO), (4, ON_FOUR)):
        layouts = {name: [mixed if option == "MIX" else option for option in options] for name, options in of_nproc.items()}
        output = run_group(WORKER, str(data), str(folder), str(STEPS), json.dumps(layouts), nproc=nproc, timeout=240)
        for line in output.splitlines():
            if line.startswith("{"):
                found |= json.loads(line)
    return found


def reference_of(name: str) -> str:
    """Which run on one process a layout is held against."""
    references = {"features": "features", "4 groups": "4 groups", "bf16": "bf16", "mix": "mix", "single": "dense single"}
    return next((reference for ending, reference in references.items() if name.endswith(ending)), "one")


def gradients_of(name: str, folder: Path) -> Gradients:
    return torch.load(folder / f"{name}.pt")


def differences(got: Gradients, expected: Gradients) -> dict[str, float]:
    """Of each parameter's gradient, each layer's on its own: the norm of the difference over the norm of what is expected."""
    assert got.keys() == expected.keys()
    return {name: float((got[name] - expected[name]).norm() / expected[name].norm()) for name in expected}


LAYOUTS = ["larger microbatch", "recompute", "unpacked mix", "single", *ON_TWO, *ON_FOUR]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, runs: dict[str, dict[str, Any]]) -> None:
    reference, tolerance = reference_of(name), 2e-2 if name.endswith("bf16") else 1e-5
    for step, (expected, got) in enumerate(zip(runs[reference]["figures"], runs[name]["figures"], strict=True)):
        for figure in got:
            assert got[figure] == pytest.approx(expected[figure], rel=tolerance), f"{figure} of row {step}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_of_every_parameter(name: str, runs: dict[str, dict[str, Any]], folder: Path) -> None:
    found = differences(gradients_of(name, folder), gradients_of(reference_of(name), folder))
    tolerance = 3e-2 if name.endswith("bf16") else 1e-5
    assert {parameter: error for parameter, error in found.items() if not error <= tolerance} == {}


@pytest.mark.parametrize("name", [name for name in (*ON_TWO, *ON_FOUR) if not name.endswith("bf16")])
def test_layout_paints_and_reads_like_one_process(name: str, runs: dict[str, dict[str, Any]]) -> None:
    expected, got = runs[reference_of(name)], runs[name]
    assert np.abs(np.subtract(expected["painted"], got["painted"])).max() <= 1  # rounding to a byte
    assert got["read"] == expected["read"]


@pytest.mark.parametrize("module", ["head", "PostProjector"])
@pytest.mark.parametrize(("name", "ranks"), [("TP2", 2), ("TP2 SP", 2), ("TP4 SP, 4 groups", 4)])
def test_head_is_divided_over_tensor_parallel_ranks(name: str, ranks: int, module: str, runs: dict[str, dict[str, Any]]) -> None:
    """Whatever the places of the masked tokens, no rank computes more than 1 / TP of the whole and 2 % of that."""
    for mask, flops in runs[name]["head_flops"].items():
        (whole,) = runs["one"]["head_flops"][mask][module]
        assert len(flops[module]) == ranks
        assert sum(flops[module]) == whole > 0
        assert max(flops[module]) <= 1.02 * whole / ranks, mask


@pytest.mark.parametrize("name", [*ON_TWO, *ON_FOUR])
def test_what_is_sent_is_let_go_of(name: str, runs: dict[str, dict[str, Any]]) -> None:
    """No stage keeps an output until its gradient comes, but for the interleaved schedule, which keeps each of them whole."""
    options = (ON_TWO | ON_FOUR)[name]
    stages = int(options[options.index(PP2[0]) + 1]) if PP2[0] in options else 1
    chunks, kept = 2 if INTERLEAVED[2] in options else 1, runs[name]["kept_outputs"]
    ranks = len(kept) // stages  # of a stage; those of the last one send nothing but by their earlier chunks
    for rank, of_rank in enumerate(kept):
        passes = (chunks - (rank >= ranks * (stages - 1))) * runs[name]["microbatches"]
        assert len(of_rank) == passes
        assert all((size > 0) == (chunks > 1) for size in of_rank)


def test_comparisons_are_not_empty(runs: dict[str, dict[str, Any]]) -> None:
    """They would be if nothing were learned, or painted."""
    figures = runs["one"]["figures"]
    text = [row["text"] for row in figures[:STEPS]]
    assert text[-1] < 0.9 * text[0]
    assert figures[0]["grad_norm"] > 1.0, "clipping must be at work"
    assert np.std(runs["one"]["painted"]) > 10


def test_the_mix_is_packed(runs: dict[str, dict[str, Any]]) -> None:
    for name in ("mix", "unpacked mix", "DP2 overlap mix"):
        assert runs[name]["documents"] > 1.5 * 8 * STEPS


def test_texts_alone_are_causal(runs: dict[str, dict[str, Any]]) -> None:
    """In the first step, whose gradients are compared, and of its microbatches not all."""
    for name in ("single", "TP2 SP single", "PP2 interleaved single"):
        causal = runs[name]["causal"]
        assert len(causal) == 8 * (STEPS + 1)
        assert 0 < sum(causal[:8]) < 8


@pytest.mark.parametrize("name", ["one", "features", "4 groups", "bf16", "mix"])
def test_comparisons_of_gradients_are_not_empty(name: str, runs: dict[str, dict[str, Any]], folder: Path) -> None:
    """Every parameter has a gradient, which is not zero; and a small change of one of them, or of its place, is seen."""
    gradients = gradients_of(name, folder)
    assert sum(gradient.numel() for gradient in gradients.values()) == runs[name]["parameters"]
    assert all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in gradients.values())
    changed = gradients | {"embedding.mask_embedding": gradients["embedding.mask_embedding"] * (1 + 2e-5)}
    changed["decoder.layers.mlp.linear_fc1.weight.2"] = gradients["decoder.layers.mlp.linear_fc1.weight.1"]
    seen = [parameter for parameter, error in differences(changed, gradients).items() if error > 1e-5]
    assert sorted(seen) == ["decoder.layers.mlp.linear_fc1.weight.2", "embedding.mask_embedding"]
