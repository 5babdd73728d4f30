"""Which modules megatron-core's transformer layers are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
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
    causal_attention: Callable[..., nn.Module] | None
    """For batches that need no mask; None: torch's."""
    names: dict[str, str]
    """In checkpoints, in place of the modules' own."""


class EngineAttention(MegatronModule):
    """Transformer Engine's attention, in causal order or under any mask. Never in FP8, also where matrix products are.

    Suffixes: B sequences, S positions, H heads, G key-value groups, D width of a head.

    Args:
        config: with a kind of numbers and heads that `engine_takes`, if it is to be fused.
        layer_number: from 1.
        mask_type: `causal`, by fused kernels; or `arbitrary`, for which it holds all scores.
        softmax_scale: what scores are multiplied by; None: 1 / sqrt(D).
        pg_collection: process groups; None: those that megatron-core knows.
        unused: what megatron-core passes on besides.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        engine = _engine()
        self.mask_type = mask_type
        self.without_fp8 = partial(engine.fp8_autocast, enabled=False)
        self.attention = engine.TEDotProductAttention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=mask_type,
            attention_type="self",
            softmax_scale=softmax_scale,
            pg_collection=pg_collection,
        )

    def forward(self, query_SBHD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, hidden_B1SS: Tensor | None = None) -> Tensor:
        """[S, B, H * D]. `hidden_B1SS` is bool, True where a query (third axis) may not see a key."""
        # Under delayed scaling a module that runs within FP8 takes part, from then on, in the exchange of largest values. Ranks
        # meet batches in causal order at different steps: they would exchange different numbers of values, and hang.
        with self.without_fp8():
            return self.attention(query_SBHD, key_SBGD, value_SBGD, hidden_B1SS, attn_mask_type=self.mask_type)


def engine_takes(config: TransformerConfig) -> bool:
    """Whether Transformer Engine has a fused kernel for such queries, forward and backward: else it would hold all scores."""
    return config.params_dtype in (torch.bfloat16, torch.float16) and config.kv_channels % 8 == 0 and config.kv_channels <= 128


def has_engine() -> bool:
    """Whether Transformer Engine can be imported here."""
    return bool(_wrappers().HAVE_TE)


def _wrappers() -> Any:
    """Those of megatron-core for Transformer Engine."""
    from megatron.core.extensions import transformer_engine  # here, since it takes seconds where it is installed

    return transformer_engine


def _engine() -> Any:
    """The same, which are of use. Raises ValueError where it cannot be imported."""
    if not has_engine():
        raise ValueError(
            "model.backbone.transformer_impl is transformer_engine, which cannot be imported here: install it by "
            "pip install --no-build-isolation -r requirements-gpu.txt, or set local."
        )
    return _wrappers()


def _modules(config: TransformerConfig) -> _Modules:
    if config.transformer_impl == "local":
        return _Modules(
            norm=RMSNorm,
            norm_before_linear=RMSNorm,
            column_parallel_linear=ColumnParallelLinear,
            row_parallel_linear=RowParallelLinear,
            causal_attention=None,
            names=_NORM_NAMES,
        )
    assert config.transformer_impl == "transformer_engine", config.transformer_impl
    engine = _engine()
    return _Modules(
        norm=engine.TENorm,
        norm_before_linear=IdentityOp,
        column_parallel_linear=engine.TELayerNormColumnParallelLinear,
        row_parallel_linear=engine.TERowParallelLinear,
        causal_attention=partial(EngineAttention, mask_type=AttnMaskType.causal) if engine_takes(config) else None,
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
    modules = _modules(config)
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
                    core_attention=partial(MixedAttention, causal=modules.causal_attention),
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
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config)] * num_layers, layer_norm=_modules(config).norm)
