"""Footprints of pieces with any number of layers, put together from runs of one and of a few; and how many are kept at a time."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import NamedTuple

from mmar_megatron.config import Config, TransformerConfig
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.scaling.footprint import Activations, Footprint, Microbatch, Piece, run_on_fake_tensors

_FEW = 4
"""Layers of the longer run, or groups of layers that are recomputed together."""


class Recomputation(NamedTuple):
    """Which layers are run again in backward, in megatron-core's words."""

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None

    @classmethod
    def of(cls, backbone: TransformerConfig) -> Recomputation:
        """As configured."""
        return cls(backbone.recompute_granularity, backbone.recompute_method, backbone.recompute_num_layers)

    def applied(self, backbone: TransformerConfig) -> TransformerConfig:
        """The same backbone with this."""
        backbone = copy.copy(backbone)
        backbone.recompute_granularity, backbone.recompute_method, backbone.recompute_num_layers = self
        return backbone


NO_LAYER = Recomputation()
EACH_LAYER = Recomputation("full", "uniform", 1)


class Footprints:
    """Of pieces of a model at one tensor-parallel size. Layers are alike, and so are microbatches.

    Args:
        config: of which the model, the tensor-parallel size and the precision count, not stages and recomputation.
        microbatch: what runs through.
        geometry: grid and channels of the image codec.
        vocab_size: of the tokenizer.
    """

    def __init__(self, config: Config, *, microbatch: Microbatch, geometry: ImageGeometry, vocab_size: int) -> None:
        self._config = config
        self._run = partial(run_on_fake_tensors, microbatch=microbatch, geometry=geometry, vocab_size=vocab_size)
        self._layers, self._end = cache(self._run_layers), cache(self._run_end)

    def of(self, piece: Piece, *, recompute: Recomputation) -> Footprint:
        """Of one rank."""
        unit, before, shorter, longer = self._layers(recompute, piece.layers)
        times = (piece.layers - before - unit) / ((_FEW - 1) * unit)

        def line(short: int, long: int) -> int:
            return round(short + times * (long - short))

        saved = shorter.saved + (longer.saved - shorter.saved).times(times)
        layers = Footprint(
            parameters=line(shorter.parameters, longer.parameters),
            row_parallel=0,
            saved=saved,
            sent=longer.sent,
            peak=saved + longer.peak - longer.saved,
            batch=longer.batch,
            traffic={kind: line(shorter.traffic.get(kind, 0), sent) for kind, sent in longer.traffic.items()},
        )
        if piece.first:
            layers = self._with_first(layers)
        if piece.last:
            layers = self._with_last(layers)
        return replace(layers, parameters=layers.parameters - self.tied) if piece.first and piece.last else layers

    @cached_property
    def tied(self) -> int:
        """Parameters that first and last stage both hold, if they are not the same: tied word embeddings."""
        one, both = (self._run(self._with(NO_LAYER), Piece(1, first=ends, last=ends)) for ends in (False, True))
        return sum(self._end(first=first)[1].parameters for first in (True, False)) - one.parameters - both.parameters

    def _with_first(self, layers: Footprint) -> Footprint:
        one, end = self._end(first=True)
        together = _sum(layers, one, end)
        # Backward comes to what the first stage does before its layers when nothing else is kept any more.
        return replace(together, peak=_larger(together.saved + layers.peak - layers.saved, end.peak))

    def _with_last(self, layers: Footprint) -> Footprint:
        one, end = self._end(first=False)
        together = _sum(layers, one, end)
        # And to the layers when what the heads kept is gone.
        return replace(together, peak=_larger(together.saved + end.peak - end.saved, layers.peak))

    def _run_layers(self, recompute: Recomputation, layers: int) -> tuple[int, int, Footprint, Footprint]:
        unit, before = 1, 0
        if recompute.method == "block" and recompute.num_layers is not None and layers <= recompute.num_layers:
            recompute = EACH_LAYER
        if recompute.granularity == "full":
            assert recompute.num_layers is not None
            if recompute.method == "uniform":
                unit = recompute.num_layers
            else:
                before = recompute.num_layers  # layers after so many are kept
        config = self._with(recompute)
        middle = partial(Piece, first=False, last=False)
        return unit, before, self._run(config, middle(before + unit)), self._run(config, middle(before + _FEW * unit))

    def _run_end(self, *, first: bool) -> tuple[Footprint, Footprint]:
        config = self._with(NO_LAYER)
        return self._run(config, Piece(1, first=False, last=False)), self._run(config, Piece(1, first=first, last=not first))

    def _with(self, recompute: Recomputation) -> Config:
        model = self._config.model
        return replace(self._config, model=replace(model, backbone=recompute.applied(model.backbone)))


def _sum(layers: Footprint, one: Footprint, end: Footprint) -> Footprint:
    """Layers, and what an end with one layer has more than that layer."""
    traffic = Counter(layers.traffic)
    for kind in {*one.traffic, *end.traffic}:
        traffic[kind] += end.traffic.get(kind, 0) - one.traffic.get(kind, 0)
    return Footprint(
        parameters=layers.parameters + end.parameters - one.parameters,
        row_parallel=layers.row_parallel + end.row_parallel,
        saved=layers.saved + end.saved - one.saved,
        sent=layers.sent + end.sent - one.sent,
        peak=layers.peak,
        batch=layers.batch,
        traffic=dict(traffic),
    )


def _larger(one: Activations, other: Activations) -> Activations:
    return max(one, other, key=lambda activations: activations.total)


def most_at_a_time(chunks: Sequence[Footprint], *, stage: int, stages: int, microbatches: int) -> Activations:
    """Activations when they are most on a rank of a stage that runs these chunks in megatron-core's 1F1B schedule, interleaved or
    not (arXiv 2104.04473): those kept by the microbatches under way, and what the one that is run takes beside.
    """
    most, kept = Activations(), Activations()
    for backward, chunk in _order(len(chunks), stage=stage, stages=stages, microbatches=microbatches):
        if backward:
            kept -= chunks[chunk].saved  # which its peak has within
        most = _larger(most, kept + chunks[chunk].peak)
        if not backward:
            kept += chunks[chunk].saved
    return most


def in_flight(chunks: int, *, stage: int, stages: int, microbatches: int) -> int:
    """Passes of chunks, at most, between whose forward and backward a stage is."""
    most, kept = 0, 0
    for backward, _ in _order(chunks, stage=stage, stages=stages, microbatches=microbatches):
        kept += -1 if backward else 1
        most = max(most, kept)
    return most


def _order(chunks: int, *, stage: int, stages: int, microbatches: int) -> Iterator[tuple[bool, int]]:
    """Whether it is a backward pass, and of which chunk: forward passes until the first gradient can be there, then in turn."""
    passes = min(microbatches, 4 * stages) * chunks  # then all repeats itself
    ahead = stages - stage - 1 if chunks == 1 else (stages - stage - 1) * 2 + (chunks - 1) * stages
    ahead = min(ahead, passes)
    # Interleaved, each chunk takes as many microbatches as there are stages before the next one has its turn.
    chunk_of = [number % (stages * chunks) // stages for number in range(passes)]
    yield from ((False, chunk) for chunk in chunk_of[:ahead])
    for number in range(passes):
        if ahead + number < passes:
            yield False, chunk_of[ahead + number]
        yield True, chunks - 1 - chunk_of[number]
