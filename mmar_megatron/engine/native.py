"""The native engine: megatron-core's data-parallel wrapper, distributed optimizer and pipeline schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mmar_megatron import platform
from mmar_megatron.config import Config, EngineName
from mmar_megatron.data.batch import Batch
from mmar_megatron.engine.average import WeightAverage
from mmar_megatron.engine.base import Counts, Judge, LossResult, StepResult, finite
from mmar_megatron.engine.losses import global_counts, reduced, weighted
from mmar_megatron.engine.optimizer import build_optimizer, set_learning_rate
from mmar_megatron.engine.sharding import AVERAGE_PREFIX, under_prefix
from mmar_megatron.model.key_values import KeyValueCache
from mmar_megatron.model.losses import LossSums
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups


class NativeEngine:
    """Trains the model chunks of this rank.

    Args:
        config: the whole configuration: an engine is where model, layout, precision and optimizer meet.
        chunks: from `build_model`.
        groups: process groups.
    """

    name: EngineName = "native"

    def __init__(self, config: Config, *, chunks: list[MMARModel], groups: ParallelGroups) -> None:
        self.groups = groups
        self.settings = config.model
        self.backbone = config.model.backbone
        self.clip_grad = config.optimizer.clip_grad
        self.overlap_param_gather = config.parallel.overlap_param_gather
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=config.parallel.overlap_grad_reduce,
            overlap_param_gather=config.parallel.overlap_param_gather,
            bucket_size=config.parallel.grad_bucket_size,
            use_distributed_optimizer=True,
        )
        self.chunks = [
            DistributedDataParallel(
                self.backbone,
                ddp_config,
                chunk.to(platform.device()),
                # Only the first chunk's communication lies on the critical path; the others' goes in one piece.
                disable_bucketing=number > 0,
                pg_collection=groups.megatron,
            )
            for number, chunk in enumerate(chunks)
        ]
        self.optimizer = build_optimizer(
            config.optimizer,
            chunks=self.chunks,
            bf16=config.precision.dtype == "bf16",
            overlap_param_gather=config.parallel.overlap_param_gather,
        )
        decay = config.optimizer.ema_decay
        self.average = WeightAverage(self.optimizer, decay=decay) if decay > 0 else None
        self.backbone.finalize_model_grads_func = self._finalize_gradients
        if config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.backbone.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.forward_backward = get_forward_backward_func()

    @property
    def last_stage(self) -> MMARModel | None:
        """The model chunk that holds the heads, where it is on this rank."""
        model = self.chunks[-1].module
        return model if model.post_process else None

    @property
    def models(self) -> Sequence[MMARModel]:
        """The model chunks of this rank."""
        return [chunk.module for chunk in self.chunks]

    # --- learning ---------------------------------------------------------------------------------------------------------------

    def train_step(self, microbatches: Sequence[Batch], *, learning_rate: float, judge: Judge = finite) -> StepResult:
        """One optimizer step on this rank's microbatches of one global batch, unless `judge` has a reason against it."""
        batches = [batch.to(platform.device()) for batch in microbatches]
        # The denominators depend on the data alone, so they are known before the forward pass: each microbatch's loss is divided
        # by the count over all microbatches and ranks, and plain sums of gradients are then those of the global mean.
        counts = global_counts(batches, groups=self.groups)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        # Ranks have waited for each other to count; from here on, until they reduce gradients, each works for itself.
        work = platform.mark()
        sums = reduced(self._run(batches, counts=counts), groups=self.groups)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.prepare_grads()
        # The host waits for the device here, once in a step: whatever was enqueued before is then known as well.
        grad_norm = float(self.optimizer.get_grad_norm())
        loss = float(weighted(sums, counts, settings=self.settings))
        skipped = judge(loss, grad_norm)
        if skipped is None:
            self._clip_and_step(grad_norm)
        work_s = platform.seconds_between(work, self._reduction)
        return StepResult(sums=sums, counts=counts, loss=loss, grad_norm=grad_norm, skipped=skipped, work_s=work_s)

    def evaluate(self, microbatches: Sequence[Batch]) -> LossResult:
        """Loss sums without learning; call within `evaluating`."""
        batches = [batch.to(platform.device()) for batch in microbatches]
        counts = global_counts(batches, groups=self.groups)
        # The interleaved schedule takes multiples of the number of stages.
        missing = -len(batches) % self.groups.pipeline.size() if self.groups.virtual_pipeline_size else 0
        batches += [batches[-1].without_losses()] * missing
        return LossResult(sums=reduced(self._run(batches, counts=counts, forward_only=True), groups=self.groups), counts=counts)

    def _run(self, batches: list[Batch], *, counts: Counts, forward_only: bool = False) -> list[Tensor]:
        """Forward (and backward) over all microbatches: on the last stage, the flattened loss sums of each."""

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
            return model(next(iterator)), partial(self._loss, counts=counts)

        return self._pipeline(batches, forward_step, forward_only=forward_only)

    def _pipeline(self, batches: list[Batch], forward_step: Any, **options: Any) -> list[Tensor]:
        sequences, positions = batches[0].tokens_BS.shape
        return self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=positions,
            micro_batch_size=sequences,
            **options,
        )

    def _loss(self, sums: LossSums, *, counts: Counts) -> tuple[Tensor, Tensor, Tensor]:
        """In megatron-core's form: loss, number of tokens (ours are divided by already), what to report."""
        loss = weighted(sums, counts, settings=self.settings)
        return loss, torch.ones((), dtype=torch.int, device=loss.device), sums.flatten()

    def _finalize_gradients(self, model: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
        """megatron-core's reductions, without its division by `num_tokens`, then a sum over tensor-parallel ranks.

        The sum is of gradients of modules that see different rows there; megatron-core does it under sequence parallelism alone.
        """
        self._reduction = platform.mark()
        finalize_model_grads(model, None, **options)
        if self.groups.tensor.size() == 1:
            return
        parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        gradients = [p.main_grad for p in parameters if getattr(p, "sum_gradients_across_tp_domain", False)]
        if gradients:
            flat = _flatten_dense_tensors(gradients)
            torch.distributed.all_reduce(flat, group=self.groups.tensor)
            for gradient, summed in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(summed)

    @torch.no_grad()
    def _clip_and_step(self, grad_norm: float) -> None:
        if self.clip_grad > 0:
            for part in self.optimizer.chained_optimizers:
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, max_norm=self.clip_grad, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()
        if self.average is not None:
            self.average.update()

    def parameters_and_gradients(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Of this rank: name, weights, and what the last step left in the gradient buffer.

        The buffer is reduced where this rank's share of the optimizer needs it; the rest is still this rank's own contribution.
        """
        for number, chunk in enumerate(self.chunks):
            for name, parameter in chunk.module.named_parameters():
                yield f"model{number}.{name}", parameter.detach(), parameter.main_grad

    # --- not learning -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, complete parameters, no gradients."""
        for chunk in self.chunks:
            chunk.eval()
            if self.overlap_param_gather:
                chunk.disable_forward_pre_hook()  # it gathers what is still on its way, and forward passes gather no more
        try:
            with torch.no_grad():
                yield
        finally:
            for chunk in self.chunks:
                chunk.train()
                if self.overlap_param_gather:
                    chunk.enable_forward_pre_hook()

    def hidden_states(self, batch: Batch, *, cache: KeyValueCache | None = None) -> Tensor | None:
        """Final hidden states [S, B, D] on the last stage, None on the others; call within `evaluating`."""

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
            return model(next(iterator), return_hidden=True, cache=cache), lambda hidden, non_loss_data: hidden

        copies = self.groups.pipeline.size() if self.groups.virtual_pipeline_size else 1
        outputs = self._pipeline([batch] * copies, forward_step, forward_only=True, collect_non_loss_data=True)
        return outputs[0] if self.last_stage is not None else None

    def close(self) -> None:
        """Take the engine's functions out of the configuration: that circle passes through hooks of torch, where the garbage
        collector does not see it, and the model would stay as long as the process."""
        self.backbone.finalize_model_grads_func = self.backbone.no_sync_func = None

    # --- state ------------------------------------------------------------------------------------------------------------------

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self.average is not None

    def model_sharded_state_dict(self, *, average: bool = False) -> dict[str, Any]:
        """Each chunk's parameters under its own key, `model0`, `model1`, ...; with `average` under the names of their average."""
        state = {
            f"model{number}": chunk.module.sharded_state_dict(metadata=self._metadata) for number, chunk in enumerate(self.chunks)
        }
        return {key: under_prefix(of_chunk, prefix=AVERAGE_PREFIX) for key, of_chunk in state.items()} if average else state

    def sharded_state_dict(self, *, is_loading: bool = False, average: bool = True) -> dict[str, Any]:
        """Model, optimizer and (with `average`) moving average, in the form that reshards to any layout."""
        model = self.model_sharded_state_dict()
        # megatron-core looks for one chunk under `model`, for several under `model0`, ...
        of_optimizer = {"model": model["model0"]} if len(model) == 1 else model
        optimizer = self.optimizer.sharded_state_dict(of_optimizer, is_loading=is_loading, metadata=self._metadata)
        state = {**model, "optimizer": optimizer}
        if average and self.average is not None:
            tensors = self.average.room() if is_loading else self.average.whole()
            state["average"] = {
                key: under_prefix(of_chunk, prefix=AVERAGE_PREFIX, tensors=tensors) for key, of_chunk in model.items()
            }
            state["average_updates"] = self.average.updates
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Model and optimizer; and the average, which begins anew from the weights where there is none."""
        self._load_model(state)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is None:
            return
        if "average" not in state:
            self.average.restart()
            return
        whole = {
            parameter: state["average"][f"model{number}"][name]
            for number, chunk in enumerate(self.chunks)
            for name, parameter in chunk.module.state_dict(keep_vars=True).items()
            if isinstance(parameter, torch.nn.Parameter)
        }
        self.average.load(whole, updates=state["average_updates"])

    def load_weights(self, state: dict[str, Any]) -> None:
        """What there is of the model; the optimizer, and the average, start anew from these weights."""
        self._load_model(state, strict=False)
        self.optimizer.reload_model_params()
        if self.average is not None:
            self.average.restart()

    def _load_model(self, state: dict[str, Any], *, strict: bool = True) -> None:
        for number, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(state[f"model{number}"], strict=strict)

    @property
    def _metadata(self) -> dict[str, Any]:
        return {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": self.groups.megatron.dp_cp}
