"""Scores, targets, and the sheet of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmar_megatron.data.shapes import ONE_THING_SCENES, render
from mmar_megatron.evaluation.scores import TARGETS, Target, loss_scores, missed, shape_scores, table
from mmar_megatron.evaluation.sheet import write_sheet

VALIDATED = {
    "val_loss_text": 0.1,
    "val_loss_image": 0.05,
    "val_loss_image_zero": 0.5,
    "val_loss_image_wrong_text": 0.4,
    "val_loss_text_wrong_image": 2.0,
}


def test_losses_are_put_in_relation() -> None:
    expected = {
        "val_loss_text": 0.1,
        "val_loss_image_over_zero": 0.1,
        "wrong_caption_costs": 8.0,
        "val_loss_text_wrong_image": 2.0,
    }
    assert loss_scores(VALIDATED) == pytest.approx(expected)


def test_true_pictures_and_captions_score_one_and_each_wrong_one_counts() -> None:
    scenes = ONE_THING_SCENES[::97]
    images_BHW3 = np.stack([render(scene, image_size=32) for scene in scenes])
    captions = [scene.caption for scene in scenes]
    specs = [scene.spec for scene in scenes]
    assert set(shape_scores(images_BHW3, specs=specs, captions=captions, read=captions).values()) == {1.0}
    scores = shape_scores(np.roll(images_BHW3, 1, axis=0), specs=specs, captions=captions, read=["", *captions[1:]])
    assert scores["captions_exact"] == pytest.approx(1 - 1 / len(scenes))
    assert scores["painted_place"] < 0.5


def test_a_target_that_is_missed_or_not_measured_is_named() -> None:
    targets = {"a": Target(at_least=1), "b": Target(at_most=1), "c": Target(at_least=0.25, at_most=0.5), "d": Target(at_least=0)}
    scores = {"a": 0.5, "b": 1.0, "c": 0.1, "e": 7.0}
    assert missed(scores, targets=targets) == ["a", "c", "d"]
    lines = table(scores, targets=targets).splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b", "c", "e"]
    assert "MISSED" in lines[0] and "reached" in lines[1] and "0.25 to 0.5" in lines[2] and "target" not in lines[3]


def test_every_target_has_its_score() -> None:
    measured = (
        set(loss_scores(VALIDATED)) | {f"painted_{name}" for name in ("colour", "place", "background")} | {"captions_exact"}
    )
    assert all(set(targets) <= measured for targets in TARGETS.values())


def test_sheet_shows_what_was_painted(tmp_path: Path) -> None:
    painted_BHW3 = np.full((5, 32, 32, 3), (255, 0, 0), dtype=np.uint8)
    true_BHW3 = [np.full((32, 32, 3), (0, 0, 255), dtype=np.uint8)] * 5
    write_sheet(tmp_path / "samples.png", captions=["a caption"] * 5, painted_BHW3=painted_BHW3, true_BHW3=true_BHW3, title="t")
    with Image.open(tmp_path / "samples.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    red, blue = ((pixels == colour).all(axis=1).mean() for colour in ((255, 0, 0), (0, 0, 255)))
    assert red == pytest.approx(blue, rel=0.02) and red > 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]


def test_sheet_without_true_pictures(tmp_path: Path) -> None:
    painted_BHW3 = np.full((5, 32, 32, 3), (255, 0, 0), dtype=np.uint8)
    captions = ["a note of $5, and one of $\\frac$"] * 5  # which is no formula
    write_sheet(tmp_path / "sheet.png", captions=captions, painted_BHW3=painted_BHW3, title="$x_$")
    with Image.open(tmp_path / "sheet.png") as image:
        assert (np.asarray(image.convert("RGB")) == (255, 0, 0)).all(axis=2).mean() > 0.4


def test_texts_have_a_loss_alone() -> None:
    assert loss_scores({"val_loss_text": 0.1, "loss": 2.0}) == {"val_loss_text": 0.1}
