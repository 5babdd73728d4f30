"""The planner as a command, on a small data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.plan import main

SMALL = [
    *("--model.backbone.num_layers", "4", "--model.backbone.hidden_size", "32", "--model.backbone.num_attention_heads", "4"),
    *(
        "--model.embedding_vit.num_layers",
        "1",
        "--model.head.depth",
        "1",
        "--model.head.width",
        "32",
        "--precision.dtype",
        "bf16",
    ),
    *("--train.global_batch_size", "32", "--train.micro_batch_size", "2"),
    *("--data.codec.patch_size", "8", "--data.sequence_length", "48"),
]


@pytest.fixture
def small(coarse_shapes_dir: Path) -> list[str]:
    return [*SMALL, "--data.path", str(coarse_shapes_dir)]


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main([*argv])
    return capsys.readouterr().out


def test_a_layout(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = ("--parallel.pipeline_model_parallel_size", "2", "--parallel.tensor_model_parallel_size", "2")
    text = said(capsys, "--gpus", "16", *small, *pipeline)
    assert "TP 2 x PP 2 x DP 4 = 16 processes, bf16" in text  # what --dry_run prints comes first
    assert "of the h100's 79.00 GiB: fits" in text
    for words in (
        "memory of a GPU",
        "recomputing no layer",
        "tensor parallel: all-reduce",
        "data parallel: gradients",
        "a step, forecast:",
        "they wait",
    ):
        assert words in text
    found: dict[str, Any] = json.loads(said(capsys, "--gpus", "16", "--gpu", "h200", "--json", *small, *pipeline))
    assert (found["gpu"], found["fits"], len(found["stages"])) == ("h200", True, 2)
    assert [stage["in_flight"] for stage in found["stages"]] == [2, 1]


def test_a_search(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--gpus", "4", "--search", *small)
    assert "layouts fit; the fastest" in text
    assert "  --parallel.tensor_model_parallel_size" in text
    ranked = json.loads(said(capsys, "--gpus", "4", "--search", "--json", *small))
    assert len(ranked) > 20
    assert all(one["fits"] and one["world_size"] == 4 for one in ranked)


def test_what_does_not_fit(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    wide = (
        "--model.backbone.hidden_size",
        "16384",
        "--model.backbone.ffn_hidden_size",
        "65536",
        "--model.backbone.num_layers",
        "96",
    )
    assert "DOES NOT FIT" in said(capsys, "--gpus", "2", *small, *wide)
    text = said(capsys, "--gpus", "2", "--search", *small, *wide)
    assert "layouts fits: " in text
    assert "take more GPUs, or ones with more memory" in text


@pytest.mark.parametrize("gpus", ["0", "-8", "many"])
def test_numbers_of_gpus(gpus: str, small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--gpus", gpus, *small])
    assert f"{gpus} is no number of GPUs: give 1 or more" in capsys.readouterr().err


def test_mistakes(small: list[str], tmp_path: Path) -> None:
    for argv, message in (
        (["--gpus", "3", *small], "not divisible"),
        (
            [
                "--gpus",
                "2",
                *small,
                *("--model.backbone.num_layers_in_first_pipeline_stage", "1", "--parallel.pipeline_model_parallel_size", "2"),
            ],
            "say the same by parallel.pipeline_split",
        ),
        (["--gpus", "4", *small, "--data.path", str(tmp_path / "none")], "no data set"),
        (["--gpus", "4", *small, "--engine", "deepspeed", "--deepspeed.offload_optimizer", "true"], "offloading is not forecast"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(argv)
