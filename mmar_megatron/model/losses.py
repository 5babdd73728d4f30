"""What the model returns on its last stage: sums, never means, so that they add up over microbatches and ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

NUM_BUCKETS = 8


@dataclass(kw_only=True)
class LossSums:
    """Sums over this rank's share of one microbatch, fp32. The first three carry gradients."""

    text: Tensor
    """Cross-entropy over labelled positions, nats. Alike on all tensor-parallel ranks."""
    image: Tensor
    """Diffusion loss over masked tokens (mean over noise levels and channels of each). Like all below, of this rank's rows."""
    alignment: Tensor
    """1 - cosine to the teacher's features over visible tokens; 0 where there is no teacher."""
    image_zero: Tensor
    """What predicting zero would cost in place of `image`."""
    image_by_timestep: Tensor
    """[NUM_BUCKETS], by noise level."""
    count_by_timestep: Tensor
    image_by_mask_ratio: Tensor
    """[NUM_BUCKETS], by the share of the image that is masked."""
    count_by_mask_ratio: Tensor

    def flatten(self) -> Tensor:
        """All values behind each other, detached, for one reduction over ranks."""
        return torch.cat([getattr(self, f.name).detach().float().reshape(-1) for f in fields(self)])

    @staticmethod
    def size() -> int:
        """Number of values in `flatten`."""
        return 4 + 4 * NUM_BUCKETS

    @classmethod
    def unflatten(cls, flat: Tensor) -> LossSums:
        """Undo of `flatten`."""
        scalars = flat[:4].unbind()
        buckets = flat[4:].view(4, NUM_BUCKETS).unbind()
        return cls(**dict(zip((f.name for f in fields(cls)), (*scalars, *buckets), strict=True)))


def bucketed(values: Tensor, *, position: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums of values [K], and of the weights [K], by position [K] in [0, 1], each [NUM_BUCKETS]."""
    bucket = (position * NUM_BUCKETS).long().clamp_(max=NUM_BUCKETS - 1)
    zeros = torch.zeros(NUM_BUCKETS, device=values.device)
    return zeros.index_add(0, bucket, values * weight), zeros.index_add(0, bucket, weight)
