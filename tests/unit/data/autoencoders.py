"""Small auto-encoders with random weights in the layouts of the real ones, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

_COMMON: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
_F8 = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sd": {**_COMMON, **_F8, "latent_channels": 4, "scaling_factor": 0.18215},
    "flux": {
        **{**_COMMON, **_F8, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        **{"use_quant_conv": False, "use_post_quant_conv": False},
    },
    "kl16": {
        **{**_COMMON, "latent_channels": 16, "scaling_factor": 0.2325, "block_out_channels": (8, 8, 8, 8, 16)},
        "down_block_types": (*("DownEncoderBlock2D",) * 4, "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 4),
    },
}


def make_autoencoder(out: Path, layout: str = "sd", *, seed: int = 0, **changes: Any) -> AutoencoderKL:
    """Saves one and returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKL(**{**LAYOUTS[layout], **changes})
    model.save_pretrained(out)
    return model.eval()
