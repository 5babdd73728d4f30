"""Which rank holds the others up."""

from __future__ import annotations

import torch

from mmar_megatron.parallel import ParallelGroups


class RankTimes:
    """Whose own work takes longest: loading data, then forward and backward passes up to the reduction of gradients.

    Ranks of one replica wait for each other within these passes, so with tensor or pipeline parallelism the slowest rank stands
    for its replica. (The time of a whole step is the same for all ranks.)

    Args:
        groups: process groups.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self._control = groups.control
        self._loading_s = self._work_s = 0.0
        self._steps = 0

    def count(self, *, loading_s: float, work_s: float) -> None:
        """Adds a step of this rank: its wait for data, and its passes."""
        self._loading_s += loading_s
        self._work_s += work_s
        self._steps += 1

    def report(self, *, step_time_s: float) -> dict[str, float]:
        """By their names in `metrics.jsonl`, averaged since the last report. All ranks call it together.

        Args:
            step_time_s: mean time of a whole step, of which the longest wait for data is given as a share.
        """
        own = torch.tensor([self._loading_s, self._work_s]) / self._steps
        of_ranks = [torch.empty_like(own) for _ in range(self._control.size())]
        torch.distributed.all_gather(of_ranks, own, group=self._control)
        loading, work = torch.stack(of_ranks, dim=1)
        times = loading + work
        self._loading_s = self._work_s = 0.0
        self._steps = 0
        return {
            "data_wait_share": float(loading.max()) / step_time_s,
            "rank_time_mean_s": float(times.mean()),
            "rank_time_max_s": float(times.max()),
            "slowest_rank": int(times.argmax()),
        }
