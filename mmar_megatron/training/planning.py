"""A plan of a configured run on its own data."""

from __future__ import annotations

from mmar_megatron.config import Config
from mmar_megatron.data.source import DataSource
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.scaling.expected import RowMeans
from mmar_megatron.scaling.plan import Plan, plan
from mmar_megatron.scaling.split import split_pipeline


def plan_run(config: Config, *, source: DataSource, world_size: int | None, rows: RowMeans | None = None) -> Plan:
    """With the layers divided as `parallel.pipeline_split` says. No process group may exist yet; none is left.

    Args:
        config: the whole configuration, validated.
        source: its data, of which the index is read.
        world_size: processes of the job; None: one replica of the model.
        rows: what the data hold; without, counted here.

    Raises:
        ValueError: the number of processes does not fit the layout and the batch.
    """
    return plan(
        split_pipeline(config, source),
        geometry=ImageGeometry.of(source.codec),
        vocab_size=source.tokenizer.vocab_size,
        rows=rows or RowMeans.of(source, seed=config.seed),
        world_size=world_size,
    )
