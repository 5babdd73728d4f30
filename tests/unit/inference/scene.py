"""A tiny model in its engine, with the data source that goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.source import DataSource
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.key_values import KeyValueCache
from mmar_megatron.model.mmar_model import MMARModel, build_model
from mmar_megatron.parallel import ParallelGroups
from tests.distributed.common import command
from tests.unit.tiny import stir


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What `paint` and `caption` need."""

    engine: NativeEngine
    model: MMARModel
    source: DataSource
    groups: ParallelGroups


def build_scene(data: Path, groups: ParallelGroups, *options: str) -> Scene:
    """Random weights, larger than the initial ones, so that conditions matter."""
    config = command(*options, data=data).config
    source = DataSource(config.data)
    geometry, vocab_size = ImageGeometry.of(source.codec), source.tokenizer.vocab_size
    (model,) = build_model(config.model, geometry=geometry, vocab_size=vocab_size, groups=groups, seed=config.seed)
    stir(model)
    engine = NativeEngine(config, chunks=[model], groups=groups)
    return Scene(engine=engine, model=model, source=source, groups=groups)


class Batches:
    """Records every batch that the backbone is run on."""

    def __init__(self, engine: NativeEngine) -> None:
        self.seen: list[Batch] = []
        self._engine, self._run = engine, engine.hidden_states

    def __enter__(self) -> list[Batch]:
        def record(batch: Batch, *, cache: KeyValueCache | None = None) -> Tensor | None:
            self.seen.append(batch)
            return self._run(batch, cache=cache)

        self._engine.hidden_states = record  # type: ignore[method-assign]
        return self.seen

    def __exit__(self, *_: object) -> None:
        self._engine.hidden_states = self._run  # type: ignore[method-assign]
