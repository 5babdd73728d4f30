"""Frequencies of the rotary position embedding (RoFormer, arXiv 2104.09864), plain and stretched for longer contexts."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

RotaryScaling = Literal["none", "linear", "llama3"]


def inverse_frequencies(
    head_dim: int,
    *,
    base: float,
    scaling: RotaryScaling = "none",
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position: int = 8192,
    device: torch.device | None = None,
) -> Tensor:
    """Radians for each position, fp32 [head_dim / 2]; channel i turns with channel i + head_dim / 2, as in Llama.

    Args:
        scaling: `linear`: all are divided by `factor` (position interpolation, arXiv 2306.15595). `llama3`: of the wavelengths
            those above `original_max_position / low_freq_factor` are, those below `original_max_position / high_freq_factor` are
            left, and in between it fades from one to the other (Llama 3.1, arXiv 2407.21783).
    """
    plain_F = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim)
    if scaling == "none":
        return plain_F
    if scaling == "linear":
        return plain_F / factor
    turns_F = original_max_position * plain_F / (2 * math.pi)  # within the original context
    kept_F = ((turns_F - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - kept_F) * plain_F / factor + kept_F * plain_F
