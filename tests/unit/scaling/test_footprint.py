"""Footprints against torch's own memory tracker, whole stages and what is known of the collectives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.distributed._tools.mem_tracker import MemTracker

from mmar_megatron.config import Config, parse_command_line
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.scaling import footprint as footprint_module
from mmar_megatron.scaling.footprint import Activations, Footprint, Microbatch, Piece, run_on_fake_tensors
from mmar_megatron.scaling.pieces import Footprints, Recomputation

GEOMETRY = ImageGeometry(grid_height=8, grid_width=8, channels=16)
VOCAB = 1000
MICROBATCH = Microbatch(sequences=2, sequence_length=512, images=8, labels=300, masked=400)
OPTIONS = [
    *("--model.backbone.num_layers", "10", "--model.backbone.hidden_size", "256", "--model.backbone.ffn_hidden_size", "704"),
    *("--model.backbone.num_attention_heads", "8", "--model.backbone.num_query_groups", "4", "--precision.dtype", "bf16"),
    *("--model.embedding_vit.num_layers", "2", "--model.head.depth", "3", "--model.head.width", "256"),
    *("--data.sequence_length", "512", "--data.codec.image_size", "64", "--data.codec.patch_size", "8"),
]
TP4 = ["--parallel.tensor_model_parallel_size", "4"]
SP = [*TP4, "--parallel.sequence_parallel", "true"]
BACKBONE = "--model.backbone.recompute_"
UNIFORM = [f"{BACKBONE}granularity=full", f"{BACKBONE}method=uniform", f"{BACKBONE}num_layers=2"]
BLOCK = [f"{BACKBONE}granularity=full", f"{BACKBONE}method=block", f"{BACKBONE}num_layers=3"]
ENDS = [(True, True), (True, False), (False, False), (False, True)]
PARTS = ("layers", "logits", "head_rows")
HIDDEN = 512 * 2 * 256 * 2
"""Bytes of the hidden states."""


def config_of(*options: str) -> Config:
    return parse_command_line([*OPTIONS, *options]).config


def whole(config: Config, piece: Piece, **rows: int) -> Footprint:
    microbatch = replace(MICROBATCH, **rows)
    return run_on_fake_tensors(config, piece, microbatch=microbatch, geometry=GEOMETRY, vocab_size=VOCAB)


def put_together(config: Config, piece: Piece) -> Footprint:
    footprints = Footprints(config, microbatch=MICROBATCH, geometry=GEOMETRY, vocab_size=VOCAB)
    return footprints.of(piece, recompute=Recomputation.of(config.model.backbone))


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        *((SP, ends) for ends in ENDS),
        *((options, ends) for options in ([], [*SP, *UNIFORM], [*TP4, *BLOCK]) for ends in ENDS[::2]),
    ],
)
def test_a_few_layers_tell_what_many_take(options: list[str], ends: tuple[bool, bool]) -> None:
    config, piece = config_of(*options), Piece(10, *ends)
    expected, got = whole(config, piece), put_together(config, piece)
    for exact in ("parameters", "row_parallel", "batch", "sent"):
        assert getattr(got, exact) == getattr(expected, exact)
    assert {kind: sent for kind, sent in got.traffic.items() if sent} == {k: sent for k, sent in expected.traffic.items() if sent}
    for part in PARTS:
        assert getattr(got.saved, part) == pytest.approx(getattr(expected.saved, part), rel=0.001)
        assert getattr(got.peak, part) == pytest.approx(getattr(expected.peak, part), rel=0.02)


@pytest.mark.parametrize(
    ("options", "ends"), [([], ENDS[0]), (SP, ENDS[0]), (SP, ENDS[1]), (SP, ENDS[3]), ([*SP, *UNIFORM], ENDS[2])]
)
def test_peak_is_that_of_torchs_tracker(options: list[str], ends: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    config, piece = config_of(*options), Piece(6, *ends)
    trackers: list[MemTracker] = []
    original = footprint_module._fake_piece

    @contextmanager
    def tracked(*args: object, **kwargs: object) -> Iterator[torch.nn.Module]:
        with original(*args, **kwargs) as model:  # type: ignore[arg-type]
            trackers.append(MemTracker())
            trackers[0].track_external(model)
            with trackers[0]:
                yield model

    monkeypatch.setattr(footprint_module, "_fake_piece", tracked)
    batch = whole(config, piece).batch
    (peaks,) = trackers[0].get_tracker_snapshot("peak").values()
    by_kind = {getattr(kind, "name", kind): size for kind, size in peaks.items()}
    expected = by_kind["Total"] - by_kind["PARAM"] - by_kind["BUFFER"] - batch
    monkeypatch.undo()
    assert put_together(config, piece).peak.total == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_all_layers_of_a_short_piece_are_recomputed(layers: int) -> None:
    config, piece = config_of(*BLOCK), Piece(layers, False, False)
    expected, got = whole(config, piece), put_together(config, piece)
    assert (got.saved, got.traffic) == (expected.saved, expected.traffic)
    assert got.peak.total == pytest.approx(expected.peak.total, rel=0.05)


def test_what_is_sent_on_is_kept_by_the_interleaved_schedule_alone() -> None:
    """Each of so many recomputed layers keeps its input, and there the piece its output, beside what all layers share."""
    config = config_of(f"{BACKBONE}granularity=full", f"{BACKBONE}method=uniform", f"{BACKBONE}num_layers=1")
    mask_and_angles = 2 * 512 * 512 * 2 + 512 * 2 * 32 * 4
    middle, last = whole(config, Piece(4, False, False)), whole(config, Piece(4, False, True))
    assert (middle.saved.total, middle.sent) == (4 * HIDDEN + mask_and_angles, HIDDEN)
    kept = middle.keeping_output()
    assert (kept.saved - middle.saved, kept.peak - middle.peak) == (Activations(layers=HIDDEN),) * 2
    assert last.sent == 0 and last.keeping_output() == last


def test_what_the_logits_keep() -> None:
    """Of each row with a label: hidden state, probabilities in fp32, and the label, and whether it is this rank's."""
    labels, padded = MICROBATCH.labels, 1024
    for options, ranks in (([], 1), (SP, 4)):
        found = whole(config_of(*options), Piece(1, False, True))
        assert found.saved.logits == labels * (256 * 2 + padded // ranks * 4 + 8 + 1)
        without = whole(config_of(*options), Piece(1, False, True), labels=0)
        assert without.saved.logits == 0
        assert without.saved.head_rows == found.saved.head_rows


def test_what_the_head_keeps_grows_with_its_rows() -> None:
    none, some, twice = (whole(config_of(), Piece(1, False, True), masked=masked).saved for masked in (0, 200, 400))
    assert none.head_rows == 0
    assert twice.head_rows == 2 * some.head_rows > 200 * 4 * 3 * 256 * 2  # noise levels, blocks, width
    assert none.logits == some.logits == twice.logits


def test_what_backward_makes_is_of_the_part_that_it_belongs_to() -> None:
    """The fullest moment is that of the rows of which there are many; of the others there is next to nothing then."""
    config, piece = config_of(), Piece(1, False, True)
    painted, labelled = (whole(config, piece, labels=labels, masked=masked) for labels, masked in ((1, 512), (1000, 1)))
    row = 4 * 256 * 2  # noise levels and width
    assert painted.peak.head_rows > painted.saved.head_rows + 512 * row
    assert painted.peak.logits < 10_000
    assert labelled.peak.logits > labelled.saved.logits + 1000 * 1024 * 2
    assert labelled.peak.head_rows < 50 * row


def test_visible_tokens_are_aligned() -> None:
    teacher = ("--model.alignment_loss_weight", "0.1", "--model.alignment_features", "40")
    plain, aligned = (whole(config_of(*options), Piece(1, False, True)) for options in ((), teacher))
    visible = 8 * 64 - 400
    assert aligned.saved.head_rows - plain.saved.head_rows > visible * 40 * 4


def test_what_tensor_parallel_layers_send() -> None:
    layers, ring = 10, 3 / 4
    # Two all-reduces forward and two backward: behind the attention and behind the feed-forward layers.
    assert whole(config_of(*TP4), Piece(layers, False, False)).traffic == {"all-reduce": layers * 4 * 2 * ring * HIDDEN}
    # Sequence parallelism: each is a gather and a scatter, and backward gathers the inputs of two linears again.
    assert whole(config_of(*SP), Piece(layers, False, False)).traffic == {
        "all-gather": layers * 6 * ring * HIDDEN,
        "reduce-scatter": layers * 4 * ring * HIDDEN,
    }


def test_recomputation_keeps_the_input_of_each_group() -> None:
    kept = whole(config_of(*UNIFORM), Piece(10, False, False)).saved - whole(config_of(*UNIFORM), Piece(8, False, False)).saved
    assert kept == Activations(layers=HIDDEN)


def test_a_larger_microbatch_is_so_many_times_one() -> None:
    config, piece = config_of(*SP), Piece(4)
    one = Microbatch(sequences=1, sequence_length=512, images=4, labels=150, masked=200)
    got = run_on_fake_tensors(config, piece, microbatch=one, geometry=GEOMETRY, vocab_size=VOCAB).times(2)
    expected = whole(config, piece)
    assert got.parameters == expected.parameters
    assert got.saved.total == pytest.approx(expected.saved.total, rel=0.01)
    assert got.peak.total == pytest.approx(expected.peak.total, rel=0.1)
    assert got.batch == pytest.approx(expected.batch, rel=0.01)
    assert got.times(2).keeping_output().saved - got.times(2).saved == Activations(layers=got.sent * 2)


def test_nothing_is_left_behind() -> None:
    hook = sys.excepthook
    whole(config_of(), Piece(1))
    assert sys.excepthook is hook
    assert not torch.distributed.is_initialized()
    assert type(torch.empty(1)) is torch.Tensor


def test_the_device_is_asked_for_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that would have to know what is in a tensor cannot run on fake ones; none does, and so no host waits for its GPU."""
    whole(config_of(), Piece(1))
    monkeypatch.setattr(MMARModel, "_own_share", lambda self, tokens: tokens[(tokens == 0).nonzero().squeeze(1)])
    with pytest.raises(DynamicOutputShapeException):
        whole(config_of(), Piece(1))
