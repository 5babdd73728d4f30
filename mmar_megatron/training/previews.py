"""Images painted for held-out captions while training goes on: the loss flattens long before the pictures stop improving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from mmar_megatron.config import PreviewConfig
from mmar_megatron.data.held_out import HeldOut
from mmar_megatron.data.source import DataSource
from mmar_megatron.diffusion.painting import ImageSampling
from mmar_megatron.engine.base import Engine
from mmar_megatron.inference.images import paint
from mmar_megatron.parallel import ParallelGroups


class Previews:
    """Paints the same held-out captions each time, with the same noise."""

    def __init__(self, config: PreviewConfig, *, source: DataSource, groups: ParallelGroups, seed: int) -> None:
        self._captions = HeldOut(source).captions(config.images)
        self._source, self._groups = source, groups
        self._sampling = ImageSampling(
            rounds=min(config.rounds, source.codec.num_tokens),
            steps=config.sampling_steps,
            guidance_scale=config.guidance_scale,
            seed=seed,
        )

    def paint(self, engine: Engine) -> NDArray[np.uint8]:
        """One row of images, uint8 [H, images * W, 3]. All ranks call it together."""
        with engine.evaluating():
            images_BHW3 = paint(engine, self._captions, source=self._source, groups=self._groups, sampling=self._sampling)
        return rearrange(images_BHW3, "b h w c -> h (b w) c")


def write_png(path: Path, image_HW3: NDArray[np.uint8]) -> None:
    """Write a picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    Image.fromarray(image_HW3).save(partial, format="PNG")
    partial.replace(path)
