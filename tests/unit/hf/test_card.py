"""The model card tells where the weights come from, and the losses that a run logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmar_megatron.config import parse_command_line
from mmar_megatron.hf.card import model_card
from mmar_megatron.training import manifest
from mmar_megatron.training.checkpoint import CONFIG, IMPORTED_FROM
from tests.unit.command_line import share_parser
from tests.unit.hf.checkpoints import STEP, make_checkpoint


def test_image_loss_over_that_of_predicting_zero(
    coarse_shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_parser(monkeypatch)
    checkpoint = make_checkpoint(tmp_path, data=coarse_shapes_dir)
    logged = {"step": STEP, "val_loss_image": 0.25, "val_loss_image_zero": 0.75}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(logged)}\n")
    card = model_card(checkpoint, parse_command_line(["--config", str(checkpoint / CONFIG)]).config, average=False)
    assert "| image, over that of predicting zero | 0.3333 |" in card


def test_where_weights_come_from(coarse_shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share_parser(monkeypatch)
    begun = ["--checkpoint.init_from", "models/start"]
    checkpoint = make_checkpoint(tmp_path, *begun, data=coarse_shapes_dir)
    config = parse_command_line(["--config", str(checkpoint / CONFIG)]).config
    card = model_card(checkpoint, config, average=False)
    assert "trained with MMAR-Megatron" in card
    assert "| started from | start |" in card
    facts = manifest.read(checkpoint)
    monkeypatch.setattr(manifest, "read", lambda _: {**facts, IMPORTED_FROM: "Qwen2.5-0.5B"})
    card = model_card(checkpoint, config, average=False)
    assert "imported by MMAR-Megatron" in card
    assert "| backbone from | Qwen2.5-0.5B |" in card
