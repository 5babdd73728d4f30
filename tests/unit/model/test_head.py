"""The diffusion head against MAR's formulas, written out here in numpy and float64.

Axes: K tokens, R noise levels, C channels, Z width of the condition, W width of the head.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmar_megatron.model.head import DiffusionHead, TimestepEmbedder
from tests.unit.tiny import stir

K, R, C, Z, W, DEPTH = 5, 3, 4, 7, 24, 2
Array = NDArray[np.float64]


@pytest.fixture
def head() -> DiffusionHead:
    torch.manual_seed(0)
    return DiffusionHead(depth=DEPTH, width=W, channels=C, condition_width=Z)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def layer_norm(x: Array) -> Array:
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6)


def sinusoids(t: Array | float) -> Array:
    """256 of them: cosines, then sines, of frequencies from 1 down to nearly 1 / 10,000."""
    angle = np.asarray(t)[..., None] * 10000.0 ** -(np.arange(128) / 128)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)


def reference(weights: dict[str, Array], x: Array, *, t: float, z: Array) -> Array:
    """MAR's SimpleMLPAdaLN for one token at one noise level: vectors in, vector out."""

    def linear(name: str, v: Array) -> Array:
        return weights[f"{name}.weight"] @ v + weights[f"{name}.bias"]

    condition = linear("time_embed.mlp.2", silu(linear("time_embed.mlp.0", sinusoids(t)))) + linear("cond_embed", z)
    h = linear("input_proj", x)
    for i in range(DEPTH):
        block = f"res_blocks.{i}"
        shift, scale, gate = np.split(linear(f"{block}.adaLN_modulation.1", silu(condition)), 3)
        normed = layer_norm(h) * weights[f"{block}.in_ln.weight"] + weights[f"{block}.in_ln.bias"]
        inner = linear(f"{block}.mlp.2", silu(linear(f"{block}.mlp.0", normed * (1 + scale) + shift)))
        h = h + gate * inner
    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(condition)), 2)
    return linear("final_layer.linear", layer_norm(h) * (1 + scale) + shift)


# The sinusoids are computed in fp32, where an angle of up to 999 is known to 6e-5; at level 0 they are exact.
@pytest.mark.parametrize(("levels", "tolerance"), [((0, 0, 0), 1e-12), ((1, 2, 3), 1e-6), ((250, 700, 999), 1e-3)])
def test_head_is_the_reference(head: DiffusionHead, levels: tuple[int, ...], tolerance: float) -> None:
    head.double()
    stir(head)
    x_KRC, z_KZ = torch.randn(K, R, C, dtype=torch.float64), torch.randn(K, Z, dtype=torch.float64)
    timestep_KR = torch.tensor(levels).expand(K, R)
    u_KRC = head(x_KRC, timestep_KR=timestep_KR, z_KZ=z_KZ).detach()

    weights = {name: parameter.detach().numpy() for name, parameter in head.named_parameters()}
    expected_KRC = np.array(
        [[reference(weights, x_KRC[k, r].numpy(), t=levels[r], z=z_KZ[k].numpy()) for r in range(R)] for k in range(K)]
    )
    assert np.abs(expected_KRC).mean() > 0.1
    np.testing.assert_allclose(u_KRC.numpy(), expected_KRC, rtol=tolerance, atol=tolerance)


def test_timestep_embedding_is_the_reference_at_every_level() -> None:
    embedder = TimestepEmbedder(width=256)
    as_it_is = torch.nn.Linear(256, 256, bias=False)
    torch.nn.init.eye_(as_it_is.weight)
    embedder.mlp = torch.nn.Sequential(as_it_is)
    found = embedder(torch.arange(1000)).detach().double().numpy()
    np.testing.assert_allclose(found, sinusoids(np.arange(1000, dtype=np.float64)), atol=2e-4)


def test_condition_is_shared_by_the_noise_levels_of_a_token(head: DiffusionHead) -> None:
    stir(head)
    x_KRC, z_KZ = torch.randn(K, R, C), torch.randn(K, Z)
    timestep_KR = torch.randint(1000, (K, R))
    shared_KRC = head(x_KRC, timestep_KR=timestep_KR, z_KZ=z_KZ)
    one_by_one = head(x_KRC.view(K * R, 1, C), timestep_KR=timestep_KR.view(K * R, 1), z_KZ=z_KZ.repeat_interleave(R, dim=0))
    torch.testing.assert_close(shared_KRC, one_by_one.view(K, R, C), rtol=1e-5, atol=1e-6)


def test_it_begins_at_zero(head: DiffusionHead) -> None:
    u_KRC = head(torch.randn(K, R, C), timestep_KR=torch.randint(1000, (K, R)), z_KZ=torch.randn(K, Z))
    assert u_KRC.shape == (K, R, C)
    assert (u_KRC == 0).all()
    zero = {name for name, parameter in head.named_parameters() if parameter.ndim == 2 and (parameter == 0).all()}
    modulations = {f"res_blocks.{i}.adaLN_modulation.1.weight" for i in range(DEPTH)}
    assert zero == modulations | {"final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"}


def test_the_other_initial_weights(head: DiffusionHead) -> None:
    """Xavier-uniform matrices, a normal distribution of 0.02 in the timestep's MLP, zero biases, norms of one."""
    for name, parameter in head.state_dict().items():
        if name.endswith("in_ln.weight"):
            assert (parameter == 1).all()
        elif parameter.ndim == 1:
            assert (parameter == 0).all(), name
        elif name.startswith("time_embed"):
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.1), name
        elif parameter.any():
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.9 * bound < parameter.abs().max() <= bound, name


def test_names_and_shapes_are_those_of_mar(head: DiffusionHead) -> None:
    expected = {
        "time_embed.mlp.0.weight": (W, 256),
        "time_embed.mlp.0.bias": (W,),
        "time_embed.mlp.2.weight": (W, W),
        "time_embed.mlp.2.bias": (W,),
        "cond_embed.weight": (W, Z),
        "cond_embed.bias": (W,),
        "input_proj.weight": (W, C),
        "input_proj.bias": (W,),
        "final_layer.linear.weight": (C, W),
        "final_layer.linear.bias": (C,),
        "final_layer.adaLN_modulation.1.weight": (2 * W, W),
        "final_layer.adaLN_modulation.1.bias": (2 * W,),
    }
    for i in range(DEPTH):
        expected |= {
            f"res_blocks.{i}.in_ln.weight": (W,),
            f"res_blocks.{i}.in_ln.bias": (W,),
            f"res_blocks.{i}.mlp.0.weight": (W, W),
            f"res_blocks.{i}.mlp.0.bias": (W,),
            f"res_blocks.{i}.mlp.2.weight": (W, W),
            f"res_blocks.{i}.mlp.2.bias": (W,),
            f"res_blocks.{i}.adaLN_modulation.1.weight": (3 * W, W),
            f"res_blocks.{i}.adaLN_modulation.1.bias": (3 * W,),
        }
    assert {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()} == expected
