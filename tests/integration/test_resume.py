"""A run that is interrupted and continued is the uninterrupted one, to the last printed digit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmar_megatron.training.metrics import CLOCKED
from tests.distributed.common import MODEL, make_data, mix
from tests.distributed.launch import run_group
from tests.distributed.test_layouts import PP2, SP, TP2

SCHEDULE = [
    *("--train.steps", "6", "--train.log_every", "1", "--validation.every", "3", "--validation.samples", "8"),
    *("--checkpoint.every", "3", "--preview.every", "6", "--preview.images", "2", "--preview.rounds", "2"),
    *("--preview.sampling_steps", "3"),
]
CASES: dict[str, tuple[int, list[str]]] = {
    "one process, dropout": (1, ["--model.backbone.hidden_dropout", "0.1", "--model.backbone.attention_dropout", "0.1"]),
    "TP2 PP2 SP": (
        4,
        [
            *("--parallel.tensor_model_parallel_size", "2", "--parallel.pipeline_model_parallel_size", "2"),
            *("--parallel.sequence_parallel", "true"),
        ],
    ),
    "DP2 bf16 overlap": (
        2,
        [
            *("--precision.dtype", "bf16", "--data.num_workers", "1"),
            *("--parallel.overlap_grad_reduce", "true", "--parallel.overlap_param_gather", "true"),
        ],
    ),
    "DP2 mix": (2, ["--data.num_workers", "2"]),
}


def test_second_stage_starts_from_the_firsts_weights(tmp_path: Path) -> None:
    data = make_data(tmp_path / "shapes")
    arguments = [*MODEL, *SCHEDULE, "--data.path", str(data), "--preview.every", "0"]
    run_group("pretrain_mmar.py", *arguments, "--run_dir", str(tmp_path / "first"), nproc=1, timeout=240)
    # A learning rate of 0 keeps the weights, so their held-out losses are the first stage's last ones.
    still = ["--optimizer.lr", "0", "--checkpoint.init_from", str(tmp_path / "first"), "--train.steps", "3"]
    output = run_group("pretrain_mmar.py", *arguments, *still, "--run_dir", str(tmp_path / "second"), nproc=1, timeout=240)
    assert f"starts from the weights of {tmp_path}/first/checkpoints/step_00000006: " in output
    first, second = rows(tmp_path / "first")[-1], rows(tmp_path / "second")[-1]
    held_out = [name for name in first if name.startswith("val_")]
    assert len(held_out) == 5
    assert [second[name] for name in held_out] == [first[name] for name in held_out]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """What was logged, without what a clock decides."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKED} for line in lines]


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    nproc, options = CASES[name]
    data = make_data(tmp_path / "shapes")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = [*MODEL, *SCHEDULE, *options, "--data.path", str(data)]
    arguments += ["--config", str(mix(data))] if name.endswith("mix") else []
    run_group("pretrain_mmar.py", *arguments, "--run_dir", str(whole), nproc=nproc, timeout=240)

    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000006")
    shutil.rmtree(resumed / "previews")
    output = run_group("pretrain_mmar.py", *arguments, "--run_dir", str(resumed), nproc=nproc, timeout=240)

    assert f"continues {resumed}/checkpoints/step_00000003 at step 3" in output
    assert [row["step"] for row in rows(resumed)] == [1, 2, 3, 4, 5, 6]
    assert rows(resumed) == rows(whole)
    preview = "previews/step_00000006.png"
    assert (resumed / preview).read_bytes() == (whole / preview).read_bytes()


@pytest.mark.distributed
def test_another_number_of_processes_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    """A chain of layouts, with saves in the background and a checkpoint that is damaged on the way, against one process."""
    data = make_data(tmp_path / "shapes")
    common = [*MODEL, "--config", str(mix(data)), "--train.log_every", "1", "--validation.every", "0", "--preview.every", "0"]
    common += ["--checkpoint.every", "1", "--optimizer.schedule", "constant", "--optimizer.ema_decay", "0.9"]
    whole, chain = tmp_path / "whole", tmp_path / "chain"
    run_group("pretrain_mmar.py", *common, "--run_dir", str(whole), "--train.steps", "7", nproc=1, timeout=240)

    links: list[tuple[int, list[str]]] = [
        (2, ["--train.micro_batch_size", "1", "--parallel.overlap_grad_reduce", "true", "--parallel.grad_bucket_size", "5000"]),
        (4, [*TP2, *SP]),
        (2, PP2),
        (1, []),
    ]
    outputs = []
    for number, (nproc, layout) in enumerate(links):
        steps = ["--train.steps", str(min(7, 2 * number + 2)), "--checkpoint.async_save", "true", "--checkpoint.keep_last", "2"]
        outputs.append(run_group("pretrain_mmar.py", *common, *layout, *steps, "--run_dir", str(chain), nproc=nproc, timeout=240))
        if number == 1:
            newest = chain / "checkpoints" / "step_00000004"
            (newest / "__1_0.distcp").write_bytes(b"")

    assert f"the checkpoint {newest} is damaged: __1_0.distcp has 0 bytes, not " in outputs[2]
    assert f"continues {chain}/checkpoints/step_00000003 at step 3" in outputs[2]
    assert "parallel.pipeline_model_parallel_size: 2 -> 1" in outputs[3]
    names = sorted(path.name for path in (chain / "checkpoints").iterdir())
    assert names == ["step_00000004.damaged", "step_00000006", "step_00000007"]

    expected, got = rows(whole), rows(chain)
    assert [row["step"] for row in got] == list(range(1, 8))
    counted = ("consumed_samples", "consumed_tokens", "filled_share")
    assert [[row[name] for name in counted] for row in got] == [[row[name] for name in counted] for row in expected]
    assert expected[-1]["consumed_samples"] > 7 * 8 * 1.5  # packed
    for figure in ("loss_text", "loss_image", "grad_norm"):
        assert [row[figure] for row in got] == pytest.approx([row[figure] for row in expected], rel=1e-5)
