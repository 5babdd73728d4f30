"""Painting with the model that is trained, in any layout: text to image (MAR, arXiv 2406.11838, section 4).

Prompts are read once: their keys and values stay as they are, for no prompt sees the image behind it. Each round runs the
backbone over the image's tokens alone, or over those that changed, the conditional and the unconditional half in one batch, and
the head over the tokens that it draws.

Axes: B images, N tokens of an image, C channels of a token, K tokens drawn in a round, S positions, D width, Z width of the
condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.data.sequence import Text
from mmar_megatron.data.source import DataSource
from mmar_megatron.diffusion.painting import ImageSampling, Painter, Report, paint_tokens
from mmar_megatron.diffusion.sampler import NoiseSource
from mmar_megatron.engine.base import Engine
from mmar_megatron.inference.batches import image_batch, prompt_batch
from mmar_megatron.model.key_values import KeyValueCache, Overwriting
from mmar_megatron.model.selection import Selection
from mmar_megatron.parallel import ParallelGroups


def paint(
    engine: Engine,
    captions: Sequence[str],
    *,
    source: DataSource,
    groups: ParallelGroups,
    sampling: ImageSampling,
    first_number: int = 0,
    progress: Report | None = None,
) -> NDArray[np.uint8]:
    """Draw one image for each caption. All ranks of a model replica call it together; call within `engine.evaluating()`.

    Noise follows from (seed, number of the image, round) alone, so neither the batch nor the layout changes an image, but for
    roundings.

    Args:
        captions: too long ones lose their end, as in training.
        sampling: rounds, order, guidance, seed.
        first_number: of the first image, where a longer list is painted in parts.
        progress: see `paint_tokens`.

    Returns:
        Pixels, uint8 [B, H, W, 3], alike on all ranks.

    Raises:
        ValueError: more rounds than tokens.
        FloatingPointError: what was drawn is not finite.
    """
    latents_BNC = paint_latents(
        engine, captions, source=source, groups=groups, sampling=sampling, first_number=first_number, progress=progress
    )
    return source.codec.decode(latents_BNC.cpu().numpy())


def paint_latents(
    engine: Engine,
    captions: Sequence[str],
    *,
    source: DataSource,
    groups: ParallelGroups,
    sampling: ImageSampling,
    first_number: int = 0,
    progress: Report | None = None,
) -> Tensor:
    """The images that `paint` decodes, fp32 [B, N, C] on this device."""
    shape = (len(captions), source.codec.num_tokens, source.codec.channels)
    return paint_tokens(
        _Painter(engine, captions, source=source, groups=groups, sampling=sampling),
        latents_BNC=torch.zeros(shape, device=platform.device()),
        masked_BN=torch.ones(shape[:2], dtype=torch.bool, device=platform.device()),
        sampling=sampling,
        first_number=first_number,
        progress=progress,
    )


class _Painter(Painter):
    """With the engine's model; the prompts are read when it is made."""

    def __init__(
        self,
        engine: Engine,
        captions: Sequence[str],
        *,
        source: DataSource,
        groups: ParallelGroups,
        sampling: ImageSampling,
    ) -> None:
        super().__init__(engine.last_stage, sampling=sampling)
        self._engine, self._source, self._groups = engine, source, groups
        prompts = [source.tokenizer.encode(caption)[: source.builder.max_text] for caption in captions]
        # With guidance the second half has no text, as the dropped captions in training.
        prompts += [[] for _ in prompts] * (self.halves - 1)
        begin = source.tokenizer.begin_image_id
        documents = [source.builder.content([Text([*prompt, begin], learn=False, end=False)], sample_id=0) for prompt in prompts]
        batch = prompt_batch(documents, source=source, multiple=groups.tensor.size())
        self._cache = KeyValueCache()
        engine.hidden_states(batch, cache=self._cache)
        self._cache.commit(batch.document_ids_BS >= 0)
        self._image_begin = self._cache.get_seq_length()
        self._first_B = (batch.document_ids_BS >= 0).sum(dim=1)

    def look(self, latents_BNC: Tensor, *, masked_BN: Tensor, anew_BN: Tensor) -> None:
        """See `Painter`."""
        self._tokens = Selection(anew_BN.repeat(self.halves, 1))
        batch = image_batch(
            latents_BNC,
            masked_BN,
            tokens=self._tokens,
            first_B=self._first_B,
            source=self._source,
            multiple=self._groups.tensor.size(),
        )
        is_first = self._cache.get_seq_length() == self._image_begin
        if not is_first:
            self._cache.overwriting = Overwriting.of_images(self._tokens, begin=self._image_begin)
        self._h_SBD = self._engine.hidden_states(batch, cache=self._cache)
        if is_first:
            self._cache.commit(batch.document_ids_BS >= 0)

    def conditions(self, row_K: Tensor, place_K: Tensor, *, halves: int) -> Tensor:
        """See `Painter`; on the last pipeline stage."""
        model = self._engine.last_stage
        assert model is not None
        assert self._h_SBD is not None
        rows = torch.cat([row_K + half * (len(self._first_B) // self.halves) for half in range(halves)])
        return model.image_condition(self._h_SBD[self._tokens.column_BN[rows, place_K.repeat(halves)], rows])

    def draw(self, row_K: Tensor, place_K: Tensor, *, noise: NoiseSource, guidance_scale_K1: Tensor | None) -> Tensor:
        """See `Painter`."""
        draw = partial(super().draw, row_K, place_K, noise=noise, guidance_scale_K1=guidance_scale_K1)
        return self._on_all_ranks(draw, shape=(len(row_K), self._source.codec.channels))

    def spread(self, row_K: Tensor, place_K: Tensor, *, noise: NoiseSource) -> Tensor:
        """See `Painter`."""
        return self._on_all_ranks(partial(super().spread, row_K, place_K, noise=noise), shape=(len(row_K),))

    def _on_all_ranks(self, compute: Callable[[], Tensor], *, shape: tuple[int, ...]) -> Tensor:
        """What the last pipeline stage computes."""
        result = torch.empty(shape, device=platform.device()) if self._h_SBD is None else compute()
        if self._groups.pipeline.size() > 1:
            torch.distributed.broadcast(result, group=self._groups.pipeline, group_src=self._groups.pipeline.size() - 1)
        return result
