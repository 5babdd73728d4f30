"""A model of given sizes without any data, on one process, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmar_megatron import parallel, platform
from mmar_megatron.config import Config, MaskRatioConfig, parse_command_line
from mmar_megatron.config_checks import validate_world
from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.draw import draw_mask, draw_mask_ratio
from mmar_megatron.data.sequence import Document, DocumentImage, PlacedImage, assemble
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import MMARModel, build_model
from mmar_megatron.parallel import ParallelGroups

_SIZES = (
    *("--model.backbone.num_layers", "1", "--model.backbone.hidden_size", "1024"),
    *("--model.backbone.num_attention_heads", "16", "--precision.dtype", "bf16" if platform.HAS_CUDA else "fp32"),
)
"""Of the backbone, where the options say nothing."""


def sized(options: Sequence[str]) -> tuple[Config, ParallelGroups]:
    """The configuration of these options, which need not name a backbone, and the groups of the one process.

    Raises:
        ValueError: there are several.
    """
    if platform.world_size() > 1:
        raise ValueError("parts of a step are measured on one process: start this one without torchrun")
    config = parse_command_line([*_SIZES, *options]).config
    validate_world(config, world_size=1)
    groups = parallel.initialize(config.parallel)
    platform.seed_everything(config.seed, tensor_rank=0)
    return config, groups


def stirred_model(config: Config, *, groups: ParallelGroups, channels: int = 16, vocab_size: int = 128) -> MMARModel:
    """A model whose head predicts something: it begins at zero, and products with zeros are not what training computes."""
    (model,) = build_model(
        config.model,
        geometry=ImageGeometry(grid_height=1, grid_width=1, channels=channels),
        vocab_size=vocab_size,
        groups=groups,
        seed=config.seed,
    )
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for parameter in model.diffusion_head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.to(platform.device())


def synthetic_batch(
    *,
    rows: int,
    documents: int = 1,
    text: int,
    image_tokens: int,
    channels: int = 1,
    levels: int = 1,
    mask_ratio: MaskRatioConfig,
    length: int | None = None,
    seed: int,
) -> Batch:
    """Rows of documents, each a text whose tokens are learned, then an image whose masked tokens are; on this device.

    Args:
        rows: B.
        documents: in each row.
        text, image_tokens: of each document.
        channels, levels: C and R.
        mask_ratio: how much of each image is masked.
        length: of a row, S; none: that of its documents.
        seed: of all that is drawn.
    """
    generator = np.random.default_rng(seed)

    def document() -> Document:
        image = DocumentImage(
            latents_NC=generator.standard_normal((image_tokens, channels), dtype=np.float32),
            masked_N=draw_mask(generator, num_tokens=image_tokens, ratio=draw_mask_ratio(generator, mask_ratio)),
            timesteps_NR=generator.random((image_tokens, levels), dtype=np.float32),
            noise_NRC=generator.standard_normal((image_tokens, levels, channels), dtype=np.float32),
        )
        tokens = generator.integers(100, size=text + 1).tolist()
        return Document(
            sample_id=0,
            tokens_L=[*tokens[:text], *[0] * image_tokens],
            labels_L=[*tokens[1:], *[IGNORE] * image_tokens],
            images=[PlacedImage(text, image)],
        )

    return assemble(
        [[document() for _ in range(documents)] for _ in range(rows)],
        sequence_length=length or documents * (text + image_tokens),
        image_shape=(image_tokens, channels),
        timestep_multiplier=levels,
        pad_id=0,
    ).to(platform.device())
