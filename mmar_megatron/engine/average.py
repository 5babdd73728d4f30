"""The exponential moving average of the weights, fp32, in the shards of megatron-core's distributed optimizer.

Each data-parallel rank averages just the piece of each parameter that it also updates, so the average costs 4 bytes a parameter
divided by the data-parallel ranks, and no communication. Only for a checkpoint are the pieces put together, on the host, to
tensors of the model's shapes under its names behind a prefix: these load in any layout, and in place of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn


class WeightAverage:
    """average <- d average + (1 - d) weight after each step, where d = min(decay, (1 + n) / (10 + n)) and n counts the updates.

    The ramp (as in TensorFlow's `ExponentialMovingAverage`) lets the initial weights be forgotten as fast as they deserve.

    Args:
        optimizer: holds the fp32 weights in shards.
        decay: d in the long run, between 0 and 1; MAR (arXiv 2406.11838) has 0.9999.
    """

    def __init__(self, optimizer: MegatronOptimizer, *, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parts: Sequence[DistributedOptimizer] = optimizer.chained_optimizers
        self._weights = [weight for part in self._parts for group in part.optimizer.param_groups for weight in group["params"]]
        self._averages = [weight.detach().clone() for weight in self._weights]
        self._of_weight = {id(weight): average for weight, average in zip(self._weights, self._averages, strict=True)}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step that was taken."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the weights as they are."""
        self.updates = 0
        torch._foreach_copy_(self._averages, self._weights)

    @torch.no_grad()
    def whole(self) -> dict[nn.Parameter, Tensor]:
        """The average of each of this rank's parameters, in its shape, on the host. All data-parallel ranks call it together."""
        whole = {}
        for part, parameter, piece in self._pieces():
            one = torch.zeros(parameter.shape, device=parameter.device)
            if piece is not None:
                one.view(-1)[piece[0]] = piece[1]
            torch.distributed.all_reduce(one, group=part.data_parallel_group)
            whole[parameter] = one.cpu()  # the device would hold all of them, 4 bytes for each parameter
        return whole

    def room(self) -> dict[nn.Parameter, Tensor]:
        """Zeros in the shapes of `whole`, to be filled and given to `load`."""
        return {parameter: torch.zeros(parameter.shape, device="cpu") for _, parameter, _ in self._pieces()}

    @torch.no_grad()
    def load(self, whole: dict[nn.Parameter, Tensor], *, updates: int) -> None:
        """Undo of `whole`."""
        self.updates = updates
        for _, parameter, piece in self._pieces():
            if piece is not None:
                piece[1].copy_(whole[parameter].view(-1)[piece[0]])

    def _pieces(self) -> Iterator[tuple[DistributedOptimizer, nn.Parameter, tuple[slice, Tensor] | None]]:
        """Each parameter of this rank, in an order alike on all data-parallel ranks, with the piece that this rank averages."""
        for part in self._parts:
            for parameter in (parameter for buffer in part.buffers for parameter in buffer.params):
                piece = None
                if place := part.model_param_group_index_map.get(parameter):
                    weight = part.optimizer.param_groups[place[0]]["params"][place[1]]
                    extent = part._get_model_param_range_map(parameter)["param"]
                    piece = slice(extent.start, extent.end), self._of_weight[id(weight)]
                yield part, parameter, piece
