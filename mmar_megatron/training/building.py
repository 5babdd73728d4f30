"""From the configuration to its parts: an engine that holds the model, and the loader that feeds it."""

from __future__ import annotations

from contextlib import nullcontext

from mmar_megatron import platform
from mmar_megatron.config import Config
from mmar_megatron.config_checks import validate_machine
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.data.prepare import ensure_data
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.stream import StreamState
from mmar_megatron.engine.base import Engine
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import build_model
from mmar_megatron.model.tensor_overlap import prepare_overlap
from mmar_megatron.parallel import ParallelGroups


def open_source(config: Config) -> DataSource:
    """The data, with the teacher's features where the model is aligned with them."""
    source = DataSource(config.data, teacher=config.model.alignment_loss_weight > 0)
    if source.teacher_features not in (0, config.model.alignment_features):
        raise ValueError(
            f"model.alignment_features is {config.model.alignment_features}, but the teacher's features in the data are "
            f"{source.teacher_features} wide: change the former."
        )
    return source


def open_data(config: Config, *, groups: ParallelGroups | None = None) -> DataSource:
    """The same; data that can be generated and are not there are made first, by the main process while the others wait.

    Args:
        config: the whole configuration.
        groups: None: this process is the only one.
    """
    with groups.main_process_first() if groups is not None else nullcontext():
        ensure_data(config.data)
    return open_source(config)


def build_engine(config: Config, *, source: DataSource, groups: ParallelGroups) -> Engine:
    """The model with its initial weights, of the sizes that the data ask for, in the engine that will train it.

    Raises:
        ValueError: this machine cannot compute what is asked for.
    """
    validate_machine(config, compute_capability=platform.compute_capability())
    model = build_model(
        config.model,
        geometry=ImageGeometry.of(source.codec),
        vocab_size=source.tokenizer.vocab_size,
        groups=groups,
        seed=config.seed,
    )
    if config.model.backbone.tp_comm_overlap:
        prepare_overlap(config.model.backbone, positions=config.train.micro_batch_size * config.data.sequence_length)
    if config.engine == "native":
        return NativeEngine(config, chunks=model, groups=groups)
    from mmar_megatron.engine.deepspeed import DeepSpeedEngine  # here, since it takes seconds

    (whole,) = model
    return DeepSpeedEngine(config, model=whole, groups=groups)


def build_loader(config: Config, *, source: DataSource, groups: ParallelGroups, state: StreamState | None = None) -> TrainLoader:
    """This rank's share of the training stream, from where it was left on."""
    return TrainLoader(
        source,
        seed=config.seed,
        timestep_multiplier=config.model.head.timestep_multiplier,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        data_parallel_rank=groups.data.rank(),
        data_parallel_size=groups.data.size(),
        state=state,
        pin_memory=platform.HAS_CUDA,
    )
