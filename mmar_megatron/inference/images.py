"""Painting with the model that is trained, in any layout: text to image (MAR, arXiv 2406.11838, section 4).

Prompts are read once: their keys and values stay as they are, for no prompt sees the image behind it. Each round runs the
backbone over the image's tokens alone, the conditional and the unconditional half in one batch, and the head over the tokens that
it draws.

Axes: B images, N tokens of an image, C channels of a token, K tokens drawn in a round, S positions, D width, Z width of the
condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.data.sequence import Text
from mmar_megatron.data.source import DataSource
from mmar_megatron.diffusion.conditional import draw_tokens
from mmar_megatron.diffusion.painting import ImageSampling, Round, paint_tokens
from mmar_megatron.engine.base import Engine
from mmar_megatron.inference.batches import image_batch, prompt_batch
from mmar_megatron.model.key_values import KeyValueCache
from mmar_megatron.parallel import ParallelGroups


def paint(
    engine: Engine,
    captions: Sequence[str],
    *,
    source: DataSource,
    groups: ParallelGroups,
    sampling: ImageSampling,
    first_number: int = 0,
    progress: Callable[[int, int, Tensor], None] | None = None,
) -> NDArray[np.uint8]:
    """Draw one image for each caption. All ranks of a model replica call it together; call within `engine.evaluating()`.

    Order of positions and noise follow from (seed, number of the image, round) alone, so neither the batch nor the layout changes
    an image.

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
    progress: Callable[[int, int, Tensor], None] | None = None,
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


class _Painter:
    """Draws tokens with the engine's model; the prompts are read when it is made."""

    def __init__(
        self,
        engine: Engine,
        captions: Sequence[str],
        *,
        source: DataSource,
        groups: ParallelGroups,
        sampling: ImageSampling,
    ) -> None:
        self._engine, self._source, self._groups, self._sampling = engine, source, groups, sampling
        prompts = [source.tokenizer.encode(caption)[: source.builder.max_text] for caption in captions]
        # With guidance the second half has no text, as the dropped captions in training.
        prompts += [[] for _ in prompts] if sampling.guided else []
        begin = source.tokenizer.begin_image_id
        documents = [source.builder.content([Text([*prompt, begin], learn=False, end=False)], sample_id=0) for prompt in prompts]
        batch = prompt_batch(documents, source=source, multiple=groups.tensor.size())
        self._prompts = KeyValueCache()
        engine.hidden_states(batch, cache=self._prompts)
        self._prompts.commit(batch.document_ids_BS >= 0)
        self._first_B = (batch.document_ids_BS >= 0).sum(dim=1)

    def __call__(self, asked: Round) -> Tensor:
        """See `Draw`; alike on all ranks."""
        halves = len(self._first_B) // len(asked.latents_BNC)
        batch = image_batch(
            asked.latents_BNC,
            asked.masked_BN,
            first_B=self._first_B,
            source=self._source,
            multiple=self._groups.tensor.size(),
        )
        h_SBD = self._engine.hidden_states(batch, cache=self._prompts)
        drawn_KC = torch.empty((len(asked.row_K), asked.latents_BNC.shape[2]), device=platform.device())
        if h_SBD is not None:
            model = self._engine.last_stage
            assert model is not None
            sampler = self._sampling.head_sampler(schedule=model.schedule, parameterization=model.parameterization)
            rows = torch.cat([asked.row_K + half * len(asked.latents_BNC) for half in range(halves)])
            z_KZ = model.image_condition(h_SBD[asked.place_K.repeat(halves), rows])
            drawn_KC = draw_tokens(
                model.denoise, z_KZ, sampler=sampler, noise=asked.noise, guidance_scale=asked.guidance_scale_K1
            )
        if self._groups.pipeline.size() > 1:
            torch.distributed.broadcast(drawn_KC, group=self._groups.pipeline, group_src=self._groups.pipeline.size() - 1)
        return drawn_KC
