"""The time of a step, forecast: operations and bytes are counted, and divided by peaks of which a share is assumed to be reached.

Each share has a good and a poor value, so a time comes as a range. None was measured; docs/planning.md says what they rest on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmar_megatron.scaling.flops import Peaks, StepFlops
from mmar_megatron.scaling.footprint import Piece
from mmar_megatron.scaling.gpus import Gpu
from mmar_megatron.scaling.layout import Layout
from mmar_megatron.scaling.split import max_repeated_layers
from mmar_megatron.scaling.traffic import GRADIENTS, PARAMETERS, TENSOR


class Range(NamedTuple):
    """Of what is forecast."""

    best: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of peaks."""

    linears: float
    """By the backbone's and the output layer's products, with the norms and other small things between them."""
    attention: float
    """Under a mask of its own, by torch's kernels."""
    small: float
    """By the narrow linears of EmbeddingViT, projectors and diffusion head."""
    sending: float
    """Of the rate of links and network."""
    memory: float
    """Of the memory's rate, by the optimizer."""


GOOD = Shares(linears=0.72, attention=0.4, small=0.5, sending=0.85, memory=0.85)
POOR = Shares(linears=0.5, attention=0.15, small=0.2, sending=0.5, memory=0.5)


class Clock:
    """Times of a layout on GPUs that reach given shares.

    Raises:
        ValueError: no peak of the GPU is known in this precision.
    """

    def __init__(self, layout: Layout, *, flops: StepFlops, gpu: Gpu, shares: Shares) -> None:
        self.layout, self.flops, self.gpu, self.shares = layout, flops, gpu, shares
        self.peaks = peaks_of(gpu, layout)

    def stage_s(self, stage: int, *, sent: Mapping[str, int]) -> float:
        """Of a rank's own work in one step, with what it sends to its tensor-parallel ranks, for which it waits."""
        talking = sum(size for kind, size in sent.items() if kind.startswith(TENSOR))
        return sum(map(self._piece_s, self.layout.pieces(stage))) + talking / self._rate(span=self.layout.tensor)

    def _piece_s(self, piece: Piece) -> float:
        layout, flops, shares, config = self.layout, self.flops, self.shares, self.layout.config
        backbone = config.model.backbone
        forward = self._layers(flops.backbone.forward, attention=flops.attention.forward) / backbone.num_layers
        backward = self._layers(flops.backbone.backward, attention=flops.attention.backward) / backbone.num_layers
        work = piece.layers * (forward + backward) + min(piece.layers, max_repeated_layers(backbone)) * forward
        if piece.first:  # all of it on each tensor-parallel rank
            work += layout.tensor * (flops.embedding_vit + flops.vis_projector).total / shares.small
        if piece.last:
            work += flops.logits.total / shares.linears + (flops.post_projector + flops.head).total / shares.small
        return work / (layout.data * layout.tensor * self.peaks.dtype)

    def _layers(self, whole: int, *, attention: int) -> float:
        """As operations in `precision.dtype`, of which FP8 does more in the same time."""
        linears = whole - attention
        in_fp8 = self.peaks.fp8_layers * linears
        return (
            linears - in_fp8 + in_fp8 * self.peaks.dtype / self.peaks.fp8
        ) / self.shares.linears + attention / self.shares.attention

    def pipeline_s(self, stages: Sequence[float]) -> float:
        """All microbatches through the slowest stage and one through the others; where these have chunks, through one of them."""
        others = sum(stages) - max(stages)
        return max(stages) + others / (self.layout.microbatches * self.layout.chunks)

    def step_s(self, stages: Sequence[float], *, sent: Sequence[Mapping[str, int]], optimizer: int, overlapped: bool) -> float:
        """Of a whole step.

        Args:
            stages: `stage_s` of each.
            sent: by each.
            optimizer: bytes of its state on a rank.
            overlapped: whether ZeRO's and the pipeline's communication, as far as it can, goes on beside computation.
        """
        layout, pipeline = self.layout, self.pipeline_s(stages)
        rate = self._rate(span=layout.tensor * layout.data)
        gradients, parameters = (max(of.get(kind, 0) for of in sent) / rate for kind in (GRADIENTS, PARAMETERS))
        parallel = layout.config.parallel
        if layout.zero_stage is not None:
            beside = pipeline if overlapped else 0.0
            gradients, parameters = max(0.0, gradients - beside * 2 / 3), max(0.0, parameters - beside / 3)
        else:  # beside the last backward pass, and the first forward pass
            one = pipeline / layout.microbatches
            gradients = max(0.0, gradients - parallel.overlap_grad_reduce * one * 2 / 3)
            parameters = max(0.0, parameters - parallel.overlap_param_gather * one / 3)
        passes = 0 if overlapped else 2 * layout.microbatches * layout.chunks
        hops = (2 * (layout.stages - 1) + passes) if layout.stages > 1 else 0
        hop = layout.hidden_bytes / self._rate(span=2 * layout.world_size // layout.stages)
        updating = 2.5 * optimizer / (self.gpu.memory_rate * self.shares.memory)  # read and written, with gradients and weights
        return pipeline + gradients + parameters + hops * hop + updating

    def _rate(self, *, span: int) -> float:
        """Between ranks that lie so many apart: within a machine, or over the network."""
        return (self.gpu.link_rate if span <= self.gpu.per_node else self.gpu.network_rate) * self.shares.sending


def peaks_of(gpu: Gpu, layout: Layout) -> Peaks:
    """Of a GPU in the formats that the layout computes in.

    Raises:
        ValueError: they are not known.
    """
    precision = layout.config.precision
    peaks = Peaks.of(gpu.name, precision=precision, backbone=layout.config.model.backbone)
    if peaks is None:
        formats = precision.dtype if precision.fp8 == "off" else f"{precision.dtype} and FP8"
        raise ValueError(f"The peaks of {gpu.name} in {formats} are not known: choose another GPU or precision.")
    return peaks
