import numpy as np
import pytest
from numpy.typing import NDArray

from mmar_megatron.evaluation.reconstruction import psnr, ssim


def ramps() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A picture and a damaged copy, from integers alone: [1, 32, 32, 3] each."""
    y, x = np.mgrid[0:32, 0:32]
    picture_HW3 = np.stack([8 * y, 8 * x, 4 * (x + y)], axis=-1)
    damaged_HW3 = (picture_HW3 + ((7 * x + 13 * y) % 17 - 8)[..., None]).clip(0, 255)
    return picture_HW3[None].astype(np.uint8), damaged_HW3[None].astype(np.uint8)


def test_what_scikit_image_says() -> None:
    """Version 0.26.0: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)."""
    picture_BHW3, damaged_BHW3 = ramps()
    np.testing.assert_allclose(ssim(picture_BHW3, damaged_BHW3), [0.9214342064512443], rtol=1e-12)
    np.testing.assert_allclose(psnr(picture_BHW3, damaged_BHW3), [34.38215115432999], rtol=1e-12)


def test_equal_pictures() -> None:
    picture_BHW3, _ = ramps()
    assert psnr(picture_BHW3, picture_BHW3).tolist() == [np.inf]
    np.testing.assert_allclose(ssim(picture_BHW3, picture_BHW3), [1.0], rtol=1e-12)


def test_flat_pictures_differ_in_luminance_alone() -> None:
    dark_BHW3, light_BHW3 = np.full((1, 12, 12, 3), 100, np.uint8), np.full((1, 12, 12, 3), 110, np.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 110 + c1) / (100**2 + 110**2 + c1)
    np.testing.assert_allclose(ssim(dark_BHW3, light_BHW3), [expected], rtol=1e-9)
    np.testing.assert_allclose(psnr(dark_BHW3, light_BHW3), [20 * np.log10(25.5)], rtol=1e-12)


def test_each_pair_by_itself_and_either_way() -> None:
    a_BHW3, b_BHW3 = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 20, 3), dtype=np.uint8)
    for measure in (psnr, ssim):
        together_B = measure(a_BHW3, b_BHW3)
        np.testing.assert_allclose(measure(b_BHW3, a_BHW3), together_B, rtol=1e-12)
        np.testing.assert_allclose(measure(a_BHW3[1:2], b_BHW3[1:2]), together_B[1:2], rtol=1e-12)


def test_a_window_must_fit() -> None:
    small_BHW3 = np.zeros((1, 8, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="SSIM needs pictures of 11 x 11"):
        ssim(small_BHW3, small_BHW3)
