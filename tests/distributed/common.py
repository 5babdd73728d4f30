"""What the distributed tests share: a tiny model over tiny data, built in any layout and precision."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
import yaml
from torch import Tensor

from mmar_megatron import parallel, platform
from mmar_megatron.config import CommandLine, parse_command_line
from mmar_megatron.config_checks import validate_world
from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.engine.base import Engine, LossResult, StepResult
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.scaling.split import split_pipeline
from mmar_megatron.training.building import build_engine, build_loader, open_source
from tests.unit.data.mixes import write_talks

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


CODEC = PatchCodec(image_size=32, patch_size=8)


def make_data(directory: Path) -> Path:
    """A small shapes data set with 8-pixel patches."""
    make_shapes(directory, codec=CODEC, train=64, validation=16, log=lambda _: None)
    return directory


def command(*options: str, data: str | Path) -> CommandLine:
    """The tiny model's command line with further options."""
    return parse_command_line([*MODEL, "--data.path", str(data), *options])


def build(line: CommandLine) -> tuple[NativeEngine, TrainLoader, parallel.ParallelGroups]:
    """The native engine, and a loader, in the layout of the configuration."""
    engine, loader, groups = build_any(line)
    assert isinstance(engine, NativeEngine)
    return engine, loader, groups


def build_any(line: CommandLine) -> tuple[Engine, TrainLoader, parallel.ParallelGroups]:
    """Engine and loader in the layout of the configuration."""
    config = line.config
    validate_world(config, world_size=platform.world_size())
    groups = parallel.initialize(config.parallel)
    platform.seed_everything(config.seed, tensor_rank=groups.tensor.rank())
    source = open_source(config)
    config = split_pipeline(config, source)
    engine = build_engine(config, source=source, groups=groups)
    return engine, build_loader(config, source=source, groups=groups), groups


def mix(data: Path) -> Path:
    """Beside it, texts and conversations with the same tokenizer; returns a configuration that packs both."""
    talks = write_talks(data.with_name("talks"), tokenizer=data, codec=CODEC)
    sources = {"pictures": {"path": str(data), "weight": 2.0}, "talks": {"path": str(talks)}}
    settings = {"sources": sources, "packing": True, "packing_window": 64, "sequence_length": 128}
    file = data.with_name("mix.yaml")
    file.write_text(yaml.safe_dump({"data": settings}))
    return file


def one_document_a_row(batch: Batch) -> Batch:
    """The same documents, each in a row of its own; the images stay in their slots."""
    length = batch.tokens_BS.shape[1]
    fill = {"tokens_BS": int(batch.tokens_BS[0, -1]), "labels_BS": IGNORE, "document_ids_BS": -1, "span_ids_BS": -1}
    columns: dict[str, list[Tensor]] = {name: [] for name in (*fill, "position_ids_BS")}
    positions_MN = batch.image_positions_MN.clone()
    for b, ids_S in enumerate(batch.document_ids_BS):
        for d in range(int(ids_S.max()) + 1):
            (inside,) = torch.where(ids_S == d)
            begin, end = int(inside[0]), int(inside[-1]) + 1
            moved_MN = (batch.image_positions_MN >= b * length + begin) & (batch.image_positions_MN < b * length + end)
            positions_MN[moved_MN] += (len(columns["tokens_BS"]) - b) * length - begin
            for name, rows in columns.items():
                row = torch.full((length,), fill.get(name, 0))
                row[: end - begin] = getattr(batch, name)[b, begin:end]
                rows.append(row)
    return batch.changed(image_positions_MN=positions_MN, **{name: torch.stack(rows) for name, rows in columns.items()})


def train(engine: Engine, batches: Iterable, *, steps: int, microbatches: int, lr: float = 3e-3) -> list[StepResult]:
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
