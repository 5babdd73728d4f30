"""What an average step is: rows that each part of the model sees, and their operations; from the configuration and the index.

N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

from mmar_megatron.config import Config, MaskRatioConfig
from mmar_megatron.data.source import DataSource
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import padded_vocab_size
from mmar_megatron.scaling.flops import ModelShape, StepCounts, StepFlops, step_flops


def expected_flops(config: Config, counts: StepCounts, *, geometry: ImageGeometry, vocab_size: int) -> StepFlops:
    """Operations of such a step, over all devices and without recomputation.

    Args:
        geometry: grid and channels of the image codec.
        vocab_size: of the tokenizer.
    """
    shape = ModelShape.of(
        config.model,
        vocab_size=padded_vocab_size(config.model, vocab_size),
        tokens_per_image=geometry.grid_height * geometry.grid_width,
        token_channels=geometry.channels,
        condition_width=config.model.head.width,
    )
    return step_flops(shape, counts)


@dataclass(frozen=True, kw_only=True)
class RowMeans:
    """What an average row of the training stream holds."""

    images: float
    labels: float
    """Text tokens to be learned."""
    painted: float
    """Images to be painted."""
    filled: float
    """Positions that hold a document."""
    documents: float = 1.0
    cut: float = 0.0
    """Share of the documents that are too long, and lose their end."""
    epochs: Mapping[str, float] = field(default_factory=dict)
    """Of each source, by its name."""

    @classmethod
    def of(cls, source: DataSource, *, seed: int) -> RowMeans:
        """Over the first window of the stream, from the index alone."""
        window = source.planner(seed=seed).window(0, places={})
        sums = {"images": window.images_D, "labels": window.labels_D, "painted": window.painted_D, "filled": window.length_D}
        documents = len(window.source_D) / len(window.rows)
        weights = sum(opened.weight for opened in source.sets)
        return cls(
            **{name: float(of_documents.sum() / len(window.rows)) for name, of_documents in sums.items()},
            documents=documents,
            cut=float(window.cut_D.mean()),
            # By the weights: a small window may have nothing of a source.
            epochs={opened.name: documents * opened.weight / weights / opened.index.count("train") for opened in source.sets},
        )


@dataclass(frozen=True, kw_only=True)
class FullestRow:
    """The most that rows of the training stream hold of each, though hardly one holds all: what memory must be there for."""

    images: int
    labels: int
    painted: int

    @classmethod
    def of(cls, source: DataSource, *, seed: int) -> FullestRow:
        """Over the first window of the stream, from the index alone."""
        window = source.planner(seed=seed).window(0, places={})
        sums = {"images": window.images_D, "labels": window.labels_D, "painted": window.painted_D}
        return cls(**{name: max(int(of_documents[row].sum()) for row in window.rows) for name, of_documents in sums.items()})


def expected_counts(config: Config, *, tokens_per_image: int, rows: RowMeans) -> StepCounts:
    """Rows that each part sees in an average step.

    Args:
        tokens_per_image: N.
        rows: what the data hold.
    """
    sequences = config.train.global_batch_size
    masked = rows.painted * expected_masked(config.data.mask_ratio, tokens_per_image=tokens_per_image)
    return StepCounts(
        sequences=sequences,
        sequence_length=config.data.sequence_length,
        images=round(sequences * rows.images),
        labels=round(sequences * rows.labels),
        masked=round(sequences * masked),
    )


def expected_masked(config: MaskRatioConfig, *, tokens_per_image: int) -> float:
    """Mean number of masked tokens of an image that is painted, exactly.

    max(1, ceil(r N)) exceeds k in 1 .. N - 1 just where r > k / N, so its mean is 1 + the sum over k of P(r > k / N).
    """
    shares = [k / tokens_per_image for k in range(1, tokens_per_image)]
    return 1 + sum(1.0 if share < config.minimum else _share_above(share, config) for share in shares)


def _share_above(ratio: float, config: MaskRatioConfig) -> float:
    """P(r > ratio) for a ratio in [minimum, 1)."""
    if config.distribution == "uniform":
        return (1 - ratio) / (1 - config.minimum)
    normal = NormalDist(config.mean, config.std)
    return (normal.cdf(1.0) - normal.cdf(ratio)) / (normal.cdf(1.0) - normal.cdf(config.minimum))
