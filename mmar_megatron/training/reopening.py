"""A run of any layout and machine, in one process of this one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmar_megatron import parallel, platform
from mmar_megatron.config import Config, parse_command_line
from mmar_megatron.data.source import DataSource
from mmar_megatron.engine.base import Engine
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training import checkpoint
from mmar_megatron.training.building import build_engine, open_source

ON_ANY_MACHINE = (
    *("--model.attention", "dense", "--model.backbone.transformer_impl", "local"),
    *("--precision.fp8", "off", "--model.backbone.first_last_layers_bf16", "false"),
)
"""Options that leave out of a configuration what only GPUs compute."""
_IN_ONE_PROCESS = (
    *("--parallel.tensor_model_parallel_size", "1", "--parallel.pipeline_model_parallel_size", "1"),
    *("--parallel.virtual_pipeline_model_parallel_size", "null", "--parallel.sequence_parallel", "false"),
    *("--parallel.pipeline_split", "even", "--model.backbone.pipeline_model_parallel_layout", "null"),
    *("--model.backbone.num_layers_in_first_pipeline_stage", "null"),
    *("--model.backbone.num_layers_in_last_pipeline_stage", "null"),
    *("--engine", "native", "--model.backbone.account_for_embedding_in_pipeline_split", "false"),
    *("--model.backbone.account_for_loss_in_pipeline_split", "false"),
)


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """A trained run, ready to compute."""

    config: Config
    engine: Engine
    source: DataSource
    groups: ParallelGroups


def one_process(config_yaml: Path, *options: str) -> Config:
    """The run's configuration with further options, in the layout of one process, as any machine can compute it."""
    return parse_command_line(["--config", str(config_yaml), *_IN_ONE_PROCESS, *ON_ANY_MACHINE, *options]).config


def reopen(path: Path, *options: str, average: bool = False) -> Reopened:
    """The weights of a checkpoint, in an engine of this one process.

    Args:
        path: of the checkpoint itself, as `checkpoint.resolve` finds it.
        options: of pretrain_mmar.py, over those of the run.
        average: take the moving average of the weights in their place.

    Raises:
        ValueError: the checkpoint and its data do not go together, or lack what is asked for.
        OSError: something cannot be read.
    """
    config = one_process(path / checkpoint.CONFIG, *options)
    groups = parallel.initialize(config.parallel)
    platform.seed_everything(config.seed, tensor_rank=0)
    source = open_source(config)
    checkpoint.check_fingerprints(path, source.fingerprints)
    engine = build_engine(config, source=source, groups=groups)
    checkpoint.load_weights(engine, path, average=average)
    return Reopened(config=config, engine=engine, source=source, groups=groups)
