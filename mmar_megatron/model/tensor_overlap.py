"""Tensor parallelism's communication while Transformer Engine multiplies (`model.backbone.tp_comm_overlap`).

Its linears exchange pieces of their operands through buffers of one size, which are made once for a job. So it is for the
microbatches of training alone: validation and painting have rows of other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mmar_megatron.config import TransformerConfig
from mmar_megatron.model.layer_specs import transformer_engine

_FLAG = "ub_overlap_rs_fprop"
"""Of a linear: whether its output is summed so. For what it gathers, it sees itself whether anything is to go backward."""


def prepare_overlap(backbone: TransformerConfig, *, positions: int) -> None:
    """Make the buffers, on all ranks at once, before the model runs.

    Args:
        backbone: the layout, the width, and whether there is FP8.
        positions: of a microbatch, all sequences together.
    """
    engine = transformer_engine()
    modes = engine.UserBufferQuantizationMode
    engine.initialize_ub(
        shape=[positions, backbone.hidden_size],
        tp_size=backbone.tensor_model_parallel_size,
        quantization_modes=[modes.NONE, *([modes.FP8] if backbone.fp8 else [])],  # some layers may be spared from FP8
        dtype=backbone.params_dtype,
        bootstrap_backend="nccl",
    )


@contextmanager
def overlapping(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Within, a model that overlaps does so only if `enabled`."""
    linears = [] if enabled else [module for module in model.modules() if getattr(module, _FLAG, False)]
    for linear in linears:
        setattr(linear, _FLAG, False)
    try:
        yield
    finally:
        for linear in linears:
            setattr(linear, _FLAG, True)
