"""Microbatches under way in 1F1B schedules, against what is published of them and a walk over the same passes."""

from __future__ import annotations

import pytest

from mmar_megatron.scaling.footprint import Activations, Footprint
from mmar_megatron.scaling.pieces import in_flight, most_at_a_time


def footprint(*, saved: Activations, peak: Activations) -> Footprint:
    return Footprint(parameters=1, row_parallel=0, saved=saved, sent=0, peak=peak, batch=0, traffic={})


def layers(saved: int, peak: int) -> Footprint:
    return footprint(saved=Activations(layers=saved), peak=Activations(layers=peak))


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 3, 8, 1000])
def test_stage_k_of_p_keeps_p_minus_k(stages: int, microbatches: int) -> None:
    for stage in range(stages):
        schedule = {"stage": stage, "stages": stages, "microbatches": microbatches}
        expected = min(stages - stage, microbatches)
        assert in_flight(1, **schedule) == expected
        most = most_at_a_time([layers(100, 130)], **schedule)
        assert most == Activations(layers=(expected - 1) * 100 + 130)


def test_interleaved_keeps_the_published_number_of_chunks() -> None:
    # arXiv 2205.05198, section 4.2.2: on the first of p stages with m chunks 1 + (p - 1) / (p m) times the layers of plain 1F1B.
    for stages, chunks in ((2, 2), (4, 2), (8, 4)):
        most = in_flight(chunks, stage=0, stages=stages, microbatches=8 * stages)
        assert most / chunks / stages == pytest.approx(1 + (stages - 1) / (stages * chunks))


def test_chunks_count_by_what_each_keeps() -> None:
    # On the last of two stages two passes of the first chunk come before a backward pass can, then the second chunk's first.
    first, second = layers(10, 15), layers(100, 170)
    assert most_at_a_time([first, second], stage=1, stages=2, microbatches=4).total == 2 * 10 + 170
    assert most_at_a_time([first, second], stage=0, stages=2, microbatches=2).total == 2 * 10 + 100 + 170


def test_parts_are_those_of_the_fullest_moment() -> None:
    """Not the most of each part: when a backward pass comes to the logits, the head's rows are gone."""
    first = layers(10, 60)
    second = footprint(saved=Activations(layers=20, logits=5, head_rows=7), peak=Activations(layers=21, logits=9, head_rows=8))
    # Two passes of the first chunk, then the second's; or a third of the first, while two of the second are kept.
    assert most_at_a_time([first, second], stage=1, stages=2, microbatches=2) == Activations(layers=70)
    assert most_at_a_time([layers(10, 15), second], stage=1, stages=2, microbatches=2) == Activations(
        layers=2 * 10 + 21, logits=9, head_rows=8
    )
