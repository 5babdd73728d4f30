"""The DeepSpeed engine: ZeRO 0 to 3 over the data-parallel ranks, beside megatron-core's tensor parallelism.

It trains the same model on the same batches as the native engine. Gradients are those of the global mean, and what DeepSpeed
divides them by is put back. Checkpoints are in the same form too: whole tensors under the names of the parameters, the weights as
the native engine's, so that they load at any number of ranks and any stage.

The faults of DeepSpeed 0.19 that are worked around are named where that is done.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from mmar_megatron import platform
from mmar_megatron.config import Config, EngineName
from mmar_megatron.data.batch import Batch
from mmar_megatron.engine.base import Judge, LossResult, StepResult, finite
from mmar_megatron.engine.losses import global_counts, reduced, weighted
from mmar_megatron.engine.optimizer import decays
from mmar_megatron.engine.sharding import AVERAGE_PREFIX, OPTIMIZER_PREFIX, under_prefix
from mmar_megatron.engine.zero import Layout, Verdict, VetoedAdamW
from mmar_megatron.model.key_values import KeyValueCache
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups

_MASTER = "fp32"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@cache
def _deepspeed() -> Any:
    """The library, quiet, and without what it would compile on a CPU for minutes."""
    if not platform.launched():
        os.environ.setdefault("LOCAL_RANK", "0")  # which it asserts, of one process too
    if not platform.HAS_CUDA:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it says so in each process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # type: ignore[import-untyped]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of optimizers and outputs of classes that it does not know
    if not platform.HAS_CUDA:
        # It compiles its collectives for a CPU, which takes a minute, and prints that it did.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedEngine:
    """Trains the model of this rank.

    Args:
        config: the whole configuration: an engine is where model, layout, precision and optimizer meet.
        model: from `build_model`; there is one chunk, as there is no pipeline.
        groups: process groups.
    """

    name: EngineName = "deepspeed"
    has_average = False
    """A moving average of the weights is refused with this engine."""

    def __init__(self, config: Config, *, model: MMARModel, groups: ParallelGroups) -> None:
        self.groups, self.model = groups, model.to(platform.device())
        self.settings, self.stage = config.model, config.deepspeed.zero_stage
        self.clip_grad = config.optimizer.clip_grad
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._sum_over_tensor_parallel_ranks()
        optimizer = config.optimizer
        self.optimizer = VetoedAdamW(
            [
                {"params": [p for p in self._names if decays(self._names[p], p) is with_decay], "weight_decay": decay}
                for with_decay, decay in ((True, optimizer.weight_decay), (False, 0.0))
            ],
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        library = _deepspeed()
        self._linear = nn.functional.linear
        if self.stage == 3 and config.model.tie_embeddings:
            # The output layer computes with a parameter of another module, which stage 3 would not gather for it.
            library.zero.register_external_parameter(model.output_layer, model.embedding.word_embeddings.weight)
        self.microbatches = config.train.global_batch_size // (config.train.micro_batch_size * groups.data.size())
        self.engine, *_ = library.initialize(
            model=model,
            optimizer=self.optimizer,
            mpu=Layout(groups),
            dist_init_required=False,
            config=self._settings(config),
        )
        self._restart_moments()

    def _settings(self, config: Config) -> dict[str, Any]:
        deepspeed = config.deepspeed
        zero: dict[str, Any] = {"stage": self.stage, **deepspeed.zero_options}
        if deepspeed.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if deepspeed.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "gradient_accumulation_steps": self.microbatches,
            "gradient_clipping": self.clip_grad if self.stage else 0.0,  # of stage 0 it would keep the norm to itself
            "bf16": {"enabled": config.precision.dtype == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",  # or gradients of bf16 weights are reduced in bf16
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # it would compile one
            "steps_per_print": None,
        }

    def _sum_over_tensor_parallel_ranks(self) -> None:
        """Gradients of modules that see different rows on each tensor-parallel rank are parts: summed as they come."""
        if self.groups.tensor.size() == 1:
            return
        for parameter, name in self._names.items():
            of_heads = "q_layernorm" in name or "k_layernorm" in name  # each rank normalises its own heads
            marks = (getattr(parameter, mark, False) for mark in ("sum_gradients_across_tp_domain", "sequence_parallel"))
            if of_heads or any(marks):
                parameter.register_hook(self._summed)

    def _summed(self, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        torch.distributed.all_reduce(gradient, group=self.groups.tensor)
        return gradient

    @property
    def last_stage(self) -> MMARModel | None:
        """The model, which is whole."""
        return self.model

    @property
    def models(self) -> Sequence[MMARModel]:
        """The model, which is whole."""
        return [self.model]

    # --- learning ---------------------------------------------------------------------------------------------------------------

    def train_step(self, microbatches: Sequence[Batch], *, learning_rate: float, judge: Judge = finite) -> StepResult:
        """One optimizer step on this rank's microbatches of one global batch, unless `judge` has a reason against it."""
        assert len(microbatches) == self.microbatches
        batches = [batch.to(platform.device()) for batch in microbatches]
        counts = global_counts(batches, groups=self.groups)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        work, flattened = platform.mark(), []
        verdict = Verdict()
        self.optimizer.may_step = partial(self._may_step, verdict, judge)
        # DeepSpeed divides by the numbers of microbatches and of data-parallel ranks; losses are divided by the counts already.
        times = self.microbatches * self.groups.data.size()
        for number, batch in enumerate(batches, start=1):
            sums = self.engine(batch)
            if number == len(batches):
                reduction = platform.mark()
            self.engine.backward(weighted(sums, counts, settings=self.settings) * times)
            flattened.append(sums.flatten())
            if number == len(batches):
                total = reduced(flattened, groups=self.groups)
                verdict.loss = float(weighted(total, counts, settings=self.settings))
            self.engine.step()
        if verdict.grad_norm is None:  # DeepSpeed found a gradient that is not finite, and did not ask
            verdict.grad_norm, verdict.reason = math.inf, judge(verdict.loss, math.inf)
        return StepResult(
            sums=total,
            counts=counts,
            loss=verdict.loss,
            grad_norm=verdict.grad_norm,
            skipped=verdict.reason,
            work_s=platform.seconds_between(work, reduction),
        )

    def _may_step(self, verdict: Verdict, judge: Judge) -> bool:
        """Asked by the optimizer when gradients are reduced and, but in stage 0, clipped; once for each of DeepSpeed's groups."""
        if verdict.grad_norm is None:
            norm = self._norm() if self.stage == 0 else float(self.engine.optimizer._global_grad_norm)
            # Ranks that judge differently part for ever, and one may have added the norm up in another order.
            shared = torch.tensor([norm if norm >= 0 else math.inf], dtype=torch.float64, device=platform.device())
            torch.distributed.broadcast(shared, src=0)
            verdict.grad_norm = float(shared)
            verdict.reason = judge(verdict.loss, verdict.grad_norm)
            if self.stage == 0 and verdict.reason is None:
                self._clip(verdict.grad_norm)
        return verdict.reason is None

    def _norm(self) -> float:
        """Of whole gradients, in which those of tensor-parallel parameters are this rank's part, and others are alike there."""
        parts = torch.zeros(2, dtype=torch.float64, device=platform.device())
        for parameter in self._names:
            if parameter.grad is not None:
                parts[int(getattr(parameter, "tensor_model_parallel", False))] += parameter.grad.double().square().sum()
        torch.distributed.all_reduce(parts[1:], group=self.groups.tensor)
        return float(parts.sum().sqrt())

    def _clip(self, norm: float) -> None:
        if 0 < self.clip_grad < norm:
            gradients = [parameter.grad for parameter in self._names if parameter.grad is not None]
            torch._foreach_mul_(gradients, self.clip_grad / (norm + 1e-6))

    def parameters_and_gradients(self) -> Iterator[tuple[str, Tensor, None]]:
        """Of this rank: name, and weights (of stage 3 its part of them); DeepSpeed lets go of gradients."""
        for parameter, name in self._names.items():
            weights = parameter.ds_tensor if self.stage == 3 else parameter.detach()
            yield f"model0.{name}", weights, None

    # --- not learning -----------------------------------------------------------------------------------------------------------

    def evaluate(self, microbatches: Sequence[Batch]) -> LossResult:
        """Loss sums without learning; call within `evaluating`."""
        batches = [batch.to(platform.device()) for batch in microbatches]
        counts = global_counts(batches, groups=self.groups)
        return LossResult(sums=reduced([self.model(batch).flatten() for batch in batches], groups=self.groups), counts=counts)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, no gradients; of stage 3 each module gathers its parameters when it runs."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()

    def hidden_states(self, batch: Batch, *, cache: KeyValueCache | None = None) -> Tensor | None:
        """Final hidden states, [S, B, D]; call within `evaluating`."""
        h_SBD = self.model(batch, return_hidden=True, cache=cache)
        assert isinstance(h_SBD, Tensor)
        return h_SBD

    # --- state ------------------------------------------------------------------------------------------------------------------

    def model_sharded_state_dict(self, *, average: bool = False) -> dict[str, Any]:
        """The weights as the native engine's, or places for their average, to be read into; of stage 3 copies on the host."""
        with self._whole_shapes():
            state, copies = self.model.sharded_state_dict(), None
            if self.stage == 3:
                copies = {parameter: self._weights(parameter).to("cpu", copy=True) for parameter in self._names}
            return {"model0": under_prefix(state, prefix=AVERAGE_PREFIX if average else "", tensors=copies)}

    def sharded_state_dict(self, *, is_loading: bool = False, average: bool = True) -> dict[str, Any]:
        """Weights, and the optimizer's fp32 copies and moments under names of their own."""
        with self._whole_shapes():
            of_model = self.model.sharded_state_dict()
            kinds: dict[str, dict[nn.Parameter, Tensor]] = {
                kind: self._room() if is_loading else self._gathered(kind) for kind in (_MASTER, *_MOMENTS)
            }
            weights = self._room() if is_loading else {p: self._kept(self._weights(p)) for p in self._names}
            weights = {parameter: tensor.to(parameter.dtype) for parameter, tensor in weights.items()}
            state = {"model0": under_prefix(of_model, prefix="", tensors=weights)}
            for kind, tensors in kinds.items():
                state[kind] = under_prefix(of_model, prefix=f"{OPTIMIZER_PREFIX}{kind}.", tensors=tensors)
        return {**state, "optimizer_steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was loaded into `sharded_state_dict(is_loading=True)`."""
        self.load_weights(state)
        for kind in (_MASTER, *_MOMENTS):
            for parameter, value in self._of_parameters(state[kind]):
                self._set(parameter, kind, value)
        self._steps = state["optimizer_steps"]

    def load_weights(self, state: dict[str, Any]) -> None:
        """What there is of the model; the optimizer starts anew."""
        for parameter, value in self._of_parameters(state["model0"]):
            with self._whole(parameter):
                parameter.data.copy_(value)
            self._set(parameter, _MASTER, value.float())
        self._restart_moments()

    def _of_parameters(self, state: dict[str, Any]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter, name in self._names.items():
            if isinstance(value := state.get(name), Tensor):
                yield parameter, value.to(platform.device())

    def _room(self) -> dict[nn.Parameter, Tensor]:
        """Zeros on the host, to be filled."""
        return {p: torch.zeros(self._shape(p), dtype=torch.float32, device="cpu") for p in self._names}

    def _gathered(self, kind: str) -> dict[nn.Parameter, Tensor]:
        """The fp32 copy or a moment of each parameter, whole, on the host. All data-parallel ranks call it together."""
        return {parameter: self._kept(self._get(parameter, kind)) for parameter in self._names}

    def _kept(self, whole: Tensor) -> Tensor:
        """On the host of the first data-parallel rank, which writes it; the others keep the shape alone."""
        if self.groups.data.rank() == 0:
            return whole.to("cpu", copy=True)
        return torch.zeros((), dtype=whole.dtype, device="cpu").expand(whole.shape)

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape if self.stage == 3 else parameter.shape  # type: ignore[attr-defined]

    def _weights(self, parameter: nn.Parameter) -> Tensor:
        """Whole, in the precision of the forward pass; all data-parallel ranks ask together."""
        with self._whole(parameter):
            return parameter.detach().clone() if self.stage == 3 else parameter.detach()

    @contextmanager
    def _whole(self, parameter: nn.Parameter) -> Iterator[None]:
        """A parameter of stage 3 is gathered within, and what the first rank writes into it goes to all."""
        if self.stage < 3:
            yield
        else:
            with _deepspeed().zero.GatheredParameters([parameter], modifier_rank=0):
                yield

    @contextmanager
    def _whole_shapes(self) -> Iterator[None]:
        """Parameters of stage 3 have their whole shape within, and no memory: what is asked for is their place in the model."""
        parts = {}
        for parameter in self._names:
            if self.stage == 3 and parameter.shape != self._shape(parameter):
                parts[parameter] = parameter.data
                parameter.data = parameter.data.new_zeros(1).expand(self._shape(parameter))
        try:
            yield
        finally:
            for parameter, part in parts.items():
                parameter.data = part

    # Of stage 0 the optimizer has the parameters themselves; else flat parts of fp32 copies, which DeepSpeed's functions find.

    @property
    def _flat(self) -> list[Tensor]:
        """What the optimizer's state belongs to."""
        if self.stage == 0:
            return list(self._names)
        of_stage = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        parts: list[Tensor] = getattr(self.engine.optimizer, of_stage)
        return parts

    def _restart_moments(self) -> None:
        """As before the first step. torch would make the state in that, too late for a checkpoint before it."""
        for part in self._flat:
            state = self.optimizer.state[part]
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(part)
        if self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _steps(self) -> int:
        return int(self.optimizer.state[self._flat[0]]["step"])

    @_steps.setter
    def _steps(self, value: int) -> None:
        for part in self._flat:
            self.optimizer.state[part]["step"].fill_(value)

    def _get(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if self.stage == 0:
            return parameter.detach() if kind == _MASTER else self.optimizer.state[parameter][kind]
        utils = _deepspeed().utils
        if kind == _MASTER:
            return utils.safe_get_full_fp32_param(parameter)
        return utils.safe_get_full_optimizer_state(parameter, kind)

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        utils = _deepspeed().utils
        if self.stage == 0:
            self._get(parameter, kind).copy_(value)
        elif self.stage < 3 and kind == _MASTER:
            utils.safe_set_full_fp32_param(parameter, value)
        elif self.stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value, kind)
        else:
            # DeepSpeed's function for whole values cuts beyond their end where the last rank's part is padded.
            own = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            flat = nn.functional.pad(value.flatten(), (0, own * self.groups.data.size() - value.numel()))
            part = flat.narrow(0, own * self.groups.data.rank(), own)
            if kind == _MASTER:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, kind)

    def close(self) -> None:
        """Let go of what DeepSpeed holds: without it a process of stage 3 may abort when it ends.

        Stage 3 replaces torch's linear function for the whole process by one that rounds otherwise, and leaves it there.
        """
        self.engine.destroy()
        nn.functional.linear = self._linear
