"""The time of a step, forecast: operations and bytes are counted, and divided by peaks of which a share is assumed to be reached.

Each share has a good and a poor value, so a time comes as a range. None was measured; docs/planning.md says what they rest on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmar_megatron.scaling.flops import StepFlops, attention, peak_flops
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
        self.peak = peak_of(gpu, layout)

    def stage_s(self, stage: int, *, sent: Mapping[str, int]) -> float:
        """Of a rank's own work in one step, with what it sends to its tensor-parallel ranks, for which it waits."""
        talking = sum(size for kind, size in sent.items() if kind.startswith(TENSOR))
        return sum(map(self._piece_s, self.layout.pieces(stage))) + talking / self._rate(span=self.layout.tensor)

    def _piece_s(self, piece: Piece) -> float:
        layout, flops, shares, config = self.layout, self.flops, self.shares, self.layout.config
        backbone = config.model.backbone
        pairs = attention(
            batch=config.train.global_batch_size,
            length=config.data.sequence_length,
            width=backbone.num_attention_heads * backbone.kv_channels,
        )
        forward = self._layer(flops.backbone.forward // backbone.num_layers, pairs.forward)
        backward = self._layer(flops.backbone.backward // backbone.num_layers, pairs.backward)
        work = piece.layers * (forward + backward) + min(piece.layers, max_repeated_layers(backbone)) * forward
        if piece.first:  # all of it on each tensor-parallel rank
            work += layout.tensor * (flops.embedding_vit + flops.vis_projector).total / shares.small
        if piece.last:
            work += flops.logits.total / shares.linears + (flops.post_projector + flops.head).total / shares.small
        return work / (layout.data * layout.tensor * self.peak)

    def _layer(self, whole: int, pairs: int) -> float:
        return (whole - pairs) / self.shares.linears + pairs / self.shares.attention

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


def peak_of(gpu: Gpu, layout: Layout) -> float:
    """Operations a second of a GPU in the precision of the layout.

    Raises:
        ValueError: none is known.
    """
    dtype = layout.config.precision.dtype
    peak = peak_flops(gpu.name, dtype=dtype)
    if peak is None:
        raise ValueError(f"No peak of {gpu.name} in {dtype} is known: choose another GPU or precision.")
    return peak
