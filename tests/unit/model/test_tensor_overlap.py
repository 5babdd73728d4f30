"""Overlap of tensor parallelism's communication, whose kernels run on several GPUs: what Transformer Engine is asked for."""

from __future__ import annotations

import sys
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.model.tensor_overlap import overlapping, prepare_overlap
from mmar_megatron.parallel import ParallelGroups
from tests.unit.tiny import Documents, build_tiny, config_of

OVERLAP = ("--model.backbone.tp_comm_overlap", "true", "--model.backbone.transformer_impl", "transformer_engine")
TP2 = ("--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true", "--precision.dtype", "bf16")


class Modes(Enum):
    NONE = "none"
    FP8 = "fp8"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `initialize_ub` is called with; its parameters are those of Transformer Engine 2.11."""
    calls: list[dict[str, Any]] = []

    def initialize_ub(
        shape: list[int],
        tp_size: int,
        use_fp8: bool = False,
        quantization_modes: list[Modes] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        ub_cfgs: Any = None,
        bootstrap_backend: str | None = None,
    ) -> None:
        calls.append({"shape": shape, "tp_size": tp_size, "modes": quantization_modes, "dtype": dtype, "by": bootstrap_backend})

    package, module = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    module.__dict__.update(initialize_ub=initialize_ub, UserBufferQuantizationMode=Modes)
    package.pytorch = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    return calls


@pytest.mark.parametrize("fp8", [False, True])
def test_buffers(fp8: bool, asked: list[dict[str, Any]]) -> None:
    backbone = config_of(*OVERLAP, *TP2).model.backbone
    backbone.fp8 = "hybrid" if fp8 else None
    prepare_overlap(backbone, positions=640)
    modes = [Modes.NONE, Modes.FP8] if fp8 else [Modes.NONE]
    assert asked == [{"shape": [640, backbone.hidden_size], "tp_size": 2, "modes": modes, "dtype": torch.bfloat16, "by": "nccl"}]


def test_only_microbatches_of_training_are_exchanged_so(groups: ParallelGroups, coarse_tokenizer: Tokenizer) -> None:
    model, batch = build_tiny(groups), Documents(coarse_tokenizer).mixed_batch()
    model.settings.backbone.tp_comm_overlap = True
    layer = model.decoder.layers[0]
    row, column = layer.mlp.linear_fc2, layer.mlp.linear_fc1
    row.ub_overlap_rs_fprop, column.ub_overlap_rs_fprop = True, False
    seen: list[bool] = []
    row.register_forward_pre_hook(lambda module, args: seen.append(module.ub_overlap_rs_fprop))
    for training in (True, False, True):
        model.train(training)
        model(batch)
        assert row.ub_overlap_rs_fprop
        assert not column.ub_overlap_rs_fprop
    assert seen == [True, False, True]


def test_flags_come_back_after_an_error() -> None:
    linear = nn.Linear(1, 1)
    linear.ub_overlap_rs_fprop = True  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError), overlapping(nn.Sequential(linear), enabled=False):
        assert not linear.ub_overlap_rs_fprop
        raise ZeroDivisionError
    assert linear.ub_overlap_rs_fprop


@pytest.mark.parametrize("options", [TP2, OVERLAP[2:]], ids=["local layers", "no sequence parallelism"])
def test_what_is_refused(options: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"tp_comm_overlap is of Transformer Engine's layers under sequence parallelism: set"):
        config_of(*OVERLAP[:2], *options)
