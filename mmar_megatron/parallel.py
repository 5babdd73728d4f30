"""Process groups. The only file that says `parallel_state`.

megatron-core keeps its groups in a module of globals. We make them once, here, and pass them on as values.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import ProcessGroup

from mmar_megatron import platform
from mmar_megatron.config import ParallelConfig

platform.prepare_for_megatron()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """Where this process stands in the layout. The pipeline is outermost, then data, then tensor parallelism."""

    tensor: ProcessGroup
    pipeline: ProcessGroup
    data: ProcessGroup
    model: ProcessGroup
    """Tensor x pipeline: the processes that hold one replica of the model."""
    control: ProcessGroup
    """All processes, through the host: small agreements that keep no device waiting."""
    megatron: ProcessGroupCollection
    """The same and more, in the form megatron-core's constructors take."""
    virtual_pipeline_size: int | None

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return torch.distributed.get_world_size()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do."""
        if torch.distributed.get_rank() > 0:
            torch.distributed.barrier()
        yield
        if torch.distributed.get_rank() == 0:
            torch.distributed.barrier()

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """What may fail on some ranks (a full disk, a permission) then fails on all: the others have the first one's error.

        The others would otherwise wait for it in their next collective. Within the block none may come after what fails.
        """
        mine: Exception | None = None
        try:
            yield
        except (OSError, ValueError) as error:
            mine = error
        errors: list[Exception | None] = [None] * self.world_size
        torch.distributed.all_gather_object(errors, mine, group=self.control)
        if first := next((error for error in errors if error is not None), None):
            raise mine or first  # its own has a traceback

    @property
    def is_first_stage(self) -> bool:
        """Whether the embedding is here."""
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the heads and the loss are here."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes reports: the last, for it has the loss in any layout."""
        return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1

    def layout(self) -> dict[str, int]:
        """The sizes that make up the number of processes."""
        return {"tensor": self.tensor.size(), "pipeline": self.pipeline.size(), "data": self.data.size()}

    def describe(self) -> str:
        """The layout in one line."""
        sizes = f"TP {self.tensor.size()} x PP {self.pipeline.size()} x DP {self.data.size()}"
        return sizes + (f", {self.virtual_pipeline_size} chunks a stage" if self.virtual_pipeline_size else "")


def initialize(config: ParallelConfig, *, hang_timeout_s: float = 0.0) -> ParallelGroups:
    """Join the job and build the process groups of a layout that `validate_world` has found to fit the number of processes.

    Args:
        config: the layout.
        hang_timeout_s: seconds after which a process is taken to hang. Collectives wait for it twice as long, so that they do not
            fail before it can tell where it hangs; 0: an hour.
    """
    timeout = timedelta(seconds=2 * hang_timeout_s) if hang_timeout_s else timedelta(hours=1)
    platform.init_process_group(timeout=timeout)
    return _build_groups(config, create_gloo_process_groups=True, timeout=timeout)


def initialize_fake(config: ParallelConfig, *, rank: int, world_size: int) -> ParallelGroups:
    """Stand in for one rank of a job that does not run: to build its part of a model on the meta device, and no more.

    torch's `fake` backend has groups of any size in one process, and its collectives do nothing. `leave` ends it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook
    torch.distributed.init_process_group(backend="fake", store=FakeStore(), rank=rank, world_size=world_size)
    sys.excepthook = hook  # torch has put one before it, which would name a rank that there is not in each line of a traceback
    return _build_groups(config, create_gloo_process_groups=False, timeout=timedelta(hours=1))


def _build_groups(config: ParallelConfig, *, create_gloo_process_groups: bool, timeout: timedelta) -> ParallelGroups:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        create_gloo_process_groups=create_gloo_process_groups,
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
    )
    megatron = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelGroups(
        tensor=megatron.tp,
        pipeline=megatron.pp,
        data=megatron.dp,
        model=megatron.mp,
        control=_host_group(timeout=timeout),
        megatron=megatron,
        virtual_pipeline_size=config.virtual_pipeline_model_parallel_size,
    )


def _host_group(*, timeout: timedelta) -> ProcessGroup:
    if torch.distributed.get_backend() == "nccl":
        return torch.distributed.new_group(backend="gloo", timeout=timeout)
    everyone = torch.distributed.group.WORLD
    assert everyone is not None
    return everyone


def destroy() -> None:
    """End the layout's groups; the job's own group stays, so that another layout can be built.

    megatron-core forgets most of them without a word to torch, which keeps each with its threads. Beside NCCL the `control` group
    stays too.
    """
    for group in parallel_state._global_process_group_list or []:
        if group is not None:  # which stands for the job's own
            torch.distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def leave() -> None:
    """Leave the job. Without it, gloo's threads of a finished process can abort the others."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # and all others, in the order that NCCL needs
