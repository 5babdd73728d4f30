"""What the trainer asks of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmar_megatron.data.batch import Batch
from mmar_megatron.model.losses import LossSums
from mmar_megatron.model.mmar_model import MMARModel


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of tokens in the losses, over all microbatches and data-parallel ranks of a step; float32 scalars on the device."""

    text: Tensor
    image: Tensor
    alignment: Tensor

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Counts:
        """Of these microbatches alone."""
        counts = [torch.stack((b.num_labels, b.num_masked, b.num_aligned)) for b in batches]
        return cls.from_tensor(torch.stack(counts).sum(dim=0).float())

    @classmethod
    def from_tensor(cls, stacked: Tensor) -> Counts:
        """Undo of `to_tensor`."""
        return cls(text=stacked[0], image=stacked[1], alignment=stacked[2])

    def to_tensor(self) -> Tensor:
        """[3]."""
        return torch.stack((self.text, self.image, self.alignment))


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Sums over the whole step or validation, alike on all ranks."""

    sums: LossSums
    counts: Counts
    grad_norm: float | None = None
    """Before clipping; None where nothing was learned."""
    skipped: bool = False
    """The gradient was not finite, so no weight was touched."""


class Engine(Protocol):
    """One way to run the model and its optimizer over the processes."""

    def train_step(self, microbatches: Sequence[Batch], *, learning_rate: float) -> StepResult:
        """Forward, backward, reduce, clip, update, with this rank's microbatches of one global batch."""

    def evaluate(self, microbatches: Sequence[Batch]) -> StepResult:
        """Loss sums without learning."""

    def hidden_states(self, batch: Batch) -> Tensor | None:
        """Final hidden states [S, B, D] on the last pipeline stage, None on the others. For generation."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Within, the model is in evaluation mode, its parameters complete, and no gradients are kept."""

    @property
    def last_stage(self) -> MMARModel | None:
        """The model chunk that holds the heads, where it is on this rank."""

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the weights is kept."""

    def sharded_state_dict(self, *, is_loading: bool = False, average: bool = True) -> dict[str, Any]:
        """Model, optimizer and (with `average`, where there is one) moving average, as megatron-core's sharded tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was loaded into `sharded_state_dict(is_loading=True)`; an average that is not in it begins anew."""

    def load_weights(self, state: dict[str, Any]) -> None:
        """What was loaded into `model_sharded_state_dict`, be it all or a part; the optimizer starts anew."""

    def model_sharded_state_dict(self, *, average: bool = False) -> dict[str, Any]:
        """The model's part of `sharded_state_dict`; with `average` it reads the average into the weights."""
