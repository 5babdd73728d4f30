"""Which modules megatron-core's transformer layers are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from mmar_megatron.model.attention import MixedAttention


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467). megatron-core's wrapper of torch's refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank norms its own positions: its gradient is a part, and megatron-core sums the parts
        # by this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


_NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""In checkpoints the norms have the names of Transformer Engine's layers, which hold them within the linear that follows."""


@dataclass(frozen=True, kw_only=True)
class _Modules:
    """What differs between megatron-core's own layers and Transformer Engine's."""

    norm: Any
    norm_before_linear: Any
    column_parallel_linear: Any
    """With the norm before it, where that is within."""
    row_parallel_linear: Any
    names: dict[str, str]
    """In checkpoints, in place of the modules' own."""


def _modules(implementation: str) -> _Modules:
    if implementation == "local":
        return _Modules(
            norm=RMSNorm,
            norm_before_linear=RMSNorm,
            column_parallel_linear=ColumnParallelLinear,
            row_parallel_linear=RowParallelLinear,
            names=_NORM_NAMES,
        )
    assert implementation == "transformer_engine", implementation
    from megatron.core.extensions import transformer_engine as engine  # here, since it takes seconds where it is installed

    if not engine.HAVE_TE:
        raise ValueError(
            "model.backbone.transformer_impl is transformer_engine, which cannot be imported here: install it by "
            "pip install --no-build-isolation -r requirements-gpu.txt, or set local."
        )
    return _Modules(
        norm=engine.TENorm,
        norm_before_linear=IdentityOp,
        column_parallel_linear=engine.TELayerNormColumnParallelLinear,
        row_parallel_linear=engine.TERowParallelLinear,
        names={},
    )


def transformer_engine() -> Any:
    """Its own package, `transformer_engine.pytorch`, where it is installed."""
    import transformer_engine.pytorch as engine  # type: ignore[import-not-found]  # here, since it takes seconds

    return engine


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """A decoder layer with mixed attention, of the modules that `transformer_impl` names.

    Raises:
        ValueError: Transformer Engine is asked for and cannot be imported.
    """
    modules = _modules(config.transformer_impl)
    qk_norm = modules.norm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=modules.norm_before_linear,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=modules.column_parallel_linear,
                    core_attention=MixedAttention,
                    linear_proj=modules.row_parallel_linear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=modules.norm_before_linear,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=modules.column_parallel_linear, linear_fc2=modules.row_parallel_linear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=modules.names,
        ),
    )


def block_spec(config: TransformerConfig, *, vp_stage: int | None, pipeline_rank: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (or chunk of it) and the final norm. Raises ValueError as `layer_spec` does."""
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pipeline_rank)
    # Without the norm given here megatron-core would take its own default, which refuses sequence parallelism.
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config)] * num_layers, layer_norm=_modules(config.transformer_impl).norm
    )
