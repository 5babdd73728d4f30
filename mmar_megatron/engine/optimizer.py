"""Which parameters decay, the learning rate of each step, and megatron-core's AdamW with its checkpoint faults mended."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import nn

from mmar_megatron.config import OptimizerConfig

NO_WEIGHT_DECAY = ("*diffusion_head.*", "*.position.row", "*.position.column", "*mask_embedding")
"""Names beside norms and biases (all that is one-dimensional). MAR does not decay its head."""


def learning_rate(step: int, *, config: OptimizerConfig, total_steps: int) -> float:
    """Of optimizer step `step`, counted from 0: linear warm-up, then cosine to `min_lr` at the last step, or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter decays, by the rule that `build_optimizer` gives megatron-core."""
    return parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in NO_WEIGHT_DECAY)


def build_optimizer(
    config: OptimizerConfig, *, chunks: list[nn.Module], bf16: bool, overlap_param_gather: bool
) -> MegatronOptimizer:
    """megatron-core's distributed AdamW: each data-parallel rank holds and updates a shard of the fp32 state."""
    undecayed = ParamKey(name=NO_WEIGHT_DECAY, predicate=ParamPredicate(name="one_dimensional", fn=lambda p: p.ndim == 1))
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap_param_gather,
        ),
        chunks,
        config_overrides={undecayed: {"wd_mult": 0.0}},
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    for part in optimizer.chained_optimizers:
        _mend_checkpointing(part)
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, value: float) -> None:
    """For the next step, in all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = value


def _mend_checkpointing(part: DistributedOptimizer) -> None:
    """Work around the checkpoint faults of megatron-core 0.16.1's distributed optimizer; tests/integration/test_resume.py and
    tests/distributed/test_checkpoint.py hold each in place."""
    _mend_bucket_offsets(part)
    if isinstance(part.optimizer, torch.optim.AdamW):
        _mend_torch_adamw(part)


def _mend_bucket_offsets(part: DistributedOptimizer) -> None:
    """The `fully_reshardable` format gathers the optimizer's state without the padding between gradient buckets, then cuts
    parameters out of it at their places *with* that padding. All but the first bucket's are silently wrong. There are several
    buckets under `overlap_grad_reduce`, and always where tied word embeddings meet pipeline parallelism (they get a bucket of
    their own). Here the padding is put back in between.
    """
    gather = part.get_parameter_state_dp_zero

    def gather_with_padding(*args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        gathered = gather(*args, **kwargs)
        if gathered is None:
            return None
        for number, buffer in enumerate(part.buffers):
            for state in gathered[number].values():
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    pieces = state[name].split([bucket.numel_unpadded for bucket in buffer.buckets])
                    state[name] = torch.zeros(buffer.numel, dtype=state[name].dtype)
                    for bucket, piece in zip(buffer.buckets, pieces, strict=True):
                        state[name][bucket.offset : bucket.offset + bucket.numel_unpadded] = piece
        return gathered

    part.get_parameter_state_dp_zero = gather_with_padding


def _mend_torch_adamw(part: DistributedOptimizer) -> None:
    """Where torch's AdamW stands in for Transformer Engine's or apex's (which count steps in the parameter group, where torch
    counts in each parameter's state), megatron-core does not ask for its fused kernel, which reads and writes each value once.
    And

    - saving or loading before the first step asserts, for there is no state yet: so it is made here;
    - loading the `fully_reshardable` format raises KeyError 'step', for it copies every entry of the state, and the loaded one
      has none;
    - after loading, all parameters share **one** step tensor, which AdamW then advances once for each parameter: resumed training
      silently diverges.
    """
    state = part.optimizer.state
    for group in part.optimizer.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }

    def set_main_param_and_optimizer_states(model_param: nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group_index, group_order = part.model_param_group_index_map[model_param]
        main_param = part.optimizer.param_groups[group_index]["params"][group_order]
        main_param_state = state[main_param]
        main_param.copy_(tensors["param"])
        for name in ("exp_avg", "exp_avg_sq"):
            main_param_state[name].copy_(tensors[name])

    load_state_dict = part.load_state_dict

    def load_state_dict_with_own_steps(loaded: dict[str, Any]) -> None:
        load_state_dict(loaded)
        for parameter, entry in part.optimizer.state.items():
            entry["step"] = entry["step"].to(parameter.device, copy=True)
        for group in part.optimizer.param_groups:
            group["fused"] = True  # also where the checkpoint is of other times

    part._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    part.load_state_dict = load_state_dict_with_own_steps
