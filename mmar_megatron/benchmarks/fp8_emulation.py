"""What FP8's number formats and scalings do to a model, computed in fp32 on any machine.

Each matrix product of a layer's linears takes operands that were rounded to FP8 as Transformer Engine's recipe rounds them, and
adds up in fp32: inputs and weights in the forward pass, the gradient of the output too in the two products of the backward pass.
So this shows formats and scaling alone. A GPU's tensor cores may add up with fewer bits (Transformer Engine lets `tensorwise`
and `delayed` do so in the forward pass), and its fused norm rounds to FP8 what is rounded to bf16 first here. It is a measuring
device: it saves no time, and is no way to train.

The recipes are those of Transformer Engine 2.11 (`transformer_engine.common.recipe`), as megatron-core builds them:

- `tensorwise` (Float8CurrentScaling): scale = largest value of the format / largest value of the tensor;
- `delayed` (DelayedScaling): the same with the largest value in a history of passes before, 1 at first, and what lies above is
  cut;
- `blockwise` (Float8BlockScaling): a power of two for each block of 128 along the dimension that is summed over, and for weights
  of 128 x 128. What is multiplied in two directions is rounded twice, each time from the original. Blocks at an edge may be
  smaller.

Axes: T positions of all sequences (they are summed over in the weights' gradients), I inputs, O outputs of a linear.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mmar_megatron.model.mmar_model import MMARModel

Scaling = Literal["tensorwise", "delayed", "blockwise"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128
MULTIPLE = 16
"""Of what Transformer Engine's kernels take."""


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """Formats and scaling, with Transformer Engine's defaults."""

    scaling: Scaling
    gradients: torch.dtype = E5M2
    """Of the gradients of outputs; inputs and weights are E4M3 always. `hybrid` is E5M2, `e4m3` is E4M3."""
    amax_history_len: int = 1024
    """Of `delayed`: passes whose largest values count."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """Of `delayed`: which of them does."""
    margin: int = 0
    """Of `delayed`: scales are divided by 2 to the power of this."""

    @classmethod
    def of(cls, backbone: TransformerConfig) -> Fp8Recipe:
        """What megatron-core asks of Transformer Engine for this backbone, whose `fp8` is on.

        Raises:
            ValueError: the gradients of weights are not in FP8.
        """
        assert backbone.fp8 in ("hybrid", "e4m3"), backbone.fp8
        if not backbone.fp8_wgrad:
            raise ValueError("The emulation of FP8 rounds for weights' gradients too: leave out model.backbone.fp8_wgrad.")
        return cls(
            scaling=backbone.fp8_recipe,
            gradients=E5M2 if backbone.fp8 == "hybrid" else E4M3,
            amax_history_len=backbone.fp8_amax_history_len,
            amax_compute_algo=backbone.fp8_amax_compute_algo,
            margin=backbone.fp8_margin,
        )


# --- rounding -------------------------------------------------------------------------------------------------------------------


def round_scaled(x: Tensor, *, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` times `scale` to the nearest value of the format, cut at its largest, and back; fp32 of the same shape.

    Args:
        x: any shape.
        scale: fp32, of a shape that broadcasts to that of `x`.
        dtype: of one byte.
    """
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).to(dtype).float() * scale.reciprocal()


def scale_of(amax: Tensor, *, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """The factor that takes `amax` to the format's largest value; 1 where it is 0 or not finite. fp32, of the same shape.

    With `power_of_two` it is the next such number below.
    """
    amax = amax.float()
    scale = (torch.finfo(dtype).max / amax).clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def round_tensor(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """With one scale, from its own largest value; fp32 of the same shape."""
    return round_scaled(x, scale=scale_of(x.abs().amax(), dtype=dtype), dtype=dtype)


def round_blocks(x: Tensor, *, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """With one scale, a power of two, for each block of `height` x `width`, smaller at the edges; [rows, columns] -> fp32."""
    rows, columns = x.shape
    padded = F.pad(x, (0, -columns % width, 0, -rows % height))  # zeros change no block's largest value
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    rounded = round_scaled(blocks, scale=scale_of(amax, dtype=dtype, power_of_two=True), dtype=dtype)
    return rounded.view_as(padded)[:rows, :columns]


class DelayedScale:
    """The scale of one tensor that comes once in each pass, from its largest values in the passes before."""

    def __init__(self, recipe: Fp8Recipe, *, dtype: torch.dtype) -> None:
        self._recipe, self._dtype = recipe, dtype
        self.scale = torch.ones(())
        self._history: deque[float] = deque(maxlen=recipe.amax_history_len)

    def round(self, x: Tensor) -> Tensor:
        """With the scale of the passes before; this one's largest value counts from the next on. fp32 of the same shape."""
        rounded = round_scaled(x, scale=self.scale.to(x.device), dtype=self._dtype)
        self._history.append(float(x.abs().amax()))
        amax = max(self._history) if self._recipe.amax_compute_algo == "max" else self._history[-1]
        if amax > 0 and math.isfinite(amax):  # else it stays as it is
            self.scale = scale_of(torch.tensor(amax), dtype=self._dtype) / 2**self._recipe.margin
        return rounded


# --- one linear -----------------------------------------------------------------------------------------------------------------


class _ScaledByTensor:
    """Operands of a linear with one scale for each, the same in all products."""

    def __init__(self, recipe: Fp8Recipe) -> None:
        if recipe.scaling == "delayed":
            self._round = [DelayedScale(recipe, dtype=dtype).round for dtype in (E4M3, E4M3, recipe.gradients)]
        else:
            self._round = [partial(round_tensor, dtype=dtype) for dtype in (E4M3, E4M3, recipe.gradients)]

    def input(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """For the output, and for the weights' gradient."""
        rounded = self._round[0](x_TI)
        return rounded, rounded

    def weight(self, weight_OI: Tensor) -> Tensor:
        """For the output, and for the input's gradient."""
        return self._round[1](weight_OI)

    def gradient(self, grad_TO: Tensor) -> tuple[Tensor, Tensor]:
        """For the input's gradient, and for the weights'."""
        rounded = self._round[2](grad_TO)
        return rounded, rounded


class _ScaledByBlock:
    """Operands of a linear in blocks along what is summed over."""

    def __init__(self, recipe: Fp8Recipe) -> None:
        self._gradients = recipe.gradients

    def input(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """For the output, and for the weights' gradient."""
        return self._both(x_TI, dtype=E4M3)

    def weight(self, weight_OI: Tensor) -> Tensor:
        """For the output, and for the input's gradient."""
        return round_blocks(weight_OI, height=BLOCK, width=BLOCK, dtype=E4M3)

    def gradient(self, grad_TO: Tensor) -> tuple[Tensor, Tensor]:
        """For the input's gradient, and for the weights'."""
        return self._both(grad_TO, dtype=self._gradients)

    @staticmethod
    def _both(x: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            round_blocks(x, height=1, width=BLOCK, dtype=dtype),
            round_blocks(x, height=BLOCK, width=1, dtype=dtype),
        )


class _RoundedLinear(torch.autograd.Function):
    """y = Q(x) Q(W)^T + b; dx = Q(dy) Q(W); dW = Q(dy)^T Q(x); db = sum of dy, which is not rounded. All sums in fp32."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, operands: Any) -> Tensor:
        x_forward_TI, x_backward_TI = operands.input(x_TI)
        rounded_OI = operands.weight(weight_OI)
        ctx.save_for_backward(x_backward_TI, rounded_OI)
        ctx.operands, ctx.dtypes = operands, (x_TI.dtype, weight_OI.dtype, None if bias_O is None else bias_O.dtype)
        y_TO = x_forward_TI @ rounded_OI.t()
        return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (grad_TO,) = gradients
        x_TI, weight_OI = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.dtypes
        for_input_TO, for_weight_TO = ctx.operands.gradient(grad_TO)
        bias_O = None if of_bias is None else grad_TO.float().sum(dim=0).to(of_bias)
        return (for_input_TO @ weight_OI).to(of_input), (for_weight_TO.t() @ x_TI).to(of_weight), bias_O, None


def rounded_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, operands: Any) -> Tensor:
    """[..., I] -> [..., O] in the dtype of `x`, with operands in FP8.

    Raises:
        ValueError: sides that Transformer Engine's kernels do not take.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    for size in (x_TI.shape[0], *weight_OI.shape):
        if size % MULTIPLE:
            raise ValueError(f"FP8 multiplies matrices with sides in multiples of {MULTIPLE}, and one here is {size}: change it.")
    return _RoundedLinear.apply(x_TI, weight_OI, bias_O, operands).view(*x.shape[:-1], -1)


def operands_of(recipe: Fp8Recipe) -> _ScaledByTensor | _ScaledByBlock:
    """How one linear's operands are rounded, with the state of `delayed`."""
    return _ScaledByBlock(recipe) if recipe.scaling == "blockwise" else _ScaledByTensor(recipe)


# --- a whole model --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Emulation:
    """FP8 in a model's layers, but for those that are spared."""

    recipe: Fp8Recipe
    layers_in_bf16: frozenset[int] = field(default_factory=frozenset)
    """Counted from 0, over all pipeline stages."""

    @classmethod
    def of(cls, backbone: TransformerConfig) -> Emulation:
        """What megatron-core and Transformer Engine do with this backbone, whose `fp8` is on."""
        layers, spared = range(backbone.num_layers), frozenset[int]()
        if backbone.first_last_layers_bf16:
            first_of_end = backbone.num_layers - backbone.num_layers_at_end_in_bf16
            spared = frozenset(n for n in layers if n < backbone.num_layers_at_start_in_bf16 or n >= first_of_end)
        return cls(recipe=Fp8Recipe.of(backbone), layers_in_bf16=spared)


@contextmanager
def emulating(models: Sequence[MMARModel], emulation: Emulation) -> Iterator[None]:
    """Within, the linears of the models' layers compute in FP8 while training, and as they are in evaluation mode.

    All else is as it was: attention, norms, embedding, output layer, EmbeddingViT, projectors and diffusion head.

    Raises:
        ValueError: a layout or layers that the emulation does not know.
    """
    linears = [linear for model in models for linear in _linears(model, spared=emulation.layers_in_bf16)]
    for linear in linears:
        operands = operands_of(emulation.recipe)
        linear._forward_impl = partial(_forward, linear=linear, plain=linear._forward_impl, operands=operands)
    try:
        yield
    finally:
        for linear in linears:
            del linear._forward_impl  # the class's own comes to light again


def _linears(model: MMARModel, *, spared: frozenset[int]) -> list[Any]:
    backbone = model.config
    if backbone.tensor_model_parallel_size > 1 or torch.distributed.get_world_size() > 1:
        raise ValueError("The emulation of FP8 is for one process: start one, and set all sizes of parallel to 1.")
    if backbone.recompute_granularity is not None:
        raise ValueError("The emulation of FP8 sees each layer once in a pass: leave out model.backbone.recompute_granularity.")
    if backbone.transformer_impl != "local":
        raise ValueError("The emulation of FP8 is of megatron-core's own layers: set model.backbone.transformer_impl local.")
    layers = [layer for layer in model.decoder.layers if layer.layer_number - 1 not in spared]
    linears = [module for layer in layers for module in layer.modules() if _is_linear(module)]
    assert len(linears) == 4 * len(layers), len(linears)
    return linears


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, ColumnParallelLinear | RowParallelLinear)


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, linear: nn.Module, plain: Any, operands: Any, **options: Any
) -> Tensor:
    """In place of a parallel linear's matrix product, with its arguments."""
    if not linear.training:
        return plain(input, weight, bias=bias, **options)
    return rounded_linear(input, weight, bias, operands=operands)
