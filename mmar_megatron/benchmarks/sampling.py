"""Painting beside the plain way, which runs the backbone over prompt and image anew in each round, as MAR's code does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.benchmarks.timing import in_turn, median, ratio
from mmar_megatron.benchmarks.training import prepare
from mmar_megatron.config import parse_command_line
from mmar_megatron.data.sequence import DocumentImage
from mmar_megatron.data.source import DataSource
from mmar_megatron.diffusion.conditional import draw_tokens
from mmar_megatron.diffusion.painting import Draw, ImageSampling, Round, paint_tokens
from mmar_megatron.engine.base import Engine
from mmar_megatron.inference.images import paint_latents
from mmar_megatron.training.building import build_engine


def compare_sampling(options: Sequence[str], *, images: int, sampling: ImageSampling, rounds: int) -> dict[str, Any]:
    """Seconds of painting both ways, their ratio, how far their latents differ, and what the head alone takes.

    Args:
        options: of pretrain_mmar.py; weights are random, prompts as long as `data.sequence_length` has room for. One process.
        images: painted together.
        sampling: how.
        rounds: of which medians are taken.
    """
    config, source, groups = prepare(parse_command_line(options).config)
    engine = build_engine(config, source=source, groups=groups)
    with torch.no_grad():
        for parameter in (p for chunk in engine.chunks for p in chunk.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.02)  # the head begins at zero, and nothing would matter
    prompts = ["a few words " * source.builder.max_text] * images
    painted: dict[str, Tensor] = {}

    def cached() -> None:
        painted["cached"] = paint_latents(engine, prompts, source=source, groups=groups, sampling=sampling)

    def plain() -> None:
        painted["plain"] = paint_plainly(engine, prompts, source=source, sampling=sampling)

    def head() -> None:
        paint_without_backbone(engine, images, source=source, sampling=sampling)

    with engine.evaluating():
        plain_s, cached_s, head_s = in_turn([plain, cached, head], rounds=rounds)
    difference = (painted["cached"] - painted["plain"]).abs().max() / painted["plain"].abs().max()
    return {
        "text_tokens": source.builder.max_text,
        "image_tokens": source.codec.num_tokens,
        "plain_s": median(plain_s),
        "cached_s": median(cached_s),
        "head_alone_s": median(head_s),
        **ratio(plain_s, cached_s),
        "backbone": ratio(_without(plain_s, head_s), _without(cached_s, head_s)),
        "largest_relative_difference": float(difference),
    }


def _without(seconds: Sequence[float], part_s: Sequence[float]) -> list[float]:
    return [both - part for both, part in zip(seconds, part_s, strict=True)]


def paint_plainly(engine: Engine, prompts: Sequence[str], *, source: DataSource, sampling: ImageSampling) -> Tensor:
    """Latents [B, N, C] by whole sequences in each round, on one process."""
    model = engine.last_stage
    assert model is not None
    sampler = sampling.head_sampler(schedule=model.schedule, parameterization=model.parameterization)
    ids = [source.tokenizer.encode(prompt) for prompt in prompts]
    halves: list[list[list[int]]] = [ids, [[] for _ in ids]] if sampling.guided else [ids]

    def draw(asked: Round) -> Tensor:
        documents = [
            source.builder.text_to_image(prompt, image=DocumentImage(latents_NC=latents, masked_N=masked), sample_id=0)
            for half in halves
            for prompt, latents, masked in zip(half, asked.latents_BNC.cpu().numpy(), asked.masked_BN.cpu().numpy(), strict=True)
        ]
        h_SBD = engine.hidden_states(source.assemble([[d] for d in documents], timestep_multiplier=1).to(platform.device()))
        assert h_SBD is not None
        rows = torch.cat([asked.row_K + half * len(asked.latents_BNC) for half in range(len(halves))])
        starts = torch.tensor([document.image_start for document in documents], device=h_SBD.device)
        z_KZ = model.image_condition(h_SBD[starts[rows] + asked.place_K.repeat(len(halves)), rows])
        return draw_tokens(model.denoise, z_KZ, sampler=sampler, noise=asked.noise, guidance_scale=asked.guidance_scale_K1)

    return _paint(draw, len(prompts), source=source, sampling=sampling)


def paint_without_backbone(engine: Engine, images: int, *, source: DataSource, sampling: ImageSampling) -> Tensor:
    """What the head takes: the same rounds under conditions that are there already."""
    model = engine.last_stage
    assert model is not None
    sampler = sampling.head_sampler(schedule=model.schedule, parameterization=model.parameterization)
    halves = 2 if sampling.guided else 1

    def draw(asked: Round) -> Tensor:
        z_KZ = torch.zeros(halves * len(asked.row_K), model.settings.head.width, device=asked.row_K.device)
        return draw_tokens(model.denoise, z_KZ, sampler=sampler, noise=asked.noise, guidance_scale=asked.guidance_scale_K1)

    return _paint(draw, images, source=source, sampling=sampling)


def _paint(draw: Draw, images: int, *, source: DataSource, sampling: ImageSampling) -> Tensor:
    shape = (images, source.codec.num_tokens, source.codec.channels)
    return paint_tokens(
        draw,
        latents_BNC=torch.zeros(shape, device=platform.device()),
        masked_BN=torch.ones(shape[:2], dtype=torch.bool, device=platform.device()),
        sampling=sampling,
    )
