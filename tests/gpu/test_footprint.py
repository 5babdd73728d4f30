"""Bytes that are counted on fake tensors against those that a GPU's allocator has given out."""

from __future__ import annotations

import pytest
import torch

from mmar_megatron import parallel, platform
from mmar_megatron.config import parse_command_line
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import build_model
from mmar_megatron.scaling.footprint import Microbatch, Piece, fake_batch, run_on_fake_tensors

GEOMETRY = ImageGeometry(grid_height=16, grid_width=16, channels=16)
MICROBATCH = Microbatch(sequences=4, sequence_length=1024, images=12, labels=1000, masked=2500)
OPTIONS = [
    *("--model.backbone.num_layers", "6", "--model.backbone.hidden_size", "1024", "--model.backbone.ffn_hidden_size", "2816"),
    *("--model.backbone.num_attention_heads", "16", "--precision.dtype", "bf16", "--data.sequence_length", "1024"),
    *("--data.codec.image_size", "128", "--data.codec.patch_size", "8"),
]
RECOMPUTE = "--model.backbone.recompute_"
VARIANTS = {
    "kept": (),
    "grouped queries": ("--model.backbone.num_query_groups", "4"),
    "recomputed": (f"{RECOMPUTE}granularity=full", f"{RECOMPUTE}method=uniform", f"{RECOMPUTE}num_layers=1"),
}


def _let_go(parameter: torch.Tensor) -> None:
    parameter.grad = None


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_is_what_is_counted(variant: str) -> None:
    config = parse_command_line([*OPTIONS, *VARIANTS[variant]]).config
    expected = run_on_fake_tensors(config, Piece(6), microbatch=MICROBATCH, geometry=GEOMETRY, vocab_size=32000)
    groups = parallel.initialize(config.parallel)
    try:
        platform.seed_everything(0, tensor_rank=0)
        (model,) = build_model(config.model, geometry=GEOMETRY, vocab_size=32000, groups=groups, seed=0)
        model.to(platform.device())
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_let_go)
        batch = fake_batch(MICROBATCH, geometry=GEOMETRY, config=config).to(platform.device())
        for _ in range(2):  # at first kernels allocate workspaces
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            sums = model(batch)
            saved = torch.cuda.memory_allocated() - before
            (sums.text + sums.image).backward()
            peak = torch.cuda.max_memory_allocated() - before
            del sums
    finally:
        parallel.leave()
    assert saved == pytest.approx(expected.saved.total, rel=0.1)
    assert peak == pytest.approx(expected.peak.total, rel=0.1)
