"""Floating-point operations of a training step, counted as they are executed, and the peaks they are held against.

Matrix products only, as is usual: a product of [a, b] and [b, c] is 2abc. Norms, activations, softmax, rotary embedding, look-ups
and the diffusion arithmetic are left out. The figure is not 6ND: MMAR runs its parts on different numbers of rows (backbone: all
positions; logits: labelled ones; head: masked ones, once for each noise level), so each part is counted with its own.

Legend: D hidden size of the backbone, A heads, G query groups, d channels of a head, F feed-forward size, S sequence length,
C channels of an image token, N tokens of an image.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mmar_megatron.config import ModelConfig, PrecisionConfig, TransformerConfig

TIMESTEP_FEATURES = 256
"""Width of the sinusoidal timestep features that enter the head (as in MAR and DiT)."""


@dataclass(frozen=True)
class Flops:
    """Operations of one part, forward and backward."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.forward * times, self.backward * times)


def linears(*widths: int, rows: int, input_grad: bool = True) -> Flops:
    """A chain of linear layers of these widths, e.g. `linears(16, 1024, 1024, rows=5)`.

    Backward is two products of the forward's size, for the weight and for the input. The latter is skipped by autograd for a
    first layer that reads data (`input_grad=False`).
    """
    products = [2 * rows * wide_in * wide_out for wide_in, wide_out in pairwise(widths)]
    return Flops(sum(products), 2 * sum(products) - (0 if input_grad else products[0]))


def attention(*, batch: int, length: int, width: int) -> Flops:
    """Scores and weighted sum over all pairs of positions, masked or not. `width` is heads x channels of a head.

    Backward is twice the forward: what a flash kernel recomputes of the scores is not counted, as in PaLM's definition of MFU
    (arXiv 2204.02311, appendix B).
    """
    forward = 2 * 2 * batch * length * length * width
    return Flops(forward, 2 * forward)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that the cost depends on."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    gated_mlp: bool
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Channels of an attention head."""
    vocab_size: int
    """As padded."""
    tokens_per_image: int
    token_channels: int
    vit_layers: int
    vit_hidden_size: int
    vit_ffn_hidden_size: int
    condition_width: int
    """Of z, which PostProjector makes for the head."""
    head_depth: int
    head_width: int
    timestep_multiplier: int

    @classmethod
    def of(
        cls, config: ModelConfig, *, vocab_size: int, tokens_per_image: int, token_channels: int, condition_width: int
    ) -> ModelShape:
        """The shape of a configured model; `vocab_size` is the padded one."""
        backbone, vit, head = config.backbone, config.embedding_vit, config.head
        return cls(
            num_layers=backbone.num_layers,
            hidden_size=backbone.hidden_size,
            ffn_hidden_size=backbone.ffn_hidden_size,
            gated_mlp=backbone.gated_linear_unit,
            num_attention_heads=backbone.num_attention_heads,
            num_query_groups=backbone.num_query_groups,
            kv_channels=backbone.kv_channels,
            vocab_size=vocab_size,
            tokens_per_image=tokens_per_image,
            token_channels=token_channels,
            vit_layers=vit.num_layers,
            vit_hidden_size=vit.hidden_size,
            vit_ffn_hidden_size=int(vit.mlp_ratio * vit.hidden_size),
            condition_width=condition_width,
            head_depth=head.depth,
            head_width=head.width,
            timestep_multiplier=head.timestep_multiplier,
        )


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """How many rows each part sees in one step, over all microbatches and data-parallel ranks."""

    sequences: int
    sequence_length: int
    """With its padding: the backbone computes that too."""
    images: int
    """Image slots: EmbeddingViT computes every one, all of its tokens, whether visible or not."""
    labels: int
    """Text positions with a label."""
    masked: int
    """Masked image tokens."""


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of one step, part by part."""

    backbone: Flops
    """The transformer layers, linears and attention."""
    attention: Flops
    """Of these, the attention: what is no product with weights."""
    embedding_vit: Flops
    vis_projector: Flops
    post_projector: Flops
    logits: Flops
    head: Flops
    recompute: int
    """Done again in backward under full recomputation: one more forward of the layers that it repeats."""

    @property
    def projectors(self) -> Flops:
        """Into the backbone, and out of it."""
        return self.vis_projector + self.post_projector

    @property
    def model(self) -> int:
        """What the model needs, without recomputation: the numerator of MFU (model FLOPs utilization)."""
        return sum(part.total for part in (self.backbone, self.embedding_vit, self.projectors, self.logits, self.head))

    @property
    def executed(self) -> int:
        """What the devices do, with recomputation: the numerator of HFU (hardware FLOPs utilization)."""
        return self.model + self.recompute


def step_flops(shape: ModelShape, counts: StepCounts, *, repeated_layers: int = 0) -> StepFlops:
    """The operations of one optimizer step over all devices, but for the optional alignment loss (one linear on clean images).

    Args:
        shape: of the model.
        counts: of the step.
        repeated_layers: whose forward pass full recomputation repeats.
    """
    layer = backbone_layer(shape, counts)
    queries = shape.num_attention_heads * shape.kv_channels
    attended = attention(batch=counts.sequences, length=counts.sequence_length, width=queries)
    hidden, condition = shape.hidden_size, shape.condition_width
    return StepFlops(
        backbone=layer * shape.num_layers,
        attention=attended * shape.num_layers,
        embedding_vit=embedding_vit(shape, counts.images),
        vis_projector=linears(shape.vit_hidden_size, hidden, hidden, rows=counts.images * shape.tokens_per_image),
        post_projector=linears(hidden, condition, condition, rows=counts.masked),
        logits=linears(hidden, shape.vocab_size, rows=counts.labels),
        head=diffusion_head(shape, counts.masked),
        recompute=layer.forward * repeated_layers,
    )


def backbone_layer(shape: ModelShape, counts: StepCounts) -> Flops:
    """One transformer layer: QKV (2D(A + 2G)d a row), attention, output projection (2DAd), gated or plain MLP (6DF or 4DF)."""
    rows = counts.sequences * counts.sequence_length
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    queries = shape.num_attention_heads * shape.kv_channels
    keys_and_values = 2 * shape.num_query_groups * shape.kv_channels
    return (
        linears(hidden, queries + keys_and_values, rows=rows)
        + attention(batch=counts.sequences, length=counts.sequence_length, width=queries)
        + linears(queries, hidden, rows=rows)
        + linears(hidden, 2 * ffn if shape.gated_mlp else ffn, rows=rows)
        + linears(ffn, hidden, rows=rows)
    )


def embedding_vit(shape: ModelShape, images: int) -> Flops:
    """EmbeddingViT on all tokens of its images: a linear from the token's channels, then layers of attention and a plain MLP."""
    rows = images * shape.tokens_per_image
    hidden = shape.vit_hidden_size
    layer = (
        linears(hidden, 3 * hidden, rows=rows)
        + attention(batch=images, length=shape.tokens_per_image, width=hidden)
        + linears(hidden, hidden, rows=rows)
        + linears(hidden, shape.vit_ffn_hidden_size, hidden, rows=rows)
    )
    return linears(shape.token_channels, hidden, rows=rows, input_grad=False) + layer * shape.vit_layers


def diffusion_head(shape: ModelShape, masked: int) -> Flops:
    """MAR's head: once for each noise level of each masked token, but for the condition's linear, once for each masked token.

    Each block has two linears of the head's width W and the modulation's W -> 3W; the last layer W -> 2W and W -> C.
    """
    rows = masked * shape.timestep_multiplier
    width = shape.head_width
    block = linears(width, width, width, rows=rows) + linears(width, 3 * width, rows=rows)
    return (
        linears(shape.token_channels, width, rows=rows, input_grad=False)
        + linears(TIMESTEP_FEATURES, width, width, rows=rows, input_grad=False)
        + linears(shape.condition_width, width, rows=masked)
        + block * shape.head_depth
        + linears(width, 2 * width, rows=rows)
        + linears(width, shape.token_channels, rows=rows)
    )


# Peaks in TFLOP/s of dense matrix products (vendors' figures "with sparsity" halved), by what torch calls the device. fp32 is
# without TF32, which torch leaves off by default. Sources, all NVIDIA's: the data sheets of the A100 (2021), H100 NVL, H200 and
# H200 NVL (2024) and HGX B200 (2025); for the H100 SXM and PCIe the white paper on the Hopper architecture (v1.04).
_PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"A100", {"fp32": 19.5, "bf16": 312.0}),
    (r"H100 PCIe", {"fp32": 51.2, "bf16": 756.0, "fp8": 1513.0}),
    (r"H[12]00 NVL", {"fp32": 60.0, "bf16": 835.5, "fp8": 1670.5}),
    (r"H[12]00", {"fp32": 66.9, "bf16": 989.4, "fp8": 1978.9}),
    (r"B200", {"fp32": 75.0, "bf16": 2250.0, "fp8": 4500.0}),
)


def peak_flops(device_name: str, *, dtype: Literal["fp32", "bf16", "fp8"]) -> float | None:
    """Peak of one device in FLOP/s, from the name torch gives it ("NVIDIA H100 80GB HBM3") or a short one ("h100").

    None where it is not in the table: another device, a format it lacks, or a slice of a device (MIG).
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, peaks in _PEAK_TFLOPS:
        if re.search(rf"\b{pattern}\b", device_name, flags=re.IGNORECASE):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What one device reaches at best, in FLOP/s, in each format that a run computes in."""

    dtype: float
    """In `precision.dtype`."""
    fp8: float = math.inf
    """In FP8, if anything is."""
    fp8_layers: float = 0.0
    """Share of the layers whose products with weights are in FP8."""

    @classmethod
    def of(cls, device_name: str, *, precision: PrecisionConfig, backbone: TransformerConfig) -> Peaks | None:
        """From the table of `peak_flops`; None where one of them is not in it."""
        dtype = peak_flops(device_name, dtype=precision.dtype)
        if dtype is None or precision.fp8 == "off":
            return None if dtype is None else cls(dtype=dtype)
        fp8 = peak_flops(device_name, dtype="fp8")
        if fp8 is None:
            return None
        ends = backbone.num_layers_at_start_in_bf16 + backbone.num_layers_at_end_in_bf16
        spared = min(ends, backbone.num_layers) if backbone.first_last_layers_bf16 else 0
        return cls(dtype=dtype, fp8=fp8, fp8_layers=1 - spared / backbone.num_layers)

    def seconds(self, step: StepFlops, *, executed: bool = False) -> float:
        """Of one device that does all of a step at its peaks; with `executed` what recomputation repeats, too."""
        repeated = step.recompute if executed else 0
        share = 1 - step.attention.forward / step.backbone.forward
        in_fp8 = self.fp8_layers * (step.backbone.total - step.attention.total + repeated * share)
        return (step.model + repeated - in_fp8) / self.dtype + in_fp8 / self.fp8
