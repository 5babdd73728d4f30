"""Every way to attend against the model's own, forward and backward, and which kernels take what.

Axes: B rows, S positions, H heads, G key-value groups, D width of a head.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmar_megatron.benchmarks.attention import CAUSAL, IMPLEMENTATIONS, MODEL
from mmar_megatron.benchmarks.synthetic import synthetic_batch
from mmar_megatron.config import MaskRatioConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.model.attention import MixedAttention, attention_bias, mixed_attention_allowed
from mmar_megatron.parallel import ParallelGroups
from tests.gpu.runs import engine_on_gpu, furthest, gradients, named, packed_batches, relative_error
from tests.gpu.test_flex import RECOMPUTE
from tests.unit.tiny import Documents, config_of

TE = ("--model.backbone.transformer_impl", "transformer_engine")
BF16 = ("--precision.dtype", "bf16")
HEADS = 4
LENGTHS = [64, 320, 1000]
"""Below a block of kernels, and no multiple of one."""


def batch_of(length: int) -> Batch:
    """Documents of 20 positions of text and an image of 16, and some padding."""
    return synthetic_batch(
        rows=2,
        documents=length // 40,
        text=20,
        image_tokens=16,
        mask_ratio=MaskRatioConfig(distribution="uniform", minimum=0.0),
        length=length,
        seed=1,
    )


def text_of(length: int) -> Batch:
    """Two rows whose attention is in causal order."""
    zeros_BS = torch.zeros((2, length), dtype=torch.int64, device="cuda")
    return replace(batch_of(length), document_ids_BS=zeros_BS, span_ids_BS=zeros_BS - 1, causal=True)


def tensors(length: int, *, groups: int, width: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values as megatron-core lays them out, in bf16; and the output's gradient."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(length, 2, n, width) for n in (HEADS, groups, groups)]
    made = [torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in (*shapes, (length, 2, HEADS * width))]
    return [x.requires_grad_() for x in made[:3]], made[3]


def exact(inputs: list[Tensor], weight_SBD: Tensor, batch: Batch) -> list[Tensor]:
    """Output and gradients in float64, with all scores."""
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    query, key, value = (x.permute(1, 2, 0, 3) for x in inputs)
    allowed = mixed_attention_allowed(document_ids_BS=batch.document_ids_BS, span_ids_BS=batch.span_ids_BS)
    bias = attention_bias(allowed, dtype=torch.float64)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=key.shape[1] != HEADS)
    output_SBD = output.permute(2, 0, 1, 3).flatten(2)
    return [output_SBD, *torch.autograd.grad(output_SBD, inputs, grad_outputs=weight_SBD.double())]


def found_by(name: str, options: tuple[str, ...], inputs: list[Tensor], weight_SBD: Tensor, batch: Batch) -> list[Tensor]:
    config = config_of(*options, *BF16).model.backbone
    if reason := IMPLEMENTATIONS[name].lacks(config):
        pytest.skip(reason)
    output_SBD = IMPLEMENTATIONS[name].prepare(config, batch)(*inputs)
    return [output_SBD, *torch.autograd.grad(output_SBD, inputs, grad_outputs=weight_SBD)]


@pytest.mark.parametrize(("groups_of_keys", "width"), [(4, 64), (2, 64), (1, 64), (2, 128)])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != MODEL])
def test_all_err_no_more_than_the_models_own(
    name: str, length: int, groups_of_keys: int, width: int, groups: ParallelGroups
) -> None:
    torch._dynamo.reset()
    batch = text_of(length) if name in CAUSAL else batch_of(length)
    options = ("--model.backbone.kv_channels", str(width), "--model.backbone.num_query_groups", str(groups_of_keys))
    inputs, weight_SBD = tensors(length, groups=groups_of_keys, width=width)
    real_SB = (batch.document_ids_BS >= 0).t()  # what padding sees is no matter
    weight_SBD = weight_SBD * real_SB[:, :, None]
    truth = exact(inputs, weight_SBD, batch)
    found, dense = (found_by(which, options, inputs, weight_SBD, batch) for which in (name, MODEL))
    for a, b, true in zip(found, dense, truth, strict=True):
        kept = [x[real_SB] for x in (a, b, true)]
        assert relative_error(kept[0], kept[2]) < 1.5 * relative_error(kept[1], kept[2]) + 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("groups_of_keys", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_torch_has_a_fused_kernel(causal: bool, groups_of_keys: int, dtype: str, groups: ParallelGroups) -> None:
    """Else it would hold all scores; here it raises."""
    options = ("--model.backbone.kv_channels", "64", "--model.backbone.num_query_groups", str(groups_of_keys))
    config = config_of(*options, "--precision.dtype", dtype).model.backbone
    inputs, weight_SBD = tensors(320, groups=groups_of_keys, width=64)
    inputs = [x.detach().to(config.params_dtype).requires_grad_() for x in inputs]
    batch = batch_of(320)
    allowed = mixed_attention_allowed(document_ids_BS=batch.document_ids_BS, span_ids_BS=batch.span_ids_BS)
    mask = None if causal else attention_bias(allowed, dtype=config.params_dtype)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        output_SBD = MixedAttention(config, layer_number=1)(*inputs, mask)
        torch.autograd.grad(output_SBD, inputs, grad_outputs=weight_SBD.to(config.params_dtype))


# --- batches of text alone, in the whole model ----------------------------------------------------------------------------------


@pytest.fixture
def texts(coarse_tokenizer: Tokenizer) -> list[Batch]:
    documents = Documents(coarse_tokenizer)
    rows = [[documents.text([100 + i for i in range(n)])] for n in (50, 3, 20, 61)]
    batches = [documents.batch(pair, sequence_length=64) for pair in (rows[:2], rows[2:])]
    assert all(batch.causal for batch in batches)
    return batches


def masked(batches: list[Batch]) -> list[Batch]:
    return [replace(batch, causal=False) for batch in batches]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_torchs_causal_kernel_learns_the_same_in_fp32(recompute: str, groups: ParallelGroups, texts: list[Batch]) -> None:
    engine = engine_on_gpu(groups, *RECOMPUTE[recompute])
    found, expected = (_learned(engine, batches) for batches in (texts, masked(texts)))
    assert furthest(found, expected) < (1e-5, "")


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("options", [(), TE], ids=["torch", "te"])
def test_in_bf16_they_err_no_more_than_under_the_mask(
    options: tuple[str, ...], recompute: str, groups: ParallelGroups, texts: list[Batch]
) -> None:
    if options:
        pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine: requirements-gpu.txt")
    precise = engine_on_gpu(groups)
    expected = _learned(precise, masked(texts))
    engine = engine_on_gpu(groups, *options, *BF16, *RECOMPUTE[recompute], weights=named(precise))
    causal, dense = (furthest(_learned(engine, batches), expected) for batches in (texts, masked(texts)))
    assert causal[0] < 1.5 * dense[0] + 1e-3, (causal, dense)


def test_transformer_engine_fuses_it(groups: ParallelGroups, texts: list[Batch]) -> None:
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine: requirements-gpu.txt")
    package = "transformer_engine.pytorch.attention.dot_product_attention"
    dot_product_attention = importlib.import_module(f"{package}.dot_product_attention")
    engine_on_gpu(groups, *TE, *BF16).train_step(texts, learning_rate=0.0)
    chosen = dot_product_attention._attention_backends
    assert chosen["use_fused_attention"] or chosen["use_flash_attention"]
    assert not chosen["use_unfused_attention"]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_beside_it(
    recipe: str, recompute: str, groups: ParallelGroups, texts: list[Batch], coarse_tokenizer: Tokenizer
) -> None:
    """Texts and pictures in turn; the scales of FP8 have nothing of attention among them."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine: requirements-gpu.txt")
    pictures = packed_batches(Documents(coarse_tokenizer))
    engine = engine_on_gpu(groups, *TE, *BF16, "--precision.fp8", recipe, *RECOMPUTE[recompute])
    losses = [engine.train_step(batches, learning_rate=3e-3).loss for batches in (texts, pictures) * 10]
    assert losses[-2] < 0.9 * losses[0]
    assert losses[-1] < 0.9 * losses[1]
    attention = engine.chunks[0].module.decoder.layers[0].self_attention.core_attention.causal.attention
    assert not attention.fp8
    assert not [key for key in attention.fp8_meta if "scaling" in key]


def _learned(engine: NativeEngine, batches: list[Batch]) -> dict[str, Tensor]:
    """Gradients of what a text teaches; the others are zero."""
    return {name: gradient for name, gradient in gradients(engine, batches).items() if gradient.norm() > 0}
