"""Cells that are painted once, from the same captions and noise; with random weights, and features that cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmar_megatron.benchmarks import quality
from mmar_megatron.benchmarks.quality import ATTRIBUTES, QualityPlan, choose_pictures, paint_all
from mmar_megatron.benchmarks.quality_report import measure_quality, short_names
from mmar_megatron.config import DiffusionConfig, PreviewConfig, parse_command_line
from mmar_megatron.data.held_out import HeldOut
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.data.shards import Sample
from mmar_megatron.data.source import DataSource
from mmar_megatron.diffusion.painting import ImageSampling
from mmar_megatron.evaluation.features import DEPTHS
from mmar_megatron.evaluation.shapes import score_image
from mmar_megatron.hf.configuration_mmar import MMARConfig
from mmar_megatron.hf.modeling_mmar import MMARForCausalLM
from tests.distributed.common import CODEC, MODEL
from tests.unit.hf.checkpoints import make_checkpoint


class PixelFeatures:
    """Some pixels, in place of a network's features."""

    fingerprint = "pixels"

    def __call__(self, pixels_BHW3: np.ndarray) -> dict[str, np.ndarray]:
        flat = pixels_BHW3.reshape(len(pixels_BHW3), -1).astype(np.float32)
        return {name: flat[:, :count] for name, count in DEPTHS.items()}


@pytest.fixture(autouse=True)
def _features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "PictureFeatures", PixelFeatures)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quality") / "shapes"
    make_shapes(directory, codec=CODEC, train=64, validation=70, log=lambda _: None)
    return directory


@pytest.fixture(scope="module")
def options(data: Path) -> list[str]:
    return [*MODEL, "--data.path", str(data)]


@pytest.fixture(scope="module")
def plan(data: Path) -> QualityPlan:
    make_checkpoint(data.with_name("run"), "--data.sequence_length", "96", data=data)
    return QualityPlan(
        models=(str(data.with_name("run")),),
        steps=(3, 2),
        samplers=("ddim", "ancestral"),
        images=32,
        rounds=2,
        path_steps=3,
        path_images=5,
    )


def test_a_table_that_goes_on(plan: QualityPlan, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painted: list[tuple[str, int]] = []
    paint_cell: Callable[..., Any] = quality._paint_cell

    def counted(opened: Any, pictures: Any, cell: quality.Cell, *args: Any, **rest: Any) -> Any:
        painted.append((cell.sampler, cell.steps))
        return paint_cell(opened, pictures, cell, *args, **rest)

    monkeypatch.setattr(quality, "_paint_cell", counted)
    first = measure_quality(options, plan=plan, out=tmp_path)
    assert painted == [("ddim", 3), ("ddim", 2), ("ddim", 3), ("ancestral", 2), ("ancestral", 3)]
    ddim, ancestral = first["rows"]
    assert (ddim["sampler"], ancestral["sampler"], ddim["predicts"]) == ("ddim", "ancestral", "v")
    # Of the steps 2 and 3, the latter are the path itself, painted in another batch.
    assert ddim["to_path"][0] > 0.01
    assert ddim["to_path"][1] == pytest.approx(0, abs=1e-4)
    assert ancestral["to_path"] == []
    assert [set(shares) for shares in ddim["right"]] == [set(ATTRIBUTES)] * 2
    assert first["floor"]["detail"][0] < min(distance for distance, _ in ddim["detail_distance"])

    (lost,) = (tmp_path / "cells").glob("*-ancestral-2-of-32.npz")
    lost.unlink()
    painted.clear()
    assert measure_quality(options, plan=plan, out=tmp_path)["rows"][1]["detail_distance"] == ancestral["detail_distance"]
    assert painted == [("ancestral", 2)]

    lines = (tmp_path / "quality.md").read_text().splitlines()
    assert "| model | predicts | sampler | 2 steps | 3 steps | knee |" in lines
    value, error = ddim["detail_distance"][1]
    assert any(line.startswith("| run | v | ddim |") and f"| {value:.4g} +- {error:.2g} |" in line for line in lines)
    with pytest.raises(ValueError, match=r"ddim-3-of-5\.npz was made otherwise \(guidance_scale was 2\.0 and is 3\.0\): choose"):
        measure_quality(options, plan=replace(plan, guidance_scale=3.0), out=tmp_path)


def test_a_picture_has_its_noise_in_any_batch(plan: QualityPlan, options: list[str], tmp_path: Path) -> None:
    small = replace(plan, samplers=("ancestral",), steps=(2,), path_steps=0, path_images=32)
    (_, [whole]), (_, [parts]) = (
        paint_all(options, plan=replace(small, batch_size=size), out=tmp_path / str(size)) for size in (32, 10)
    )
    one, other = whole.cells["ancestral", 2], parts.cells["ancestral", 2]
    assert one["latents"].shape == (32, 16, 192)
    np.testing.assert_allclose(one["latents"], other["latents"], rtol=1e-3, atol=1e-4)
    assert one["detail"].shape == (32, 40)
    assert whole.path is None


def test_models_are_told_from_each_other() -> None:
    assert short_names(["runs/a"]) == ["a"]
    assert short_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert short_names(["/r/v/step_1", "/r/eps/step_1", "/r/x"]) == ["v/step_1", "eps/step_1", "r/x"]


def test_which_pictures(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[int] = []
    read = HeldOut.read

    def recorded(self: HeldOut, place: int) -> Sample:
        places.append(place)
        return read(self, place)

    monkeypatch.setattr(HeldOut, "read", recorded)
    source = DataSource(parse_command_line(options).config.data)
    chosen = choose_pictures(source, images=32, seed=0)
    assert len(set(places)) == len(places) == 64
    assert places != sorted(places)
    assert (len(chosen.captions), len(chosen.true_NHW3), len(chosen.reference_NHW3)) == (32, 32, 32)
    for pictures, place in ((chosen.true_NHW3, places[0]), (chosen.reference_NHW3, places[32])):
        np.testing.assert_array_equal(pictures[0], read(HeldOut(source), place).image_HW3)
    assert 5 < len(chosen.specs) < 27  # half of the scenes have one thing
    for n, spec in chosen.specs.items():
        assert all(score_image(chosen.true_NHW3[n], spec).values())
        assert spec["things"][0]["colour"] in chosen.captions[n]
    with pytest.raises(ValueError, match="has 70 held-out samples, but captions of 36 pictures and as many others"):
        choose_pictures(source, images=36, seed=0)


def test_what_is_refused(plan: QualityPlan, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--images is 31: give 32 or more"):
        replace(plan, images=31)
    with pytest.raises(ValueError, match="--path_images 1 to --images 32: change them"):
        replace(plan, path_images=33)
    with pytest.raises(ValueError, match="--model m is given twice"):
        replace(plan, models=("m", "m"))
    with pytest.raises(ValueError, match="1001 sampling steps asked of a schedule of 1000"):
        measure_quality(options, plan=replace(plan, path_steps=1001), out=tmp_path)

    def diverge(*_: Any, **__: Any) -> Any:
        raise FloatingPointError("not finite")

    monkeypatch.setattr(MMARForCausalLM, "generate_images", diverge)
    with pytest.raises(ValueError, match="run with ddim in 3 steps: not finite"):
        measure_quality(options, plan=plan, out=tmp_path / "other")


def test_all_paint_as_the_table_says_where_nothing_is_said() -> None:
    """docs/performance.md, Painting: the knee of the model that predicts v."""
    model, sampling = DiffusionConfig(), ImageSampling()
    export = MMARConfig().diffusion
    assert {(model.sampler, model.sampling_steps), (sampling.sampler, sampling.steps)} == {("dpm_solver++", 25)}
    assert (export["sampler"], export["sampling_steps"], PreviewConfig().sampling_steps) == ("dpm_solver++", 25, 25)
