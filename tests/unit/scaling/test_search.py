"""Forecasts against plans and figures worked out by hand; searches against the command line that they end in."""

from __future__ import annotations

import re
from functools import cache

import pytest

from mmar_megatron.config import Config, parse_command_line
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.scaling.expected import RowMeans, expected_counts, expected_flops
from mmar_megatron.scaling.flops import StepFlops
from mmar_megatron.scaling.footprint import Microbatch, Piece
from mmar_megatron.scaling.forecast import RESERVE, Forecast, forecast
from mmar_megatron.scaling.forecast_report import as_json, table
from mmar_megatron.scaling.gpus import GPUS
from mmar_megatron.scaling.layout import Layout
from mmar_megatron.scaling.pieces import EACH_LAYER, NO_LAYER, Footprints, in_flight, most_at_a_time
from mmar_megatron.scaling.plan import plan
from mmar_megatron.scaling.search import Found, options_of, search, variants
from mmar_megatron.scaling.tables import size

GEOMETRY = ImageGeometry(grid_height=4, grid_width=4, channels=12)
VOCAB = 200
ROWS = RowMeans(images=1, labels=3.75, painted=0.5, filled=40.5)
ROW = Microbatch(sequences=1, sequence_length=48, images=1, labels=8, masked=16)
OPTIONS = [
    *("--model.backbone.num_layers", "8", "--model.backbone.hidden_size", "64", "--model.backbone.ffn_hidden_size", "96"),
    *("--model.backbone.num_attention_heads", "4", "--model.backbone.num_query_groups", "4", "--precision.dtype", "bf16"),
    *("--model.embedding_vit.num_layers", "1", "--model.embedding_vit.hidden_size", "16"),
    *("--model.embedding_vit.num_attention_heads", "2", "--model.head.depth", "2", "--model.head.width", "24"),
    *("--data.sequence_length", "48", "--data.codec.patch_size", "8", "--data.tasks.image_only", "0.25"),
    *("--train.global_batch_size", "64", "--train.micro_batch_size", "2"),
]
HIDDEN = 2 * 48 * 64 * 2
"""Bytes of a microbatch's hidden states."""
PARALLEL = "--parallel."
LAYOUTS = [
    [],
    [f"{PARALLEL}tensor_model_parallel_size=2", f"{PARALLEL}sequence_parallel=true"],
    [f"{PARALLEL}pipeline_model_parallel_size=2"],
    [f"{PARALLEL}tensor_model_parallel_size=2", f"{PARALLEL}pipeline_model_parallel_size=4", f"{PARALLEL}pipeline_split=auto"],
    [f"{PARALLEL}pipeline_model_parallel_size=2", f"{PARALLEL}virtual_pipeline_model_parallel_size=2"],
    ["--engine", "deepspeed", "--deepspeed.zero_stage", "3"],
]


def config_of(*options: str) -> Config:
    return parse_command_line([*OPTIONS, *options]).config


def flops_of(config: Config) -> StepFlops:
    counts = expected_counts(config, tokens_per_image=16, rows=ROWS)
    return expected_flops(config, counts, geometry=GEOMETRY, vocab_size=VOCAB)


def forecast_of(*options: str, gpus: int = 16) -> Forecast:
    config = config_of(*options)
    flops = flops_of(config)
    parallel = config.parallel
    footprints = footprints_of(parallel.tensor_model_parallel_size, sequence_parallel=parallel.sequence_parallel)
    layout = Layout.of(config, world_size=gpus, flops=flops)
    return forecast(layout, footprints=footprints, flops=flops, gpu=GPUS["h100"])


@cache
def footprints_of(tensor: int, *, sequence_parallel: bool) -> Footprints:
    config = config_of(
        f"{PARALLEL}tensor_model_parallel_size={tensor}", f"{PARALLEL}sequence_parallel={sequence_parallel}".lower()
    )
    return Footprints(config, microbatch=ROW, geometry=GEOMETRY, vocab_size=VOCAB)


@cache
def found() -> Found:
    config = config_of()
    return search(
        config,
        world_size=16,
        gpu=GPUS["h100"],
        flops=flops_of(config),
        row=ROW,
        geometry=GEOMETRY,
        vocab_size=VOCAB,
        say=lambda line: None,
    )


@pytest.mark.parametrize("options", LAYOUTS, ids=" ".join)
def test_models_of_the_stages_are_those_of_the_plan(options: list[str]) -> None:
    got = forecast_of(*options)
    config = config_of(*options)
    if config.parallel.pipeline_split != "auto":
        expected = plan(config, geometry=GEOMETRY, vocab_size=VOCAB, rows=ROWS, world_size=16)
        assert [stage.model for stage in got.stages] == [stage.memory for stage in expected.stages]
        assert [stage.layers for stage in got.stages] == [tuple(map(len, stage.layers)) for stage in expected.stages]
    assert got.needed == RESERVE + max(stage.total for stage in got.stages)
    assert 0 < got.mfu.worst < got.mfu.best < 1
    assert 0 < got.step.best < got.step.worst


@pytest.mark.parametrize("options", LAYOUTS, ids=" ".join)
def test_columns_add_up(options: list[str]) -> None:
    got = forecast_of(*options)
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "head_rows", "batches", "buffers")
    for stage, shown in zip(got.stages, as_json(got)["stages"], strict=True):
        assert sum(shown[part] for part in parts) == shown["together"] == stage.total
        for name, activations in (("without_recompute", stage.without_recompute), ("with_recompute", stage.with_recompute)):
            of_model = sum(shown[part] for part in ("weights", "gradients", "optimizer", "batches", "buffers"))
            assert of_model + sum(shown[name][part] for part in ("activations", "logits", "head_rows")) == shown[name]["together"]
            assert shown[name]["together"] == stage.total_of(activations)
    last, others = got.stages[-1].activations, [stage.activations for stage in got.stages[:-1]]
    assert last.logits > 0 or last.head_rows > 0
    assert all((stage.logits, stage.head_rows) == (0, 0) for stage in others)
    heading, *rows = table(got).splitlines()
    names = [part.replace("_", " ") for part in ("in_flight", *parts, "together")]
    assert re.split(r" {2,}", heading) == ["memory of a GPU", *names]
    for stage, row in zip(got.stages, rows, strict=False):
        assert row.endswith(f"  {size(stage.total)}")


def test_time_is_work_over_what_is_reached_of_the_peak() -> None:
    one = forecast_of(gpus=1)
    flops = flops_of(config_of())
    pairs = 3 * 4 * 64 * 48 * 48 * 64 * 8
    small = flops.embedding_vit + flops.vis_projector + flops.post_projector + flops.head
    linears = flops.backbone.total - pairs + flops.logits.total
    assert one.stages[0].seconds.best == pytest.approx((linears / 0.72 + pairs / 0.4 + small.total / 0.5) / 989.4e12)
    assert one.stages[0].seconds.worst == pytest.approx((linears / 0.5 + pairs / 0.15 + small.total / 0.2) / 989.4e12)
    assert one.traffic == {}


def test_what_is_sent() -> None:
    parameters = forecast_of(gpus=1).stages[0].model.weights // 2
    ring = 15 / 16
    gradients, gathered = "data parallel: gradients", "data parallel: parameters"
    assert forecast_of().traffic == {gradients: round(4 * parameters * ring), gathered: round(2 * parameters * ring)}
    # Of stage 2 each of two microbatches reduces; of stage 3 each gathers for its forward and its backward pass.
    deepspeed = ("--engine", "deepspeed", "--deepspeed.zero_stage")
    assert forecast_of(*deepspeed, "2").traffic == {
        gradients: round(8 * parameters * ring),
        gathered: round(2 * parameters * ring),
    }
    assert forecast_of(*deepspeed, "3").traffic == {
        gradients: round(8 * parameters * ring),
        gathered: round(8 * parameters * ring),
    }
    pipeline = forecast_of(*LAYOUTS[2])
    assert pipeline.traffic["pipeline: gradients of tied embeddings"] == 4 * 256 * 64  # a padded vocabulary of 256
    assert pipeline.traffic["pipeline"] == pipeline.layout.microbatches * 2 * 48 * 64 * 2


def test_the_bubble_is_that_of_the_schedule() -> None:
    plain, interleaved = (forecast_of(*LAYOUTS[k]) for k in (2, 4))
    # With equal stages (p - 1) / (m + p - 1) of the time, here 1 / 5, and half of that share for two chunks.
    assert plain.layout.microbatches == 4
    assert plain.bubble.best == pytest.approx(1 / 5, abs=0.05)
    assert interleaved.bubble.best == pytest.approx(1 / 9, abs=0.05)


def test_outputs_are_kept_by_the_interleaved_schedule_alone() -> None:
    """Beside what it needs with that, as many as it has passes under way."""
    for options, kept in ((LAYOUTS[2], 0), (LAYOUTS[4], HIDDEN)):
        got = forecast_of(*options).stages[0]
        chunks = len(got.layers)
        footprints = footprints_of(1, sequence_parallel=False)
        pieces = [footprints.of(Piece(n, k == 0, False), recompute=NO_LAYER).times(2) for k, n in enumerate(got.layers)]
        schedule = {"stage": 0, "stages": 2, "microbatches": 4}
        without = most_at_a_time(pieces, **schedule).total
        assert got.activations.total == without + kept * in_flight(chunks, **schedule)


def test_offloading_is_refused() -> None:
    with pytest.raises(ValueError, match="offloading is not forecast"):
        forecast_of("--engine", "deepspeed", "--deepspeed.offload_optimizer", "true")


def test_a_search_ranks_what_fits() -> None:
    ranked = found().fitting
    assert len(ranked) == found().layouts > 100  # so small a model fits anyhow
    assert [sum(one.step) for one in ranked] == sorted(sum(one.step) for one in ranked)
    described = [one.layout.describe() + f" {one.layout.config.train.micro_batch_size}" for one in ranked]
    assert len(set(described)) == len(described)
    for words in ("TP 2 x PP 1 x DP 8, SP", "TP 4 x PP 4 x DP 1", "ZeRO 3", "2 chunks a stage", "recomputation"):
        assert any(words in one for one in described)


def test_its_options_lead_to_its_layouts() -> None:
    for one in found().fitting[::20]:
        options = [word for option in options_of(one.layout) for word in option.split()]
        again = forecast_of(*options)
        assert again.layout.describe() == one.layout.describe()
        assert (again.needed, again.step) == (one.needed, one.step)


@pytest.mark.parametrize(
    "base",
    [
        ("--model.backbone.transformer_impl", "transformer_engine", "--precision.fp8", "tensorwise"),
        (f"{PARALLEL}overlap_p2p_comm", "false"),
        ("--engine", "deepspeed", "--deepspeed.zero_stage", "3", "--deepspeed.zero_options", '{"reduce_bucket_size": 1000}'),
        ("--optimizer.ema_decay", "0.999", "--model.alignment_loss_weight", "0.1", "--model.alignment_features", "8"),
    ],
    ids=" ".join,
)
def test_nothing_is_found_that_would_be_refused(base: tuple[str, ...]) -> None:
    config = config_of(*base)
    offered = _offered(config)
    assert len(offered) > 5
    for layout in offered:
        options = [word for option in options_of(layout) for word in option.split()]
        config_of(*base, *options)  # raises where it is refused


def _offered(config: Config) -> list[Layout]:
    flops = flops_of(config)
    return [
        Layout.of(variant, world_size=16, flops=flops)
        for tensor in (1, 2, 4)
        for variant in variants(config, tensor=tensor, recompute=EACH_LAYER, world_size=16)
    ][::5]


def test_no_layout() -> None:
    config = config_of()
    arguments = {"flops": flops_of(config), "row": ROW, "geometry": GEOMETRY, "vocab_size": VOCAB, "say": lambda line: None}
    with pytest.raises(ValueError, match=r"No layout divides the model and train\.global_batch_size 64 over 13 GPUs"):
        search(config, world_size=13, gpu=GPUS["h100"], **arguments)  # type: ignore[arg-type]
