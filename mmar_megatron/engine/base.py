"""What the trainer asks of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmar_megatron.config import EngineName
from mmar_megatron.data.batch import Batch
from mmar_megatron.model.key_values import KeyValueCache
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
        counts = [(batch.num_labels, batch.num_masked, batch.num_aligned) for batch in batches]
        device = batches[0].tokens_BS.device
        # Filled there: a number that is copied to a GPU would hold up the host.
        text, image, alignment = (torch.full((), float(sum(of_one)), device=device) for of_one in zip(*counts, strict=True))
        return cls(text=text, image=image, alignment=alignment)

    @classmethod
    def from_tensor(cls, stacked: Tensor) -> Counts:
        """Undo of `to_tensor`."""
        return cls(text=stacked[0], image=stacked[1], alignment=stacked[2])

    def to_tensor(self) -> Tensor:
        """[3]."""
        return torch.stack((self.text, self.image, self.alignment))


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """Sums over the whole step or validation, alike on all ranks."""

    sums: LossSums
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class StepResult(LossResult):
    """Of a step that was to be learned from; alike on all ranks but for `work_s`."""

    loss: float
    """The weighted sum that is minimised."""
    grad_norm: float
    """Before clipping."""
    skipped: str | None
    """Why no weight was touched; None where all was well."""
    work_s: float
    """Seconds of this rank's forward and backward passes, up to where gradients are reduced over the data-parallel ranks. The
    ranks of one replica wait for each other within, so theirs are about alike. Under ZeRO up to the last backward pass: from
    stage 2 on those before it reduce too, and ranks wait there."""


Judge = Callable[[float, float], str | None]
"""Of a step's loss and gradient norm, which are the same on all ranks: why the step must not be taken, or None."""


def finite(loss: float, grad_norm: float) -> str | None:
    """The least that is asked of a step: one that is not finite would end in the weights, and stay there."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    return f"the loss is {loss:.4g}, the gradient norm {grad_norm:.4g}"


class Engine(Protocol):
    """One way to run the model and its optimizer over the processes."""

    name: EngineName

    def train_step(self, microbatches: Sequence[Batch], *, learning_rate: float, judge: Judge = finite) -> StepResult:
        """Forward, backward, reduce, clip, update, with this rank's microbatches of one global batch.

        A step for which `judge` has a reason leaves weights and optimizer as they were, on all ranks.
        """

    def parameters_and_gradients(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Of this rank: name, weights, and what the last step left in the gradient buffer, if it is kept, for reports."""

    def evaluate(self, microbatches: Sequence[Batch]) -> LossResult:
        """Loss sums without learning."""

    def hidden_states(self, batch: Batch, *, cache: KeyValueCache | None = None) -> Tensor | None:
        """Final hidden states [S, B, D] on the last pipeline stage, None on the others. For generation.

        The cache holds, on each rank, keys and values of its layers for what stands before the batch's rows; see `commit`.
        """

    def evaluating(self) -> AbstractContextManager[None]:
        """Within, the model is in evaluation mode, its parameters complete, and no gradients are kept."""

    @property
    def last_stage(self) -> MMARModel | None:
        """The model chunk that holds the heads, where it is on this rank."""

    @property
    def models(self) -> Sequence[MMARModel]:
        """The model chunks of this rank."""

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the weights is kept."""

    def sharded_state_dict(self, *, is_loading: bool = False, average: bool = True) -> dict[str, Any]:
        """Model, optimizer and (with `average`, where there is one) moving average, as megatron-core's sharded tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was loaded into `sharded_state_dict(is_loading=True)`; an average that is not in it begins anew."""

    def load_weights(self, state: dict[str, Any]) -> None:
        """What was loaded into `model_sharded_state_dict`, be it all or a part; the optimizer starts anew."""

    def close(self) -> None:
        """Let go of what the engine holds beside the model; it is of no use afterwards."""

    def model_sharded_state_dict(self, *, average: bool = False) -> dict[str, Any]:
        """The model's part of `sharded_state_dict`; with `average` it reads the average into the weights."""
