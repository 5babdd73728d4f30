"""From the configuration to its parts: an engine that holds the model, and the loader that feeds it."""

from __future__ import annotations

from mmar_megatron import platform
from mmar_megatron.config import Config
from mmar_megatron.data.loader import DataSource, TrainLoader
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import build_model
from mmar_megatron.parallel import ParallelGroups


def build_engine(config: Config, *, source: DataSource, groups: ParallelGroups) -> NativeEngine:
    """The model with its initial weights, of the sizes that the data ask for, in the engine that will train it."""
    model = build_model(
        config.model,
        geometry=ImageGeometry.of(source.codec),
        vocab_size=source.tokenizer.vocab_size,
        groups=groups,
        seed=config.seed,
    )
    return NativeEngine(config, chunks=model, groups=groups)


def build_loader(config: Config, *, groups: ParallelGroups, start_sample: int = 0) -> TrainLoader:
    """This rank's share of the training stream, from the sample on that follows `start_sample` others."""
    return TrainLoader(
        config.data,
        seed=config.seed,
        timestep_multiplier=config.model.head.timestep_multiplier,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        data_parallel_rank=groups.data.rank(),
        data_parallel_size=groups.data.size(),
        start_sample=start_sample,
        pin_memory=platform.HAS_CUDA,
    )
