"""The expected rows against real draws and the documents of real captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mmar_megatron.config import DataConfig, MaskRatioConfig
from mmar_megatron.data.batch import IGNORE
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.draw import draw_mask, draw_mask_ratio
from mmar_megatron.data.loader import DataSource
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.data.sequence import DocumentImage
from mmar_megatron.scaling.expected import expected_masked, labels_per_caption


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


def test_labels_per_caption(tmp_path: Path) -> None:
    make_shapes(tmp_path / "shapes", codec=PatchCodec(image_size=32, patch_size=8), train=64, validation=16, log=lambda _: None)
    config = DataConfig(path=str(tmp_path / "shapes"), sequence_length=16 + 4 + 21)  # so short that some captions are cut
    config.codec.patch_size = 8
    source = DataSource(config)
    labels, cut = labels_of_documents(source)
    assert 0 < cut < 64
    assert labels_per_caption(source) == pytest.approx(np.mean(labels))


def labels_of_documents(source: DataSource) -> tuple[list[float], int]:
    """Mean labels over the captions of each training sample, counted in the documents that the model would read."""
    nothing = np.zeros((source.codec.num_tokens, source.codec.channels), dtype=np.float32)
    image = DocumentImage(latents_NC=nothing, masked_N=np.zeros(source.codec.num_tokens, dtype=np.bool_))
    reader, labels, cut = source.reader("train"), [], 0
    for number in range(len(reader)):
        texts = [source.tokenizer.encode(text) for text in source.captions(reader.read_or_next(number)[0])]
        documents = [source.builder.image_to_text(text, image=image, sample_id=0) for text in texts]
        labels.append(float(np.mean([count_labels(document.labels_L) for document in documents])))
        cut += any(len(text) > source.builder.max_text for text in texts)
    return labels, cut


def count_labels(labels: Sequence[int]) -> int:
    return sum(label != IGNORE for label in labels)
