"""Masked auto-regressive image generation (MAR, arXiv 2406.11838, section 4): begin all masked; in each round run the backbone
once, and let the diffusion head draw the tokens of a random subset of the positions that are still masked.

Suffixes: B images, N tokens of an image, C channels of a token, K tokens drawn in a round, S positions, D width, Z width of the
condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.data.sequence import DocumentImage
from mmar_megatron.data.source import DataSource
from mmar_megatron.diffusion.conditional import draw_tokens
from mmar_megatron.diffusion.rounds import cosine_rounds, image_generator, random_order
from mmar_megatron.diffusion.sampler import Sampler, SamplerKind
from mmar_megatron.engine.base import Engine
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """How images are drawn."""

    rounds: int = 16
    """Runs of the backbone for each image; at most its number of tokens."""
    steps: int = 25
    """Runs of the head for each token."""
    guidance_scale: float = 2.0
    """Classifier-free guidance; 1: none."""
    sampler: SamplerKind = "ddim"
    temperature: float = 1.0
    seed: int = 0


def paint(
    engine: Engine,
    captions: Sequence[str],
    *,
    source: DataSource,
    groups: ParallelGroups,
    sampling: ImageSampling,
    first_number: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """Draw one image for each caption. All ranks of a model replica call it together; call within `engine.evaluating()`.

    Order of positions and noise follow from (seed, number of the image, round) alone, so neither the batch nor the layout changes
    an image.

    Args:
        first_number: of the first image, where a longer list is painted in parts.
        progress: called after each round with its number, from 1, and the number of rounds.

    Returns:
        Pixels, uint8 [B, H, W, 3], alike on all ranks.

    Raises:
        ValueError: more rounds than tokens.
    """
    num_tokens, channels = source.codec.num_tokens, source.codec.channels
    stretches = cosine_rounds(num_tokens, rounds=sampling.rounds)
    prompts = [source.tokenizer.encode(caption) for caption in captions]
    numbers = range(first_number, first_number + len(captions))
    orders_BN = np.stack([random_order(num_tokens, seed=sampling.seed, image=b) for b in numbers])
    latents_BNC = np.zeros((len(captions), num_tokens, channels), dtype=np.float32)
    masked_BN = np.ones((len(captions), num_tokens), dtype=np.bool_)

    for number, (begin, end) in enumerate(stretches, start=1):
        chosen_BK = orders_BN[:, begin:end]
        streams = [image_generator(sampling.seed, image=b, round_number=number) for b in numbers]
        tokens_BKC = _draw_round(
            engine, prompts, latents_BNC, masked_BN, chosen_BK, source=source, groups=groups, sampling=sampling, streams=streams
        )
        np.put_along_axis(latents_BNC, chosen_BK[:, :, None], tokens_BKC, axis=1)
        np.put_along_axis(masked_BN, chosen_BK, False, axis=1)
        if progress is not None:
            progress(number, sampling.rounds)
    return source.codec.decode(latents_BNC)


def _draw_round(
    engine: Engine,
    prompts: Sequence[list[int]],
    latents_BNC: NDArray[np.float32],
    masked_BN: NDArray[np.bool_],
    chosen_BK: NDArray[np.int64],
    *,
    source: DataSource,
    groups: ParallelGroups,
    sampling: ImageSampling,
    streams: Sequence[np.random.Generator],
) -> NDArray[np.float32]:
    """The tokens at `chosen_BK`, [B, K, C], on all ranks."""
    guided = sampling.guidance_scale != 1.0
    documents = [
        source.builder.text_to_image(prompt, image=DocumentImage(latents_NC=latents, masked_N=masked), sample_id=0)
        # Without guidance one half is enough; with it the second has no text, as the dropped captions in training.
        for half in ((prompts, [[] for _ in prompts]) if guided else (prompts,))
        for prompt, latents, masked in zip(half, latents_BNC, masked_BN, strict=True)
    ]
    batch = source.assemble([[document] for document in documents], timestep_multiplier=1).to(platform.device())
    h_SBD = engine.hidden_states(batch)

    count, channels = chosen_BK.shape[1], latents_BNC.shape[2]
    tokens_BKC = torch.empty(len(prompts), count, channels, device=platform.device())
    if h_SBD is not None:
        model = engine.last_stage
        assert model is not None
        starts_B = torch.tensor([document.image_start for document in documents], device=h_SBD.device)
        halves = len(documents) // len(prompts)
        position_BK = starts_B[:, None] + torch.from_numpy(np.tile(chosen_BK, (halves, 1))).to(h_SBD.device)
        row_B1 = torch.arange(len(documents), device=h_SBD.device)[:, None]
        z_KZ = model.image_condition(rearrange(h_SBD[position_BK, row_B1], "b k d -> (b k) d"))
        sampled = _sample_head(model, z_KZ, guided=guided, noise_shape=(count, channels), sampling=sampling, streams=streams)
        tokens_BKC = rearrange(sampled, "(b k) c -> b k c", b=len(prompts)).contiguous()
    if groups.pipeline.size() > 1:
        torch.distributed.broadcast(tokens_BKC, group=groups.pipeline, group_src=groups.pipeline.size() - 1)
    if not bool(tokens_BKC.isfinite().all()):
        raise FloatingPointError("The image tokens just drawn are not finite: the weights or the guidance scale are unfit.")
    return tokens_BKC.cpu().numpy()


def _sample_head(
    model: MMARModel,
    z_KZ: Tensor,
    *,
    guided: bool,
    noise_shape: tuple[int, int],
    sampling: ImageSampling,
    streams: Sequence[np.random.Generator],
) -> Tensor:
    """Tokens [(B K), C] in fp32 from conditions; under guidance the second half of `z_KZ` is unconditional."""
    sampler = Sampler(
        schedule=model.schedule,
        parameterization=model.parameterization,
        steps=sampling.steps,
        kind=sampling.sampler,
        temperature=sampling.temperature,
    )

    def noise(_: int) -> Tensor:
        drawn = np.concatenate([stream.standard_normal(noise_shape, dtype=np.float32) for stream in streams])
        return torch.from_numpy(drawn).to(z_KZ.device)

    scale = sampling.guidance_scale if guided else None
    return draw_tokens(model.denoise, z_KZ, sampler=sampler, noise=noise, guidance_scale=scale)
