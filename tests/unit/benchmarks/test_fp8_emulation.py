"""FP8 by emulation: rounding, scales, products and their gradients, and what of a model is touched."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmar_megatron.benchmarks.fp8_emulation import (
    E4M3,
    E5M2,
    DelayedScale,
    Emulation,
    Fp8Recipe,
    emulating,
    operands_of,
    round_blocks,
    round_scaled,
    round_tensor,
    rounded_linear,
    scale_of,
)
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.model.losses import LossSums
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups
from tests.unit.command_line import FP8
from tests.unit.tiny import Documents, build_tiny, config_of, stir

ONE = torch.ones(())
TENSORWISE, DELAYED = Fp8Recipe(scaling="tensorwise"), Fp8Recipe(scaling="delayed")
BLOCKWISE = Fp8Recipe(scaling="blockwise", gradients=E4M3)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Magnitudes over six octaves, so that scales matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.exp2(6 * torch.rand(*shape, generator=generator))


# --- rounding and scales --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounding_is_that_of_torch(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.cat([random(4096), torch.linspace(-largest, largest, 4097), torch.logspace(-40, 10, 4096, base=2.0)])
    x = x.clamp(-largest, largest)
    assert torch.equal(round_scaled(x, scale=ONE, dtype=dtype), x.to(dtype).float())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_the_format_holds_stays(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite()]
    assert len(every) > 240
    assert torch.equal(round_scaled(every, scale=ONE, dtype=dtype), every)


def test_ties_go_to_even_and_what_lies_above_is_cut() -> None:
    x = torch.tensor([1.0625, 1.1875, 447.0, 1e6, -1e6, 2.0**-10, 2.0**-10 * 1.01])
    expected = torch.tensor([1.0, 1.25, 448.0, 448.0, -448.0, 0.0, 2.0**-9])
    assert torch.equal(round_scaled(x, scale=ONE, dtype=E4M3), expected)
    x = torch.tensor([1.125, 1.375, 1e6, -math.inf, 2.0**-17, 2.0**-17 * 1.01])
    assert torch.equal(round_scaled(x, scale=ONE, dtype=E5M2), torch.tensor([1.0, 1.5, 57344.0, -57344.0, 0.0, 2.0**-16]))
    assert round_scaled(torch.tensor(math.nan), scale=ONE, dtype=E4M3).isnan()


def test_scales_by_hand() -> None:
    amax = torch.tensor([3.5, 3.0, 448.0, 0.0, math.inf, math.nan])
    assert scale_of(amax, dtype=E4M3).tolist() == [128.0, pytest.approx(448 / 3), 1.0, 1.0, 1.0, 1.0]
    # 448 / 3 = 149.3, and 128 is the power of two below; at 3.5 and 448 it is met.
    assert scale_of(amax, dtype=E4M3, power_of_two=True).tolist() == [128.0, 128.0, 1.0, 1.0, 1.0, 1.0]
    assert scale_of(torch.tensor(7.0), dtype=E5M2) == 8192.0
    assert scale_of(torch.tensor(1e-40), dtype=E4M3) == torch.finfo(torch.float32).max


def test_a_tensor_is_scaled_by_its_largest_value() -> None:
    """Scale 448 / 7 = 64. 0.11 becomes 7.04, between 7 and 7.5; 1e-5 becomes 0.00064, below half of the least, 2^-9."""
    x = torch.tensor([-7.0, 0.11, 1e-5])
    assert torch.equal(round_tensor(x, dtype=E4M3), torch.tensor([-7.0, 7 / 64, 0.0]))


def scales(recipe: Fp8Recipe, *largest: float) -> list[float]:
    """Of the passes in which these are the tensor's largest values, and of the next."""
    delayed = DelayedScale(recipe, dtype=E4M3)
    found = [float(delayed.scale)]
    for amax in largest:
        delayed.round(torch.tensor([amax / 2, -amax]))
        found.append(float(delayed.scale))
    return found


def test_delayed_scales_by_hand() -> None:
    two = Fp8Recipe(scaling="delayed", amax_history_len=2)
    assert scales(two, 7.0, 3.5, 3.5, 0.0, 0.0, 14.0) == [1.0, 64.0, 64.0, 128.0, 128.0, 128.0, 32.0]
    last = Fp8Recipe(scaling="delayed", amax_history_len=1, amax_compute_algo="most_recent")
    assert scales(last, 7.0, 3.5, math.inf, 14.0) == [1.0, 64.0, 128.0, 128.0, 32.0]
    assert scales(DELAYED, *([7.0] + 1023 * [3.5]))[-1] == 64.0
    assert scales(DELAYED, *([7.0] + 1024 * [3.5]))[-1] == 128.0
    assert scales(Fp8Recipe(scaling="delayed", margin=3), 7.0) == [1.0, 8.0]


def test_delayed_scaling_knows_the_passes_before_alone() -> None:
    delayed = DelayedScale(DELAYED, dtype=E4M3)
    assert torch.equal(delayed.round(torch.tensor([896.0, 0.0009])), torch.tensor([448.0, 0.0]))
    assert torch.equal(delayed.round(torch.tensor([1800.0, 0.0])), torch.tensor([896.0, 0.0]))


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (16, 128), (144, 304)])
@pytest.mark.parametrize(("height", "width"), [(1, 128), (128, 1), (128, 128)])
def test_blocks_are_rounded_each_by_itself(rows: int, columns: int, height: int, width: int) -> None:
    """Those at an edge are smaller, as in Transformer Engine."""
    x = random(rows, columns)
    found = round_blocks(x, height=height, width=width, dtype=E4M3)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            here = (slice(top, top + height), slice(left, left + width))
            scale = torch.tensor(2.0 ** math.floor(math.log2(448 / float(x[here].abs().max()))))
            assert torch.equal(found[here], round_scaled(x[here], scale=scale, dtype=E4M3))
    assert found.shape == x.shape


# --- products -------------------------------------------------------------------------------------------------------------------


def plain(recipe: Fp8Recipe) -> dict[str, Callable[[Tensor], Tensor]]:
    """By operand and product, how it is rounded; `delayed` in its first pass."""
    gradients = recipe.gradients
    if recipe.scaling == "blockwise":
        return {
            "x forward": lambda x: round_blocks(x, height=1, width=128, dtype=E4M3),
            "x backward": lambda x: round_blocks(x, height=128, width=1, dtype=E4M3),
            "weight": lambda x: round_blocks(x, height=128, width=128, dtype=E4M3),
            "dy for x": lambda x: round_blocks(x, height=1, width=128, dtype=gradients),
            "dy for weight": lambda x: round_blocks(x, height=128, width=1, dtype=gradients),
        }

    def by(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        if recipe.scaling == "delayed":
            return lambda x: round_scaled(x, scale=ONE, dtype=dtype)
        return lambda x: round_tensor(x, dtype=dtype)

    forward, backward = by(E4M3), by(gradients)
    return {"x forward": forward, "x backward": forward, "weight": forward, "dy for x": backward, "dy for weight": backward}


@pytest.mark.parametrize("recipe", [TENSORWISE, DELAYED, BLOCKWISE, Fp8Recipe(scaling="blockwise")], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_by_their_formulas(recipe: Fp8Recipe, bias: bool) -> None:
    x_SBI, weight_OI = random(80, 2, 144).requires_grad_(), random(48, 144, seed=1).requires_grad_()
    bias_O = random(48, seed=2).requires_grad_() if bias else None
    dy_SBO = random(80, 2, 48, seed=3)
    y_SBO = rounded_linear(x_SBI, weight_OI, bias_O, operands=operands_of(recipe))
    y_SBO.backward(dy_SBO)
    assert x_SBI.grad is not None

    rounded = plain(recipe)
    x_TI, dy_TO = x_SBI.detach().flatten(0, 1), dy_SBO.flatten(0, 1)
    weight = rounded["weight"](weight_OI.detach())
    y_TO = rounded["x forward"](x_TI) @ weight.T
    expected = {
        "y": (y_SBO.flatten(0, 1), y_TO if bias_O is None else y_TO + bias_O),
        "dx": (x_SBI.grad.view(-1, 144), rounded["dy for x"](dy_TO) @ weight),
        "dW": (weight_OI.grad, rounded["dy for weight"](dy_TO).T @ rounded["x backward"](x_TI)),
        **({} if bias_O is None else {"db": (bias_O.grad, dy_TO.sum(dim=0))}),
    }
    for name, (found, formula) in expected.items():
        torch.testing.assert_close(found, formula, rtol=1e-6, atol=1e-6 * float(formula.detach().abs().max()), msg=name)
    exact_TO = x_TI @ weight_OI.detach().T
    assert (y_TO - exact_TO).norm() > 0.01 * exact_TO.norm()  # rounding is seen at all


def test_dtypes_are_those_of_the_operands() -> None:
    x_TI, weight_OI = (random(16, 16, seed=seed).bfloat16().requires_grad_() for seed in (0, 1))
    y_TO = rounded_linear(x_TI, weight_OI, operands=operands_of(TENSORWISE))
    y_TO.sum().backward()
    assert x_TI.grad is not None
    assert weight_OI.grad is not None
    assert {y_TO.dtype, x_TI.grad.dtype, weight_OI.grad.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(("positions", "inputs", "outputs", "size"), [(24, 32, 32, 24), (32, 40, 32, 40), (32, 32, 8, 8)])
def test_sides_that_kernels_do_not_take_are_refused(positions: int, inputs: int, outputs: int, size: int) -> None:
    with pytest.raises(ValueError, match=rf"sides in multiples of 16, and one here is {size}: change it"):
        rounded_linear(random(positions, inputs), random(outputs, inputs), operands=operands_of(TENSORWISE))


# --- a model --------------------------------------------------------------------------------------------------------------------

MODEL = ("--model.backbone.add_qkv_bias", "true")


@pytest.fixture
def model(groups: ParallelGroups) -> MMARModel:
    model = build_tiny(groups, *MODEL)
    stir(model)
    return model


def losses(model: MMARModel, tokenizer: Tokenizer) -> Tensor:
    sums = model(Documents(tokenizer).mixed_batch())
    assert isinstance(sums, LossSums)
    return sums.flatten()[:2]


@pytest.mark.parametrize("recipe", [TENSORWISE, DELAYED, BLOCKWISE], ids=str)
def test_it_is_there_in_training_alone_and_undone_afterwards(
    recipe: Fp8Recipe, model: MMARModel, coarse_tokenizer: Tokenizer
) -> None:
    before = losses(model, coarse_tokenizer)
    with pytest.raises(KeyboardInterrupt), emulating([model], Emulation(recipe=recipe)):
        assert not torch.equal(losses(model, coarse_tokenizer), before)
        assert torch.equal(losses(model.eval(), coarse_tokenizer), before)
        raise KeyboardInterrupt
    assert torch.equal(losses(model.train(), coarse_tokenizer), before)


def test_layers_are_spared(model: MMARModel, coarse_tokenizer: Tokenizer) -> None:
    before = losses(model, coarse_tokenizer)
    found = set()
    for spared in ({0, 1, 2, 3}, {0, 3}, {1, 2}, set()):
        with emulating([model], Emulation(recipe=TENSORWISE, layers_in_bf16=frozenset(spared))):
            found.add(tuple(losses(model, coarse_tokenizer).tolist()))
    assert len(found) == 4
    assert tuple(before.tolist()) in found  # of all four layers


def test_only_the_layers_linears_are_touched(model: MMARModel) -> None:
    with emulating([model], Emulation(recipe=TENSORWISE, layers_in_bf16=frozenset({1}))):
        touched = {name for name, module in model.named_modules() if "_forward_impl" in vars(module)}
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert touched == {f"decoder.layers.{layer}.{name}" for layer in (0, 2, 3) for name in linears}
    assert not any("_forward_impl" in vars(module) for module in model.modules())


def test_recomputation_is_refused(groups: ParallelGroups) -> None:
    refused = build_tiny(groups, "--model.backbone.recompute_granularity", "selective")
    message = r"sees each layer once in a pass: leave out model\.backbone\.recompute_granularity"
    with pytest.raises(ValueError, match=message), emulating([refused], Emulation(recipe=TENSORWISE)):
        pass


def test_gradients_of_weights_in_bf16_are_refused() -> None:
    backbone = config_of(*FP8, "--precision.fp8=delayed", "--model.backbone.fp8_wgrad=false").model.backbone
    with pytest.raises(ValueError, match=r"leave out model\.backbone\.fp8_wgrad"):
        Emulation.of(backbone)


@pytest.mark.parametrize(
    ("options", "recipe", "spared"),
    [
        (["--precision.fp8=tensorwise"], TENSORWISE, {0}),
        (["--precision.fp8=delayed"], DELAYED, set()),
        (["--precision.fp8=blockwise", "--model.backbone.num_layers_at_start_in_bf16=0"], BLOCKWISE, set()),
        (
            ["--precision.fp8=delayed", "--model.backbone.fp8_amax_history_len=8", "--model.backbone.fp8_margin=1"],
            Fp8Recipe(scaling="delayed", amax_history_len=8, margin=1),
            set(),
        ),
        (
            [
                *("--precision.fp8=tensorwise", "--model.backbone.num_layers_at_start_in_bf16=2"),
                "--model.backbone.num_layers_at_end_in_bf16=1",
            ],
            TENSORWISE,
            {0, 1, 3},
        ),
    ],
)
def test_it_is_what_a_configuration_asks_for(options: list[str], recipe: Fp8Recipe, spared: set[int]) -> None:
    emulation = Emulation.of(config_of(*FP8, *options).model.backbone)
    assert emulation == Emulation(recipe=recipe, layers_in_bf16=frozenset(spared))
