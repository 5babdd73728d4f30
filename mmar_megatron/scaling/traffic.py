"""Bytes that a rank sends in a step. Collectives are counted as rings: each of t ranks sends (t - 1) / t of what is gathered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mmar_megatron.scaling.footprint import Footprint
from mmar_megatron.scaling.layout import Layout

TENSOR = "tensor parallel"
PIPELINE = "pipeline"
TIED = "pipeline: gradients of tied embeddings"
GRADIENTS = "data parallel: gradients"
PARAMETERS = "data parallel: parameters"


def sent_in_a_step(layout: Layout, stage: int, *, chunks: Sequence[Footprint], tied: int) -> Counter[str]:
    """Of a rank of a stage, by kind: `chunks` are footprints of its microbatch, `tied` parameters are on first and last stage."""
    sent: Counter[str] = Counter()
    for chunk in chunks:
        for kind, size in chunk.traffic.items():
            sent[f"{TENSOR}: {kind}"] += size * layout.microbatches
    if summed := sum(chunk.row_parallel for chunk in chunks):
        sent[f"{TENSOR}: gradients of the head"] = round(4 * summed * 2 * _ring(layout.tensor))
    hops = sum((not piece.first) + (not piece.last) for piece in layout.pieces(stage))  # gradients back, hidden states on
    sent[PIPELINE] = hops * layout.hidden_bytes * layout.microbatches
    if layout.stages > 1 and stage in (0, layout.stages - 1):
        sent[TIED] = 4 * tied  # an all-reduce of two ranks
    parameters = sum(chunk.parameters for chunk in chunks)
    reductions, gathers = _of_data_parallel(layout)
    sent[GRADIENTS] = round(4 * parameters * _ring(layout.data) * reductions)
    sent[PARAMETERS] = round(layout.weight_bytes * parameters * _ring(layout.data) * gathers)
    return +sent


def _of_data_parallel(layout: Layout) -> tuple[int, int]:
    """How often in a step gradients are reduced and scattered, and parameters gathered."""
    match layout.zero_stage:
        case None | 1:
            return 1, 1
        case 0:
            return 2, 0  # an all-reduce: nobody needs parameters
        case 2:
            return layout.microbatches, 1
        case _:
            return layout.microbatches, 2 * layout.microbatches  # for each forward and backward pass


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
