"""The plan against models and an engine that are really built, and against real draws."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmar_megatron import parallel, platform
from mmar_megatron.config import Config, MaskRatioConfig, parse_command_line
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import build_model
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.scaling.expected import RowMeans, expected_masked
from mmar_megatron.scaling.plan import Memory, Plan, plan, stage_on_meta

GEOMETRY = ImageGeometry(grid_height=4, grid_width=4, channels=12)
VOCAB = 200

TINY = [
    *("--model.backbone.num_layers", "4", "--model.backbone.hidden_size", "32", "--model.backbone.ffn_hidden_size", "48"),
    *("--model.backbone.num_attention_heads", "4", "--model.backbone.num_query_groups", "2"),
    *("--model.embedding_vit.num_layers", "1", "--model.embedding_vit.hidden_size", "16"),
    *("--model.embedding_vit.num_attention_heads", "2"),
    *("--model.head.depth", "2", "--model.head.width", "24"),
    *("--data.sequence_length", "48", "--data.codec.patch_size", "8", "--data.tasks.image_only", "0.25"),
    *("--train.global_batch_size", "16", "--train.micro_batch_size", "2", "--train.steps", "1000"),
]
LARGE = [
    *("--model.backbone.num_layers", "40", "--model.backbone.hidden_size", "5120", "--model.backbone.ffn_hidden_size", "13824"),
    *("--model.backbone.num_attention_heads", "40", "--model.tie_embeddings", "false", "--precision.dtype", "bf16"),
    *("--model.head.depth", "12", "--model.head.width", "1536"),
    *("--data.sequence_length", "1024", "--data.codec.image_size", "256", "--data.codec.patch_size", "16"),
    *("--parallel.tensor_model_parallel_size", "8", "--parallel.pipeline_model_parallel_size", "4"),
    *("--parallel.virtual_pipeline_model_parallel_size", "2", "--parallel.sequence_parallel", "true"),
    *("--train.global_batch_size", "1024", "--train.micro_batch_size", "1"),
]
TP2 = ["--parallel.tensor_model_parallel_size", "2"]
PP2 = ["--parallel.pipeline_model_parallel_size", "2"]
VP2 = ["--parallel.virtual_pipeline_model_parallel_size", "2"]
UNTIED = ["--model.tie_embeddings", "false"]
EXTRAS = [
    *("--model.backbone.add_qkv_bias", "true", "--model.backbone.qk_layernorm", "true"),
    *("--model.alignment_loss_weight", "0.1", "--model.alignment_features", "20"),
]
SHARDED = re.compile(r"(linear_(qkv|fc1)\.(weight|bias)|linear_(proj|fc2)\.weight|word_embeddings\.weight|output_layer\.weight)$")
"""What tensor parallelism splits: column-parallel linears, row-parallel linears but for their bias, the vocabulary."""


def config_of(*options: str) -> Config:
    return parse_command_line([*TINY, *options]).config


def plan_of(*options: str, world_size: int | None = None) -> Plan:
    return plan(
        config_of(*options),
        geometry=GEOMETRY,
        vocab_size=VOCAB,
        rows=RowMeans(images=1, labels=3.75, painted=0.5, filled=40.5),
        world_size=world_size,
    )


@pytest.fixture
def groups() -> Iterator[ParallelGroups]:
    groups = parallel.initialize(config_of().parallel)
    platform.seed_everything(0, tensor_rank=0)
    yield groups
    parallel.leave()


def real_sizes(groups: ParallelGroups, *options: str) -> dict[str, int]:
    """Sizes of the real model's parameters by name, built whole in this process."""
    (model,) = build_model(config_of(*options).model, geometry=GEOMETRY, vocab_size=VOCAB, groups=groups, seed=0)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


# --- parameters --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], UNTIED, EXTRAS], ids=["tied", "untied", "extras"])
def test_parameters_are_those_of_the_real_model(options: list[str]) -> None:
    """In one process, and over tensor and pipeline ranks: sharded matrices halve, all else stays, nothing is lost."""
    alone = plan_of(*options)
    by_tensor, by_stage = plan_of(*options, *TP2), plan_of(*options, *PP2)
    assert not torch.distributed.is_initialized(), "a plan must leave no process group behind"

    real_groups = parallel.initialize(config_of().parallel)
    real = real_sizes(real_groups, *options)
    parallel.leave()
    total = sum(real.values())
    assert alone.stages[0].parameters == total
    for each in (alone, by_tensor, by_stage):
        assert sum(each.parameters.values()) == total
    assert by_tensor.stages[0].parameters == sum(size // 2 if SHARDED.search(name) else size for name, size in real.items())
    copied = 0 if options == UNTIED else real["embedding.word_embeddings.weight"]
    assert sum(stage.parameters for stage in by_stage.stages) == total + copied


def test_parts() -> None:
    parts = plan_of(*UNTIED).parameters
    assert parts["words"] == 2 * 256 * 32  # 200 words, padded to a multiple of 128
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert parts["backbone"] == 4 * layer + 32
    assert list(parts) == ["backbone", "words", "EmbeddingViT", "projectors", "diffusion head"]
    assert all(parts.values())


def test_stages_and_their_chunks() -> None:
    assert [stage.layers for stage in plan_of(*PP2).stages] == [((1, 2),), ((3, 4),)]
    interleaved = plan_of(*PP2, *VP2)
    assert [stage.layers for stage in interleaved.stages] == [((1,), (3,)), ((2,), (4,))]
    assert interleaved.layout == "TP 1 x PP 2 x DP 1, 2 chunks a stage"
    assert [s.parameters for s in interleaved.stages] == [s.parameters for s in plan_of(*PP2).stages]


def test_13b_on_a_thousand_processes() -> None:
    config = parse_command_line(LARGE).config
    geometry = ImageGeometry(grid_height=16, grid_width=16, channels=16)
    start = time.perf_counter()
    planned = plan(
        config, geometry=geometry, vocab_size=32000, rows=RowMeans(images=1, labels=15, painted=0.5, filled=300), world_size=1024
    )
    assert time.perf_counter() - start < 10
    assert sum(planned.parameters.values()) == pytest.approx(13.1e9, rel=0.01)
    assert planned.parameters["backbone"] == 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120
    assert planned.stages[0].layers == (tuple(range(1, 6)), tuple(range(21, 26)))
    assert planned.microbatches == 32
    # A stage of 10 layers without embedding or heads: all but its norms is split over 8 ranks.
    assert planned.stages[1].parameters == 10 * ((4 * 5120**2 + 3 * 5120 * 13824) // 8 + 2 * 5120)
    assert max(map(len, planned.table().splitlines())) <= 130


def test_nothing_is_allocated() -> None:
    config = parse_command_line(LARGE).config
    for number in (0, 3):
        with stage_on_meta(config, number, geometry=GEOMETRY, vocab_size=32000, world_size=32) as (groups, chunks):
            assert groups.pipeline.rank() == number
            assert groups.tensor.rank() == groups.data.rank() == 0
            tensors = [tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
            assert all(tensor.is_meta for tensor in tensors)


def test_world_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 processes do not divide into replicas of 2"):
        plan_of(*TP2, world_size=3)
    with pytest.raises(ValueError, match="x 16 data-parallel ranks: change one of them"):
        plan_of(world_size=16)


# --- memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_is_that_of_the_engine(dtype: str, average: bool, groups: ParallelGroups) -> None:
    config = config_of("--precision.dtype", dtype, "--optimizer.ema_decay", "0.9" if average else "0")
    model = build_model(config.model, geometry=GEOMETRY, vocab_size=VOCAB, groups=groups, seed=0)
    engine = NativeEngine(config, chunks=model, groups=groups)
    parameters = list(engine.chunks[0].parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters)
    in_model = {p.untyped_storage().data_ptr() for p in parameters}
    kept = [tensor for part in engine.optimizer.chained_optimizers for tensor in optimizer_tensors(part.optimizer)]
    kept += engine.average._averages if engine.average is not None else []
    optimizer = sum(t.numel() * t.element_size() for t in kept if t.untyped_storage().data_ptr() not in in_model)
    expected = Memory.of(sum(p.numel() for p in parameters), dtype=dtype, average=average, data_parallel_size=1)
    assert (weights, gradients, optimizer) == (expected.weights, expected.gradients, expected.optimizer)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The weights it updates and their moments; not the counts of steps, which are scalars."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    return [*weights, *(optimizer.state[p][name] for p in weights for name in ("exp_avg", "exp_avg_sq"))]


def test_optimizer_is_sharded_over_data_parallel_ranks() -> None:
    one, four = plan_of(*TP2).stages[0].memory, plan_of(*TP2, world_size=8).stages[0].memory
    assert (one.weights, one.gradients) == (four.weights, four.gradients)
    assert one.optimizer == 4 * four.optimizer
    assert one.total == one.weights + one.gradients + one.optimizer


# --- the step and the table --------------------------------------------------------------------------------------------------


def test_counts_of_a_step() -> None:
    planned = plan_of(*TP2, world_size=4)
    assert planned.counts.labels == round(16 * 3.75)
    assert planned.counts.masked == round(16 * 0.5 * expected_masked(MaskRatioConfig(), tokens_per_image=16))
    assert (planned.counts.sequences, planned.counts.images) == (16, 16)
    assert planned.tokens == 16 * 40.5
    assert planned.microbatches == 4


def test_recomputation() -> None:
    full = ["--model.backbone.recompute_granularity", "full", "--model.backbone.recompute_num_layers", "1"]
    plain = plan_of(*PP2).flops
    uniform = plan_of(*PP2, *full, "--model.backbone.recompute_method", "uniform").flops
    block = plan_of(*PP2, *full, "--model.backbone.recompute_method", "block").flops
    assert plain.recompute == 0
    assert uniform.recompute == plain.backbone.forward
    assert block.recompute == plain.backbone.forward // 2  # one of the two layers of each stage
    assert uniform.model == block.model == plain.model


def test_table() -> None:
    planned = plan_of(*TP2, *PP2, *VP2, world_size=8)
    table = planned.table()
    assert "TP 2 x PP 2 x DP 2, 2 chunks a stage = 8 processes, fp32" in table
    assert re.search(r"stage 1 +2, 4 +" + f"{planned.stages[1].parameters:,}", table)
    assert f"{sum(planned.parameters.values()):,}" in table
    assert "16 sequences of 48 positions, 84.4% filled: 16 samples, 648 tokens\n  4 microbatches on each" in table
    assert f"the run: 1,000 steps, 16,000 samples, 648,000 tokens, {1000 * planned.flops.model:.3e} FLOPs" in table
    for heading in ("parameters", "FLOPs of a step"):
        block = next(block for block in table.split("\n\n") if block.startswith(heading))
        shares = [float(share) for share in re.findall(r"([\d.]+)%", block)]
        assert len(shares) == 5
        assert sum(shares) == pytest.approx(100, abs=0.3)
