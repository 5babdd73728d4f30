"""The expected rows against real draws and the documents of real captions."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mmar_megatron.config import DataConfig, MaskRatioConfig, SourceConfig
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.draw import draw_mask, draw_mask_ratio
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.data.source import DataSource
from mmar_megatron.scaling.expected import RowMeans, expected_masked


@pytest.mark.parametrize(
    "ratio",
    [
        MaskRatioConfig(),
        MaskRatioConfig(minimum=0.0),
        MaskRatioConfig(distribution="uniform", minimum=0.0),
        MaskRatioConfig(distribution="uniform", minimum=0.33),
        MaskRatioConfig(minimum=1.0),
    ],
    ids=["stage 1", "stage 2", "uniform", "uniform from 0.33", "all"],
)
def test_expected_masked(ratio: MaskRatioConfig) -> None:
    generator = np.random.default_rng(0)
    draws = 40_000
    masked = [draw_mask(generator, num_tokens=20, ratio=draw_mask_ratio(generator, ratio)).sum() for _ in range(draws)]
    error = np.std(masked) / draws**0.5
    assert expected_masked(ratio, tokens_per_image=20) == pytest.approx(np.mean(masked), abs=4 * error + 1e-9)


@pytest.mark.parametrize("packing", [False, True])
def test_row_means_are_those_of_the_stream(tmp_path: Path, packing: bool) -> None:
    make_shapes(tmp_path / "shapes", codec=PatchCodec(image_size=32, patch_size=8), train=64, validation=16, log=lambda _: None)
    length = (16 + 4 + 21) * (3 if packing else 1)  # unpacked, it is so short that some captions are cut
    config = DataConfig(path=str(tmp_path / "shapes"), sequence_length=length, packing=packing, packing_window=100, num_workers=0)
    config.codec.patch_size = 8
    source = DataSource(config)
    rows = len(source.planner(seed=1).window(0, places={}).rows)
    loader = TrainLoader(source, seed=1, timestep_multiplier=1, micro_batch_size=1, global_batch_size=1)
    batches = list(islice(loader, rows))
    means = RowMeans.of(source, seed=1)
    assert means.labels == pytest.approx(np.mean([batch.num_labels for batch in batches]))
    assert means.images == pytest.approx(np.mean([len(batch.latents_MNC) for batch in batches]))
    assert means.painted == pytest.approx(np.mean([batch.masked_MN.any(dim=1).sum() for batch in batches]))
    assert means.filled == pytest.approx(np.mean([(batch.document_ids_BS >= 0).sum() for batch in batches]))
    assert (loader.state.documents, loader.state.tokens) == (100, round(rows * means.filled))
    assert means.cut == loader.counts["data"].truncated / 100
    assert packing or loader.counts["data"].truncated > 0


def test_epochs_are_by_weight_where_a_window_is_small(tmp_path: Path) -> None:
    make_shapes(tmp_path / "shapes", codec=PatchCodec(image_size=32, patch_size=4), train=64, validation=16, log=lambda _: None)
    sources = {name: SourceConfig(path=str(tmp_path / "shapes"), weight=weight) for name, weight in {"a": 3, "b": 1}.items()}
    means = RowMeans.of(DataSource(DataConfig(sources=sources, packing_window=1)), seed=1)
    assert means.epochs == {"a": 0.75 / 64, "b": 0.25 / 64}
