"""Painting beside the plain way, which runs the backbone over prompt and image anew in each round, as MAR's code does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.benchmarks.timing import in_turn, median, ratio
from mmar_megatron.benchmarks.training import prepare
from mmar_megatron.config import parse_command_line
from mmar_megatron.data.sequence import DocumentImage
from mmar_megatron.data.source import DataSource
from mmar_megatron.diffusion.painting import ImageSampling, Painter, paint_tokens
from mmar_megatron.engine.base import Engine
from mmar_megatron.inference.images import paint_latents
from mmar_megatron.model.mmar_model import MMARModel
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
    if config.engine != "native":
        raise ValueError(f"painting is measured on the engine native, not {config.engine}: leave out --engine")
    assert engine.last_stage is not None
    with torch.no_grad():
        for parameter in engine.last_stage.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # the head begins at zero, and nothing would matter
    prompts = ["a few words " * source.builder.max_text] * images
    painted: dict[str, Tensor] = {}

    def cached() -> None:
        painted["cached"] = paint_latents(engine, prompts, source=source, groups=groups, sampling=exact)

    def plain() -> None:
        painted["plain"] = paint_plainly(engine, prompts, source=source, sampling=exact)

    def reusing() -> None:
        painted["reusing"] = paint_latents(engine, prompts, source=source, groups=groups, sampling=sampling)

    def head() -> None:
        assert engine.last_stage is not None
        _paint(_HeadAlone(engine.last_stage, sampling=exact), images, source=source, sampling=exact)

    exact = replace(sampling, refresh_every=1)
    with engine.evaluating():
        plain_s, cached_s, head_s, *reusing_s = in_turn(
            [plain, cached, head, *([reusing] if sampling.refresh_every > 1 else [])], rounds=rounds
        )
    found = {
        "text_tokens": source.builder.max_text,
        "image_tokens": source.codec.num_tokens,
        "plain_s": median(plain_s),
        "cached_s": median(cached_s),
        "head_alone_s": median(head_s),
        **ratio(plain_s, cached_s),
        "backbone": ratio(_without(plain_s, head_s), _without(cached_s, head_s)),
        "largest_relative_difference": _difference(painted["cached"], painted["plain"]),
    }
    if reusing_s:
        found["reusing"] = {
            "refresh_every": sampling.refresh_every,
            "seconds": median(reusing_s[0]),
            **ratio(plain_s, reusing_s[0]),
            "relative_rms_difference": _rms_difference(painted["reusing"], painted["plain"]),
        }
    return found


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _rms_difference(a: Tensor, b: Tensor) -> float:
    return float(((a - b).square().mean() / b.square().mean()).sqrt())


def _without(seconds: Sequence[float], part_s: Sequence[float]) -> list[float]:
    return [both - part for both, part in zip(seconds, part_s, strict=True)]


class _Plain(Painter):
    """Runs over whole sequences in each round, on one process."""

    def __init__(self, engine: Engine, prompts: Sequence[str], *, source: DataSource, sampling: ImageSampling) -> None:
        assert engine.last_stage is not None
        super().__init__(engine.last_stage, sampling=sampling)
        self._engine, self._stage, self._source = engine, engine.last_stage, source
        ids = [source.tokenizer.encode(prompt) for prompt in prompts]
        without: list[list[int]] = [[] for _ in ids]
        self._prompts = ids + without * (self.halves - 1)

    def look(self, latents_BNC: Tensor, *, masked_BN: Tensor, anew_BN: Tensor) -> None:
        """See `Painter`; all tokens are run over."""
        images = [
            DocumentImage(latents_NC=latents_NC, masked_N=masked_N)
            for latents_NC, masked_N in zip(latents_BNC.cpu().numpy(), masked_BN.cpu().numpy(), strict=True)
        ] * self.halves
        documents = [
            self._source.builder.text_to_image(prompt, image=image, sample_id=0)
            for prompt, image in zip(self._prompts, images, strict=True)
        ]
        batch = self._source.assemble([[document] for document in documents], timestep_multiplier=1).to(platform.device())
        h_SBD = self._engine.hidden_states(batch)
        assert h_SBD is not None
        self._h_SBD = h_SBD
        self._start_B = torch.tensor([document.image_start for document in documents], device=h_SBD.device)

    def conditions(self, row_K: Tensor, place_K: Tensor, *, halves: int) -> Tensor:
        """See `Painter`."""
        rows = torch.cat([row_K + half * (len(self._prompts) // self.halves) for half in range(halves)])
        return self._stage.image_condition(self._h_SBD[self._start_B[rows] + place_K.repeat(halves), rows])


class _HeadAlone(Painter):
    """The same rounds under conditions that are there already."""

    def __init__(self, stage: MMARModel, *, sampling: ImageSampling) -> None:
        super().__init__(stage, sampling=sampling)
        self._width = stage.settings.head.width

    def look(self, latents_BNC: Tensor, *, masked_BN: Tensor, anew_BN: Tensor) -> None:
        """Nothing is run."""

    def conditions(self, row_K: Tensor, place_K: Tensor, *, halves: int) -> Tensor:
        """See `Painter`."""
        return torch.zeros(halves * len(row_K), self._width, device=row_K.device)


def paint_plainly(engine: Engine, prompts: Sequence[str], *, source: DataSource, sampling: ImageSampling) -> Tensor:
    """Latents [B, N, C] by whole sequences in each round, on one process."""
    return _paint(_Plain(engine, prompts, source=source, sampling=sampling), len(prompts), source=source, sampling=sampling)


def _paint(painter: Painter, images: int, *, source: DataSource, sampling: ImageSampling) -> Tensor:
    shape = (images, source.codec.num_tokens, source.codec.channels)
    return paint_tokens(
        painter,
        latents_BNC=torch.zeros(shape, device=platform.device()),
        masked_BN=torch.ones(shape[:2], dtype=torch.bool, device=platform.device()),
        sampling=sampling,
    )
