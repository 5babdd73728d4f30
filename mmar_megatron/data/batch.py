"""The one form in which data reaches the model: a microbatch, fixed in shape but for the number of its images.

Axes: B sequences, S positions, K documents of the row that has most, M image slots (one at least, which may be empty), N tokens
of an image, C channels of a token, R noise levels for each token (the timestep multiplier), F features of the alignment teacher.
Rows that are learned: L labelled positions, P masked tokens to be predicted, V visible tokens with features of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position whose next token is not to be learned."""
LEARNED = ("labelled_L", "masked_P", "aligned_V")
"""Names of what a batch says of labels and masks in the form that the losses need."""


@dataclass(kw_only=True)
class Batch:
    """One microbatch. All randomness of training is in here, a function of (seed, sample id, epoch): no layout changes it."""

    tokens_BS: Tensor
    """int64: text and special tokens; the image placeholder at each image position; padding at the end."""
    labels_BS: Tensor
    """int64: the token that follows, where it is to be learned; else `IGNORE`."""
    position_ids_BS: Tensor
    """int64: position within the document, from 0."""
    document_ids_BS: Tensor
    """int64: which document of the row; -1 on padding. There is no attention between documents."""
    span_ids_BS: Tensor
    """int64: which image of the row, from 0; -1 on text. Attention is bidirectional within a span."""

    latents_MNC: Tensor
    """float32: clean image tokens in raster order; 0 in an empty slot."""
    image_positions_MN: Tensor
    """int64: where each image token stands, as b * S + s; -1 where it stands nowhere, as all of an empty slot, which are neither
    visible nor masked. Images that stand in k places have k M rows here: all of the first place, then of the second, ..."""
    visible_MN: Tensor
    """bool: the token is read, through EmbeddingViT."""
    masked_MN: Tensor
    """bool: the token is hidden and to be predicted. Image positions that are not visible carry the mask embedding."""
    timesteps_MNR: Tensor
    """float32 in [0, 1): the noise level as a share of the schedule's length."""
    noise_MNRC: Tensor
    """float32: standard normal."""
    teacher_MNF: Tensor | None = None
    """float32: features of a frozen vision model for clean images, where the shards hold them."""

    sample_ids_BK: Tensor
    """int64: id of the sample that each document was made of, for reports; -1 where a row has no further document."""

    labelled_L: Tensor
    """int64: the positions that have a label, as s * B + b, in this order."""
    masked_P: Tensor
    """int64: the masked tokens, as m * N + n."""
    aligned_V: Tensor
    """int64: the visible tokens that have features of the teacher, as m * N + n.

    These three say again what labels and masks say, in the form that the losses need. They are found where the batch is made: the
    host would wait for a GPU that is asked how many there are."""

    causal: bool = False
    """No row has an image, or more than one document: attention in causal order is the mixed attention. The host has to know it
    before the device does, so it is said where the batch is made. What a position of padding then sees is no matter."""

    @classmethod
    def of(cls, *, causal: bool = False, **tensors: Tensor) -> Batch:
        """The batch that has these; what is learned of it is found here, and must not be known to the device alone."""
        return cls(**tensors, **_learned(tensors), causal=causal)

    def changed(self, **tensors: Tensor) -> Batch:
        """The same batch with other labels or masks."""
        changed: dict[str, Any] = tensors | _learned(self._tensors() | tensors)
        return replace(self, **changed)

    @property
    def num_labels(self) -> int:
        """Number of text tokens in the loss."""
        return len(self.labelled_L)

    @property
    def num_masked(self) -> int:
        """Number of image tokens in the loss."""
        return len(self.masked_P)

    @property
    def num_aligned(self) -> int:
        """Number of image tokens in the alignment loss."""
        return len(self.aligned_V)

    def without_losses(self) -> Batch:
        """The same batch with nothing to learn: filler where a number of microbatches is wanted."""
        nothing_MN, no_rows = torch.zeros_like(self.masked_MN), self.labelled_L[:0]
        return replace(
            self,
            labels_BS=torch.full_like(self.labels_BS, IGNORE),
            visible_MN=nothing_MN,
            masked_MN=nothing_MN,
            labelled_L=no_rows,
            masked_P=no_rows,
            aligned_V=no_rows,
        )

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader where the batch goes to a GPU."""
        return self._map(Tensor.pin_memory)

    def __reduce__(self) -> tuple[Any, ...]:
        # Each tensor that another process receives from a loader's worker costs a handshake for its shared memory: there is one.
        tensors = self._tensors()
        wide_first = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that all are aligned
        together = torch.cat([tensors[name].contiguous().view(-1).view(torch.uint8) for name in wide_first])
        return _separate, (together, [(name, tensors[name].dtype, tensors[name].shape) for name in wide_first], self.causal)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self._tensors().items()}
        return replace(self, **changed)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}


def _learned(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    labels_BS, masked_MN, visible_MN = tensors["labels_BS"], tensors["masked_MN"], tensors["visible_MN"]
    assert labels_BS is not None
    assert masked_MN is not None
    assert visible_MN is not None
    aligned_MN = visible_MN if tensors.get("teacher_MNF") is not None else torch.zeros_like(visible_MN)
    chosen = ((labels_BS != IGNORE).t(), masked_MN, aligned_MN)
    return {name: where.flatten().nonzero().squeeze(1) for name, where in zip(LEARNED, chosen, strict=True)}


def _separate(together: Tensor, parts: list[tuple[str, torch.dtype, torch.Size]], causal: bool) -> Batch:
    sizes = [dtype.itemsize * shape.numel() for _, dtype, shape in parts]
    pieces = together.split(sizes)
    tensors = {name: piece.view(dtype).view(shape) for (name, dtype, shape), piece in zip(parts, pieces, strict=True)}
    return Batch(**tensors, causal=causal)
