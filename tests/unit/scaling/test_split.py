"""The balanced split against all splits there are, and what a configured one makes of the model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from mmar_megatron.config import Config, parse_command_line
from mmar_megatron.data.source import DataSource
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.scaling.expected import RowMeans
from mmar_megatron.scaling.plan import Plan, plan
from mmar_megatron.scaling.split import PipelineCosts, split_pipeline
from tests.distributed.common import MODEL

PP2 = ["--parallel.pipeline_model_parallel_size", "2"]
VP2 = ["--parallel.virtual_pipeline_model_parallel_size", "2"]
AUTO = ["--parallel.pipeline_split", "auto"]
LARGE_VIT = ["--model.embedding_vit.num_layers", "6", "--model.embedding_vit.hidden_size", "48"]
LARGE_HEAD = ["--model.head.depth", "6", "--model.head.width", "64", "--model.head.timestep_multiplier", "4"]
RECOMPUTE = [
    *("--model.backbone.recompute_granularity", "full", "--model.backbone.recompute_method", "uniform"),
    *("--model.backbone.recompute_num_layers", "1"),
]


@pytest.fixture
def source(coarse_shapes_dir: Path) -> DataSource:
    return DataSource(config_of(coarse_shapes_dir).data)


def config_of(data: Path, *options: str) -> Config:
    return parse_command_line([*MODEL, "--data.path", str(data), *options]).config


def plan_of(config: Config, source: DataSource) -> Plan:
    return plan(
        config,
        geometry=ImageGeometry.of(source.codec),
        vocab_size=source.tokenizer.vocab_size,
        rows=RowMeans.of(source, seed=config.seed),
    )


def all_splits(layers: int, *, pieces: int) -> Iterator[tuple[int, ...]]:
    """All ways to put so many layers on so many pieces, of which only the first and the last may have none."""
    for bars in itertools.combinations(range(layers + pieces - 1), pieces - 1):
        split = tuple(after - before - 1 for before, after in itertools.pairwise((-1, *bars, layers + pieces - 1)))
        if all(split[1:-1]):
            yield split


def spread(costs: Sequence[int]) -> tuple[int, int]:
    return max(costs), max(costs) - min(costs)


@pytest.mark.parametrize(("stages", "chunks", "layers"), [(2, 1, 9), (3, 1, 10), (4, 1, 9), (2, 2, 8), (3, 2, 7), (2, 3, 8)])
def test_no_split_is_better(stages: int, chunks: int, layers: int) -> None:
    """Neither in the largest stage, nor then in the spread, nor in the largest piece of a stage with as many layers."""
    generator = np.random.default_rng(stages * 100 + chunks * 10 + layers)
    for _ in range(25):
        before, after, layer = (int(cost) for cost in generator.integers(1, 1000, size=3))
        ends = {"before": before, "after": after}
        costs = PipelineCosts(
            stages=stages, pieces=stages * chunks, layer=layer, repeated_layer=layer // 3, max_repeated=layers, **ends
        )
        balanced = costs.balanced(layers)
        assert len(balanced) == stages * chunks
        assert sum(balanced) == layers
        splits = list(all_splits(layers, pieces=stages * chunks))
        assert spread(costs.of_stages(balanced)) == min(spread(costs.of_stages(split)) for split in splits)
        for stage in range(stages):
            alike = [split for split in splits if sum(split[stage::stages]) == sum(balanced[stage::stages])]
            assert largest_piece(costs, balanced, stage=stage) == min(largest_piece(costs, split, stage=stage) for split in alike)


def largest_piece(costs: PipelineCosts, split: Sequence[int], *, stage: int) -> int:
    return max(costs.of_piece(piece, layers=split[piece]) for piece in range(stage, costs.pieces, costs.stages))


def test_the_largest_stage_is_within_a_layer_of_the_smallest_possible_where_layers_do_not_cost_alike() -> None:
    """So they do not under `recompute_method: block`."""
    costs = PipelineCosts(stages=3, pieces=6, layer=90, repeated_layer=30, max_repeated=2, before=70, after=200)
    best = min(max(costs.of_stages(split)) for split in all_splits(9, pieces=6))
    assert max(costs.of_stages(costs.balanced(9))) <= best + 90 + 30


def test_equal_stages_get_equal_layers_and_what_is_left_over_is_late() -> None:
    costs = PipelineCosts(stages=3, pieces=3, layer=7, repeated_layer=0, max_repeated=0, before=0, after=0)
    assert costs.balanced(9) == [3, 3, 3]
    assert costs.balanced(10) == [3, 3, 4]


@pytest.mark.parametrize("options", [LARGE_VIT, [*LARGE_HEAD, *RECOMPUTE]], ids=["EmbeddingViT", "head"])
def test_auto_is_the_best_plan(options: list[str], source: DataSource) -> None:
    """Among the plans of all explicit splits."""
    data = Path(source.config.path)
    auto = split_pipeline(config_of(data, *PP2, *options, *AUTO), source)
    explicit = [
        config_of(data, *PP2, *options, "--parallel.pipeline_split", str(list(split))) for split in all_splits(4, pieces=2)
    ]
    plans = [plan_of(split_pipeline(config, source), source) for config in explicit]
    assert plan_of(auto, source).stages == min(plans, key=lambda each: each.imbalance).stages
    assert min(each.imbalance for each in plans) < 0.9 * max(each.imbalance for each in plans)
    assert auto.parallel.pipeline_split != [2, 2]


def test_operations_of_stages_are_those_of_the_step(source: DataSource) -> None:
    """Over all ranks, but for EmbeddingViT and VisProjector, which each tensor-parallel rank runs whole."""
    data, tensor = Path(source.config.path), ["--parallel.tensor_model_parallel_size", "2"]
    planned = plan_of(split_pipeline(config_of(data, *PP2, *RECOMPUTE, *AUTO), source), source)
    assert sum(stage.flops for stage in planned.stages) == planned.flops.executed
    assert planned.flops.recompute > 0
    by_tensor = plan_of(config_of(data, *tensor, *PP2, *RECOMPUTE), source)
    whole = by_tensor.flops.embedding_vit.total + by_tensor.flops.vis_projector.total
    assert 2 * sum(stage.flops for stage in by_tensor.stages) == by_tensor.flops.executed + whole


def test_explicit_split(source: DataSource) -> None:
    """In the order of the layers: the first chunk of each stage, then the second of each; and the first may have none."""
    data = Path(source.config.path)
    config = config_of(data, *PP2, *VP2, "--parallel.pipeline_split", "[0, 2, 1, 1]")
    planned = plan_of(split_pipeline(config, source), source)
    assert [stage.layers for stage in planned.stages] == [((), (3,)), ((1, 2), (4,))]
    planned = plan_of(split_pipeline(config_of(data, *PP2, "--parallel.pipeline_split", "[0, 4]"), source), source)
    assert [stage.layers for stage in planned.stages] == [((),), ((1, 2, 3, 4),)]
    assert re.search(r"stage 0 +none ", planned.table())
    assert f"the largest stage computes {planned.imbalance:.3f} x the mean" in planned.table()


def test_the_given_configuration_is_not_changed(source: DataSource) -> None:
    config = config_of(Path(source.config.path), *PP2, *AUTO)
    assert split_pipeline(config, source) is not config
    assert config.parallel.pipeline_split == "auto"
    assert config.model.backbone.pipeline_model_parallel_layout is None
    even = config_of(Path(source.config.path), *PP2)
    assert split_pipeline(even, source) is even
