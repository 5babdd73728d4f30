"""How close reconstructed pictures are to the originals: PSNR and SSIM.

Axes: B pictures, H, W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray

_WINDOW_SIGMA, _WINDOW_RADIUS = 1.5, 5
_PEAK = 255
_C1, _C2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2


def psnr(a_BHW3: NDArray[np.uint8], b_BHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each pair of pictures in dB, [B]: 10 log10(255^2 / mean squared error); equal ones: inf."""
    squares_BHW3 = (a_BHW3.astype(np.float64) - b_BHW3) ** 2
    with np.errstate(divide="ignore"):
        return 10 * np.log10(_PEAK**2 / squares_BHW3.mean(axis=(1, 2, 3)))


def ssim(a_BHW3: NDArray[np.uint8], b_BHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Structural similarity of each pair of pictures, [B]; 1 where they are equal.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
    Transactions on Image Processing 13 (2004), equation 13: Gaussian windows of 11 x 11 and sigma 1.5 that lie within the
    picture, K1 = 0.01, K2 = 0.03; the mean over windows and the three colours.

    Raises:
        ValueError: the pictures are smaller than a window.
    """
    side = 2 * _WINDOW_RADIUS + 1
    if min(a_BHW3.shape[1:3]) < side:
        raise ValueError(f"SSIM needs pictures of {side} x {side} pixels or more, these are {a_BHW3.shape[1:3]}: leave it out")
    a, b = (rearrange(torch.tensor(x, dtype=torch.float64), "b h w c -> (b c) 1 h w") for x in (a_BHW3, b_BHW3))
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a, var_b = _window_mean(a * a) - mean_a**2, _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    contrast_and_structure = (2 * covariance + _C2) / (var_a + var_b + _C2)
    return rearrange(luminance * contrast_and_structure, "(b c) 1 h w -> b (c h w)", c=3).mean(dim=1).numpy()


def _window_mean(x: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(-_WINDOW_RADIUS, _WINDOW_RADIUS + 1, dtype=x.dtype)
    weights = torch.exp(-(offsets**2) / (2 * _WINDOW_SIGMA**2))
    weights /= weights.sum()
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
