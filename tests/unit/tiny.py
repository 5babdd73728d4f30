"""Tiny models and hand-made batches for the tests of model, engine and inference.

Axes: B rows, S positions, D width of the backbone, N tokens of an image, C channels, R noise levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmar_megatron.config import Config
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.sequence import Document, DocumentBuilder, DocumentImage, Text, assemble
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import MMARModel, build_model
from mmar_megatron.parallel import ParallelGroups
from tests.distributed.common import command

N, C, R = 16, 3 * 8**2, 2
VOCAB_SIZE = 400
"""More than the tokenizer of the coarse data has, so that the padding to 512 is seen."""


def config_of(*options: str) -> Config:
    """The tiny model's configuration with further options; its data are never opened."""
    return command(*options, data="nowhere").config


def build_tiny(groups: ParallelGroups, *options: str, seed: int = 1234) -> MMARModel:
    """The tiny model with its initial weights."""
    return model_of(config_of(*options), groups=groups, seed=seed)


def model_of(config: Config, *, groups: ParallelGroups, seed: int = 1234) -> MMARModel:
    """The same, where an engine needs the configuration too."""
    geometry = ImageGeometry(grid_height=4, grid_width=4, channels=C)
    (model,) = build_model(config.model, geometry=geometry, vocab_size=VOCAB_SIZE, groups=groups, seed=seed)
    return model


@torch.no_grad()
def stir(model: torch.nn.Module, *, std: float = 0.1) -> None:
    """Add noise to every parameter: zero and one are the initial values of many, and would hide what those do."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def engine_of(groups: ParallelGroups, *options: str) -> NativeEngine:
    """An engine with a tiny model whose weights are stirred."""
    config = config_of(*options)
    model = model_of(config, groups=groups)
    stir(model)
    return NativeEngine(config, chunks=[model], groups=groups)


def weights(engine: NativeEngine) -> dict[str, Tensor]:
    """Copies of its parameters."""
    return {name: parameter.detach().clone() for name, parameter in engine.chunks[0].module.named_parameters()}


def image(*, seed: int, masked: Sequence[int] = ()) -> DocumentImage:
    """A random image with these tokens masked."""
    generator = np.random.default_rng(seed)
    masked_N = np.zeros(N, dtype=np.bool_)
    masked_N[list(masked)] = True
    return DocumentImage(
        latents_NC=generator.uniform(-1, 1, (N, C)).astype(np.float32),
        masked_N=masked_N,
        timesteps_NR=generator.random((N, R), dtype=np.float32),
        noise_NRC=generator.standard_normal((N, R, C), dtype=np.float32),
    )


class Documents:
    """Documents and batches of them with a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._builder = DocumentBuilder(tokenizer, num_tokens=N, sequence_length=64)

    def text_to_image(self, text: list[int], *, masked: Sequence[int], seed: int = 0) -> Document:
        """A text and an image of which these tokens are to be painted."""
        return self._builder.text_to_image(text, image=image(seed=seed, masked=masked), sample_id=seed)

    def image_to_text(self, text: list[int], *, seed: int = 0) -> Document:
        """An image and the text that tells of it."""
        return self._builder.image_to_text(text, image=image(seed=seed), sample_id=seed)

    def text(self, text: list[int], *, seed: int = 0) -> Document:
        """A text that is learned."""
        return self._builder.content([Text(text, learn=True, end=True)], sample_id=seed)

    def text_batch(self) -> Batch:
        """Two rows of text alone, of which the first leaves more room, and one of padding."""
        return self.batch([[self.text([100, 101, 102])], [self.text(list(range(103, 120)))], []], sequence_length=24)

    def mixed_batch(self) -> Batch:
        """An image of which six tokens are to be painted, and one of which four text tokens tell."""
        painted = self.text_to_image([100, 101], masked=(1, 2, 5, 7, 8, 15), seed=1)
        return self.batch([[painted], [self.image_to_text([100, 101, 102], seed=2)]], sequence_length=32)

    def batch(self, rows: Sequence[Sequence[Document]], *, sequence_length: int) -> Batch:
        """These documents in these rows."""
        return assemble(
            rows,
            sequence_length=sequence_length,
            image_shape=(N, C),
            timestep_multiplier=R,
            pad_id=self.tokenizer.pad_id,
        )


@torch.no_grad()
def hidden_states(model: MMARModel, batch: Batch) -> Tensor:
    """The final hidden states, [B, S, D]."""
    h_SBD = model(batch, return_hidden=True)
    assert isinstance(h_SBD, Tensor)
    return h_SBD.transpose(0, 1)
