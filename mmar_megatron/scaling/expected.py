"""What an average step is: rows that each part of the model sees, and their operations; from the configuration and the index.

N tokens of an image.
"""

from __future__ import annotations

from statistics import NormalDist, fmean

from mmar_megatron.config import Config, MaskRatioConfig
from mmar_megatron.data.loader import DataSource
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


def expected_counts(config: Config, *, tokens_per_image: int, labels_per_caption: float) -> StepCounts:
    """Rows that each part sees in an average step, from the configured shares of tasks and mask ratios.

    Args:
        tokens_per_image: N.
        labels_per_caption: text tokens to be learned in each image-to-text sample.
    """
    tasks, samples = config.data.tasks, config.train.global_batch_size
    captioned = tasks.image_to_text / (tasks.text_to_image + tasks.image_to_text + tasks.image_only)
    return StepCounts(
        sequences=samples,
        sequence_length=config.data.sequence_length,
        images=samples,
        labels=round(samples * captioned * labels_per_caption),
        masked=round(samples * (1 - captioned) * expected_masked(config.data.mask_ratio, tokens_per_image=tokens_per_image)),
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


def labels_per_caption(source: DataSource) -> float:
    """Mean number of text tokens to be learned in an image-to-text sample of the training split, from the index alone.

    As the loader draws: each sample, each configured language it has, and each caption in that are equally likely. A caption
    that fits is learned with its <eos>; a longer one is cut, and has none.
    """
    longest = source.builder.max_text
    means = []
    for shard in source.index.shards:
        if shard.split == "train":
            for lengths in shard.caption_tokens:
                of_languages = [lengths[language] for language in source.config.languages if language in lengths]
                means.append(fmean(fmean(n + 1 if n <= longest else longest for n in captions) for captions in of_languages))
    return fmean(means)
