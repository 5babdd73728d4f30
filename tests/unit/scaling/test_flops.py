"""The formulas against torch's own counter on the real modules, and the table of peaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmar_megatron import parallel
from mmar_megatron.config import EmbeddingViTConfig, HeadConfig, ModelConfig, ParallelConfig, PrecisionConfig, TransformerConfig
from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.model.attention import attention_bias, mixed_attention_allowed, rotary_angles
from mmar_megatron.model.head import DiffusionHead
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.layer_specs import block_spec
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.model.vision import EmbeddingViT, Projector
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.scaling.flops import (
    Flops,
    ModelShape,
    Peaks,
    StepCounts,
    attention,
    backbone_layer,
    diffusion_head,
    embedding_vit,
    linears,
    peak_flops,
    step_flops,
)

GRID, CHANNELS, CONDITION = 3, 5, 40
SEQUENCES, LENGTH = 2, 24


def model_config(*, gated: bool = True) -> ModelConfig:
    # Grouped queries, a feed-forward size and head channels that are no multiples of each other: a swapped factor would show.
    backbone = TransformerConfig(
        num_layers=2,
        hidden_size=48,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=10,
        ffn_hidden_size=56,
        gated_linear_unit=gated,
        use_cpu_initialization=True,
        transformer_impl="local",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    vit = EmbeddingViTConfig(num_layers=3, hidden_size=32, num_attention_heads=4, mlp_ratio=2.5)
    return ModelConfig(backbone=backbone, embedding_vit=vit, head=HeadConfig(depth=3, width=28, timestep_multiplier=4))


def model_shape(config: ModelConfig) -> ModelShape:
    return ModelShape.of(config, vocab_size=128, tokens_per_image=GRID**2, token_channels=CHANNELS, condition_width=CONDITION)


def counted(module: nn.Module, *inputs: Tensor, **named: Tensor) -> Flops:
    """What torch counts; attention as plain products, since the counter does not know the CPU's fused kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = module(*inputs, **named)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


@pytest.fixture
def groups() -> Iterator[ParallelGroups]:
    groups = parallel.initialize(ParallelConfig())
    yield groups
    parallel.leave()


@pytest.mark.parametrize("gated", [True, False])
def test_backbone(groups: ParallelGroups, gated: bool) -> None:
    from megatron.core.transformer.transformer_block import TransformerBlock

    config = model_config(gated=gated)
    spec = block_spec(config.backbone, vp_stage=None, pipeline_rank=0)
    block = TransformerBlock(config.backbone, spec, pg_collection=groups.megatron)
    position_ids_BS = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    ids_BS = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    allowed_BSS = mixed_attention_allowed(document_ids_BS=ids_BS, span_ids_BS=ids_BS - 1)
    measured = counted(
        block,
        torch.randn(LENGTH, SEQUENCES, config.backbone.hidden_size, requires_grad=True),
        attention_mask=attention_bias(allowed_BSS, dtype=torch.float32),
        rotary_pos_emb=rotary_angles(position_ids_BS, head_dim=config.backbone.kv_channels, base=1e4),
    )
    counts = StepCounts(sequences=SEQUENCES, sequence_length=LENGTH, images=0, labels=0, masked=0)
    assert measured == backbone_layer(model_shape(config), counts) * config.backbone.num_layers


def test_embedding_vit() -> None:
    config = model_config()
    vit = EmbeddingViT(**asdict(config.embedding_vit), channels=CHANNELS, grid_height=GRID, grid_width=GRID)
    visible_MN = torch.rand(7, GRID**2) > 0.5
    measured = counted(vit, torch.randn(7, GRID**2, CHANNELS), visible_MN=visible_MN)
    assert measured == embedding_vit(model_shape(config), 7)


def test_diffusion_head() -> None:
    config = model_config()
    head = DiffusionHead(depth=config.head.depth, width=config.head.width, channels=CHANNELS, condition_width=CONDITION)
    levels = config.head.timestep_multiplier
    x_KRC, z_KZ = torch.randn(11, levels, CHANNELS), torch.randn(11, CONDITION, requires_grad=True)
    measured = counted(head, x_KRC, timestep_KR=torch.rand(11, levels), z_KZ=z_KZ)
    assert measured == diffusion_head(model_shape(config), 11)


def test_step_is_the_sum_of_its_parts() -> None:
    config = model_config()
    shape = model_shape(config)
    counts = StepCounts(sequences=SEQUENCES, sequence_length=LENGTH, images=3, labels=13, masked=17)
    step = step_flops(shape, counts)
    hidden = config.backbone.hidden_size
    vis, post = Projector(in_features=32, out_features=hidden), Projector(in_features=hidden, out_features=CONDITION)
    projectors = counted(vis, torch.randn(3 * GRID**2, 32, requires_grad=True))
    projectors += counted(post, torch.randn(17, hidden, requires_grad=True))
    assert step.projectors == projectors
    assert step.logits == counted(nn.Linear(hidden, 128, bias=False), torch.randn(13, hidden, requires_grad=True))
    parts = (step.backbone, step.embedding_vit, step.projectors, step.logits, step.head)
    assert step.model == sum(part.forward + part.backward for part in parts)
    assert step.executed == step.model


def test_whole_model(groups: ParallelGroups) -> None:
    config = model_config()
    geometry = ImageGeometry(grid_height=GRID, grid_width=GRID, channels=CHANNELS)
    model = MMARModel(config, geometry=geometry, vocab_size=128, groups=groups, seed=0)
    batch = random_batch(levels=config.head.timestep_multiplier)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sums = model(batch)
        (sums.text + sums.image).backward()
    counts = StepCounts(
        sequences=SEQUENCES,
        sequence_length=LENGTH,
        images=SEQUENCES,
        labels=int(batch.num_labels),
        masked=int(batch.num_masked),
    )
    shape = replace(model_shape(config), condition_width=config.head.width)
    assert counter.get_total_flops() == step_flops(shape, counts).model


def random_batch(*, levels: int) -> Batch:
    """Each sequence is three words, an image with some tokens masked, and words with labels; padding at the end."""
    tokens = GRID**2
    positions_BS = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    in_image_BS = (positions_BS >= 3) & (positions_BS < 3 + tokens)
    has_label_BS = (positions_BS >= 3 + tokens) & (positions_BS < LENGTH - 4)
    masked_MN = torch.zeros(SEQUENCES, tokens, dtype=torch.bool)
    masked_MN[0, :4] = masked_MN[1, 2:] = True
    return Batch.of(
        tokens_BS=positions_BS,
        labels_BS=torch.where(has_label_BS, positions_BS, IGNORE),
        position_ids_BS=positions_BS,
        document_ids_BS=torch.where(positions_BS < LENGTH - 4, 0, -1),
        span_ids_BS=torch.where(in_image_BS, 0, -1),
        latents_MNC=torch.randn(SEQUENCES, tokens, CHANNELS),
        image_positions_MN=torch.arange(SEQUENCES)[:, None] * LENGTH + 3 + torch.arange(tokens),
        visible_MN=~masked_MN,
        masked_MN=masked_MN,
        timesteps_MNR=torch.rand(SEQUENCES, tokens, levels),
        noise_MNRC=torch.randn(SEQUENCES, tokens, levels, CHANNELS),
        sample_ids_BK=torch.arange(SEQUENCES)[:, None],
    )


def test_full_recompute_runs_the_backbone_once_more() -> None:
    shape = model_shape(model_config())
    counts = StepCounts(sequences=SEQUENCES, sequence_length=LENGTH, images=3, labels=13, masked=17)
    plain, recomputed = step_flops(shape, counts), step_flops(shape, counts, repeated_layers=shape.num_layers)
    assert recomputed.model == plain.model
    assert recomputed.executed == plain.executed + plain.backbone.forward
    assert step_flops(shape, counts, repeated_layers=1).recompute == plain.backbone.forward // shape.num_layers


def test_linears_and_attention_by_hand() -> None:
    assert linears(2, 3, 5, rows=7) == Flops(2 * 7 * (6 + 15), 4 * 7 * (6 + 15))
    assert linears(2, 3, 5, rows=7, input_grad=False) == Flops(2 * 7 * (6 + 15), 4 * 7 * (6 + 15) - 2 * 7 * 6)
    assert attention(batch=2, length=3, width=5) == Flops(2 * 2 * 2 * 9 * 5, 2 * 2 * 2 * 2 * 9 * 5)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250.0),
        ("h100", 989.4),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peak_flops(name: str, tflops: float | None) -> None:
    peak = peak_flops(name, dtype="bf16")
    assert peak is None if tflops is None else peak == pytest.approx(tflops * 1e12)


def test_peak_of_a_format_the_device_lacks() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", dtype="fp8") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", dtype="fp8") == pytest.approx(1978.9e12)


H100 = "NVIDIA H100 80GB HBM3"


def peaks(*, layers: int = 4, spare_ends: bool = False, device: str = H100, **precision: Any) -> Peaks | None:
    backbone = replace(model_config().backbone, num_layers=layers, first_last_layers_bf16=spare_ends)
    return Peaks.of(device, precision=PrecisionConfig(**precision), backbone=backbone)


def test_peaks_are_of_the_formats_that_are_used() -> None:
    assert peaks(dtype="bf16") == Peaks(dtype=989.4e12)
    assert peaks(dtype="bf16", fp8="tensorwise") == Peaks(dtype=989.4e12, fp8=1978.9e12, fp8_layers=1.0)
    assert peaks(dtype="bf16", fp8="blockwise", spare_ends=True) == Peaks(dtype=989.4e12, fp8=1978.9e12, fp8_layers=0.5)
    assert peaks(dtype="bf16", fp8="delayed", device="NVIDIA A100-SXM4-80GB") is None
    assert peaks(dtype="fp32", device="cpu") is None


def test_seconds_at_the_peaks() -> None:
    """By hand: half of the layers' products with weights at the peak of FP8, all else at the other."""
    counts = StepCounts(sequences=SEQUENCES, sequence_length=LENGTH, images=3, labels=13, masked=17)
    step = step_flops(model_shape(model_config()), counts, repeated_layers=1)
    assert Peaks(dtype=2.0).seconds(step) == step.model / 2
    assert Peaks(dtype=2.0).seconds(step, executed=True) == step.executed / 2

    width = 6 * 10
    attended = 2 * attention(batch=SEQUENCES, length=LENGTH, width=width).total
    weights = step.backbone.total - attended
    half = Peaks(dtype=2.0, fp8=4.0, fp8_layers=0.5)
    assert half.seconds(step) == pytest.approx((step.model - weights / 2) / 2 + weights / 2 / 4)
    repeated = step.recompute - attention(batch=SEQUENCES, length=LENGTH, width=width).forward
    more = step.recompute / 2 - repeated / 2 / 2 + repeated / 2 / 4
    assert half.seconds(step, executed=True) == pytest.approx(half.seconds(step) + more)
