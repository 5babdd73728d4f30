"""Both depths against the network run block by block, and against the teacher's features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmar_megatron.data.shapes import draw_scenes, render
from mmar_megatron.data.teacher import EFFICIENTNET, load_efficientnet_lite0, load_teacher
from mmar_megatron.evaluation.features import CONTENT, DEPTHS, DETAIL, PictureFeatures


@pytest.fixture(scope="module")
def pictures_BHW3() -> np.ndarray:
    return np.stack([render(scene, image_size=32) for scene in draw_scenes(3, split="train", seed=0)])


def test_of_both_depths(pictures_BHW3: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    features = PictureFeatures()
    found = features(pictures_BHW3)
    assert {name: part.shape for name, part in found.items()} == {name: (3, count) for name, count in DEPTHS.items()}

    loaded = load_efficientnet_lite0()
    network = loaded.network
    x = network._swish(network._bn0(network._conv_stem(loaded.preprocessing(pictures_BHW3))))
    for block in network._blocks[:5]:  # stages of 1, 2 and 2 blocks
        x = block(x)
    assert x.shape == (3, 40, 28, 28)
    torch.testing.assert_close(torch.tensor(found[DETAIL]), x.mean(dim=(2, 3)))
    teacher = load_teacher(EFFICIENTNET, grid_height=1, grid_width=1)(pictures_BHW3)["teacher"][:, 0]
    np.testing.assert_allclose(found[CONTENT], teacher, rtol=2e-3, atol=1e-3)  # which is float16

    monkeypatch.setattr("mmar_megatron.evaluation.features._AT_A_TIME", 2)
    for name, part in features(pictures_BHW3).items():
        np.testing.assert_allclose(part, found[name], rtol=1e-4, atol=1e-5)
    assert features(pictures_BHW3[:0])[DETAIL].shape == (0, 40)
