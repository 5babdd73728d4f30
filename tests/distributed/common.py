"""What the distributed tests share: a tiny model over tiny data, built in any layout and precision."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch

from mmar_megatron import parallel, platform
from mmar_megatron.config import CommandLine, parse_command_line
from mmar_megatron.config_checks import validate_world
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.engine.base import LossResult, StepResult
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.scaling.split import split_pipeline
from mmar_megatron.training.building import build_engine, build_loader, open_source

MODEL = [
    *("--model.backbone.num_layers", "4", "--model.backbone.hidden_size", "32", "--model.backbone.ffn_hidden_size", "64"),
    *("--model.backbone.num_attention_heads", "4", "--model.backbone.num_query_groups", "2"),
    *("--model.embedding_vit.num_layers", "1", "--model.embedding_vit.hidden_size", "16"),
    *("--model.embedding_vit.num_attention_heads", "2"),
    *("--model.head.depth", "2", "--model.head.width", "24", "--model.head.timestep_multiplier", "2"),
    *("--data.sequence_length", "48", "--data.codec.image_size", "32", "--data.codec.patch_size", "8"),
    *("--data.num_workers", "0", "--data.mask_ratio.minimum", "0.3"),
    *("--train.global_batch_size", "8", "--train.micro_batch_size", "2"),
    *("--optimizer.lr", "1e-2", "--optimizer.warmup_steps", "1", "--optimizer.clip_grad", "1.0"),
]


def make_data(directory: Path) -> Path:
    """A small shapes data set with 8-pixel patches."""
    make_shapes(directory, codec=PatchCodec(image_size=32, patch_size=8), train=64, validation=16, log=lambda _: None)
    return directory


def command(*options: str, data: str | Path) -> CommandLine:
    """The tiny model's command line with further options."""
    return parse_command_line([*MODEL, "--data.path", str(data), *options])


def build(line: CommandLine) -> tuple[NativeEngine, TrainLoader, parallel.ParallelGroups]:
    """Engine and loader in the layout of the configuration."""
    config = line.config
    validate_world(config, world_size=platform.world_size())
    groups = parallel.initialize(config.parallel)
    platform.seed_everything(config.seed, tensor_rank=groups.tensor.rank())
    source = open_source(config)
    config = split_pipeline(config, source)
    return build_engine(config, source=source, groups=groups), build_loader(config, source=source, groups=groups), groups


def train(engine: NativeEngine, batches: Iterable, *, steps: int, microbatches: int, lr: float = 3e-3) -> list[StepResult]:
    """Results of some steps."""
    iterator = iter(batches)
    results = [engine.train_step(list(islice(iterator, microbatches)), learning_rate=lr) for _ in range(steps)]
    assert_same_verdicts(results)
    return results


def assert_same_verdicts(results: list[StepResult]) -> None:
    """What steps are judged by must be the same on all ranks to the last bit."""
    own = torch.tensor([[result.loss, result.grad_norm] for result in results], dtype=torch.float64)
    least, most = own.clone(), own.clone()
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    assert torch.equal(least, most)


def means(result: LossResult) -> dict[str, float]:
    """The figures that any layout must agree on."""
    figures = {
        "text": float(result.sums.text / result.counts.text),
        "image": float(result.sums.image / result.counts.image),
        "image_zero": float(result.sums.image_zero / result.counts.image),
        "rows": float(result.sums.count_by_timestep.sum()),
    }
    return figures | ({"loss": result.loss, "grad_norm": result.grad_norm} if isinstance(result, StepResult) else {})
